"""Signatures of packages and reports, as minisign makes and checks them.

In: a file, a key of minisign. Out: ``FILE.minisig`` beside it, or an error. The prehashed form:
Ed25519 over the BLAKE2b-512 of the file, and over that signature with its trusted comment
(minisign's documented format). The package cryptography does the arithmetic; where a device lacks
it, a signature is refused, never ignored.
"""

from __future__ import annotations

import base64
import binascii
import getpass
import hashlib
import hmac
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq_deploy.errors import MissingDependencyError, MpqError, UsageError
from mpq_deploy.system.files import write_text
from mpq_deploy.system.inputs import open_input, read_text
from mpq_deploy.system.names import printable

SUFFIX = ".minisig"
# The variable with an encrypted key's password, for use without a terminal.
PASSWORD = "MPQ_SIGN_PASSWORD"
ED25519, PREHASHED, SCRYPT, BLAKE2B = b"Ed", b"ED", b"Sc", b"B2"
KEY_FILE_BYTES = 4096
# minisign's own limits ask for a gigabyte; a key that asks for more is not one of its.
LARGEST_SCRYPT = 1 << 30
UNTRUSTED, TRUSTED = "untrusted comment: ", "trusted comment: "
PIECE = 1 << 20


class SignatureError(MpqError):
    """A signature is missing, or is not one of the file by the key."""


@dataclass(frozen=True)
class PublicKey:
    """``number``: the eight bytes of the key id that a signature carries."""

    number: bytes
    key: bytes


@dataclass(frozen=True)
class SecretKey:
    """``seed``: of the Ed25519 key."""

    number: bytes
    seed: bytes


def read_public_key(given: str) -> PublicKey:
    """Read a public key: minisign's file, or the text in it that begins with RW. Raises UsageError."""
    text = given.strip()
    if not text:
        raise UsageError("The public key is empty.", "Give minisign.pub, or its second line.")
    if not (text.startswith("RW") and len(text) == 56):
        lines = read_text(Path(given).expanduser(), limit=KEY_FILE_BYTES, error=UsageError)
        text = (lines.splitlines() or [""])[-1].strip()
    content = _decoded(text, 42)
    if content is None or content[:2] != ED25519:
        raise UsageError(
            f"'{printable(given[:80])}' is not a minisign public key.",
            "Give minisign.pub, or its second line.",
        )
    return PublicKey(content[2:10], content[10:])


def read_secret_key(path: Path) -> SecretKey:
    """Read minisign's secret key, asking for its password where it is encrypted. Raises UsageError."""
    lines = read_text(path.expanduser(), limit=KEY_FILE_BYTES, error=UsageError).splitlines()
    content = _decoded(lines[-1].strip() if lines else "", 158)
    if content is None or content[:2] != ED25519 or content[4:6] != BLAKE2B:
        raise UsageError(
            f"{path} is not a minisign secret key.", "Make one: minisign -G (without password: -W)."
        )
    kind, sealed = content[2:4], content[54:]
    if kind == SCRYPT:
        sealed = _xor(sealed, _stream(path, content[6:38], content[38:54]))
    elif kind != bytes(2):
        raise UsageError(f"{path} is encrypted in a way that is not known.", "See minisign -G.")
    number, seed, public = sealed[:8], sealed[8:40], sealed[40:72]
    # The public half tells as well as minisign's own checksum, which keys without password lack.
    private = _ed25519().Ed25519PrivateKey.from_private_bytes(seed)
    if not hmac.compare_digest(private.public_key().public_bytes_raw(), public):
        raise UsageError(
            f"{path} cannot be opened: the password is wrong, or it is damaged.",
            f"Give the password again ({PASSWORD}, where it is set), or another key.",
        )
    return SecretKey(number, seed)


def sign(path: Path, key: SecretKey) -> Path:
    """Write the signature of ``path`` beside it; return where. The same bytes each time."""
    signer = _ed25519().Ed25519PrivateKey.from_private_bytes(key.seed)
    signature: bytes = signer.sign(_digest(path))
    comment = f"file:{printable(path.name)}\tprehashed"
    whole: bytes = signer.sign(signature + comment.encode())
    out = path.with_name(path.name + SUFFIX)
    lines = (
        f"{UNTRUSTED}signature by mpq-deploy, key {key.number[::-1].hex().upper()}",
        _encoded(PREHASHED + key.number + signature),
        f"{TRUSTED}{comment}",
        _encoded(whole),
    )
    write_text(out, "\n".join(lines) + "\n")
    return out


def verify(path: Path, key: PublicKey) -> str:
    """Return the trusted comment of the signature of ``path``, which is by ``key``.

    Raises SignatureError if there is none, or it is of another key, file or format.
    """
    beside = path.with_name(path.name + SUFFIX)
    hint = "Get the file and its signature again from whoever signed it."
    text = read_text(beside, limit=KEY_FILE_BYTES, error=SignatureError, hint=hint)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    signature = _decoded(lines[1], 74) if len(lines) > 1 else None
    whole = _decoded(lines[3], 64) if len(lines) > 3 else None
    if signature is None or whole is None or not lines[2].startswith(TRUSTED):
        raise SignatureError(f"{beside} is not a minisign signature.", hint)
    if signature[:2] != PREHASHED:
        raise SignatureError(
            f"{beside} is of minisign's old form, over the whole file.", "Sign again: minisign -SH."
        )
    if signature[2:10] != key.number:
        raise SignatureError(
            f"{beside} was made with the key {signature[2:10][::-1].hex().upper()}, not with the trusted "
            f"{key.number[::-1].hex().upper()}.",
            hint,
        )
    comment = lines[2].removeprefix(TRUSTED)
    public = _ed25519().Ed25519PublicKey.from_public_bytes(key.key)
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature[10:], _digest(path))
        public.verify(whole, signature[10:] + comment.encode())
    except InvalidSignature as error:
        raise SignatureError(
            f"The signature of {path} is wrong: the file was altered.", hint
        ) from error
    return printable(comment)


def require_crypto() -> None:
    """Raise MissingDependencyError where signatures cannot be made or checked."""
    _ed25519()


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingDependencyError(
            "cryptography", "sign", "Signing, and checking signatures,"
        ) from error
    return ed25519


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b()
    with open_input(path) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.digest()


def _stream(path: Path, salt: bytes, limits: bytes) -> bytes:
    """Return the bytes that an encrypted key is mixed with (libsodium's choice of scrypt's settings)."""
    operations = int.from_bytes(limits[:8], "little")
    memory = int.from_bytes(limits[8:], "little")
    if memory > LARGEST_SCRYPT or operations > 32 * LARGEST_SCRYPT:
        raise UsageError(
            f"{path} asks for {memory:,} bytes of memory to be opened.", "See minisign -G."
        )
    operations = max(operations, 32768)
    if operations < memory // 32:
        parallel, most = 1, operations // 32
    else:
        parallel, most = 0, memory // 1024
    log = 1
    while 1 << log <= most // 2:
        log += 1
    parallel = parallel or max(min((operations // 4) // (1 << log), 0x3FFFFFFF) // 8, 1)
    return hashlib.scrypt(
        _password(path).encode(),
        salt=salt,
        n=1 << log,
        r=8,
        p=parallel,
        maxmem=2 * LARGEST_SCRYPT - 1,
        dklen=104,
    )


def _password(path: Path) -> str:
    given = os.environ.get(PASSWORD)
    if given is not None:
        return given
    if not sys.stdin or not sys.stdin.isatty():
        raise UsageError(
            f"{path} is encrypted, and there is no terminal to ask for its password.",
            f"Set {PASSWORD}, or use a key without a password (minisign -G -W).",
        )
    return getpass.getpass(f"Password of {path}: ")


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other))


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _decoded(text: str, size: int) -> bytes | None:
    """Return ``size`` bytes from their base64 text; None for anything else."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return content if len(content) == size else None

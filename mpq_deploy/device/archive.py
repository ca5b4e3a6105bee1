"""The package file: a tar archive in a single canonical form, so that any change shows.

Parts are regular files with plain names, in folders where a whole pipeline is packed; every header
field but name and size is fixed. Reading compares each header and each byte of padding with that
form, so links, paths upwards, owners and times cannot occur and any altered byte is found.
``SHA256SUMS`` comes first.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.system.files import file_digest
from mpq_deploy.system.inputs import open_input
from mpq_deploy.system.names import printable

SUMS, MANIFEST, PLAN = "SHA256SUMS", "manifest.json", "plan.json"
# What a package may hold beside these two, and what every package holds: nothing else is unpacked.
REQUIRED_PARTS = frozenset(
    {"model.onnx", "weights.bin", PLAN, "reference.npz", "denoiser.json"}
    | {"scheduler_config.json", "install.pyz", "build.sh"}
)
PARTS = REQUIRED_PARTS | {"correction.json"}
# Programs of a package; those of a whole pipeline come once, not with each component.
PROGRAMS = frozenset({"install.pyz", "build.sh"})
# What the package of a whole pipeline holds, and what it may hold in folders.
GENERATION = "generation.json"
WHOLE_PARTS = PROGRAMS | {GENERATION, "scheduler_config.json"}
COMPONENT_PARTS = (PARTS - PROGRAMS) | {MANIFEST, "model.fp32.onnx"}
INNER = re.compile(
    r"tokenizer(_[23])?/tokenizer\.json|reference/[0-9]\.png|"
    r"components/(text_encoder(_[23])?|unet|transformer|vae_decoder|vae_encoder)/(?P<part>[^/]+)"
)
MOST_PARTS = 128
BLOCK = tarfile.BLOCKSIZE
PIECE = 1 << 20
# What is read at once (our choice: a manifest has some hundred bytes for each layer).
LISTS = {SUMS: 1 << 16, MANIFEST: 64 << 20}
# hashlib names no type for what sha256() returns.
Digest = Any
NAME = re.compile(r"(?=.{1,99}\Z)[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,2}")
# The size field of a ustar header has eleven octal digits.
LARGEST = 8**11 - 1
EXECUTABLE = (".sh",)
AGAIN = "Copy the archive again; its SHA-256 is printed by 'mpq-deploy package'."


class ArchiveError(MpqError):
    """The archive is truncated, altered, or not a package."""


@dataclass(frozen=True)
class Entry:
    """A part: where its bytes lie, and their SHA-256 as read."""

    name: str
    offset: int
    size: int
    sha256: str


Source = Path | bytes


def write_archive(path: Path, parts: Mapping[str, Source]) -> str:
    """Write ``parts`` (name -> file or content) to ``path``; return the archive's SHA-256.

    The manifest comes first, the others follow by name; the digests of all stand before them.
    Raises UsageError for a name that is not plain, or a part of 8 GB or more.
    """
    order = sorted(parts, key=lambda name: (name != MANIFEST, name))
    digests = {name: part_digest(parts[name]) for name in order}
    sums = "".join(f"{digests[name]}  {name}\n" for name in order).encode()
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    whole = hashlib.sha256()
    try:
        with aside.open("wb") as file:
            for name, source in ((SUMS, sums), *((name, parts[name]) for name in order)):
                _write_part(file, whole, name, source)
            _put(file, whole, bytes(2 * BLOCK))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return whole.hexdigest()


def read_archive(path: Path) -> dict[str, Entry]:
    """Return the parts of the archive at ``path``, every byte of it verified.

    Raises ArchiveError naming the part that is truncated, altered, missing or not expected.
    """
    with open_input(path, error=ArchiveError) as file:
        entries = _entries(file, path)
        _check_sums(file, entries, path)
    return entries


def check_parts(entries: Mapping[str, Entry], path: Path) -> None:
    """Raise ArchiveError where the archive holds other parts than a package's: no code comes along."""
    odd = odd_parts(set(entries) - {SUMS, MANIFEST})
    if odd:
        what = f"{path} does not hold the parts of a package: {', '.join(odd[:5])}."
        raise ArchiveError(what, "See mpq-deploy package.")


def odd_parts(names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that no package has, and what a package lacks without."""
    found = set(names)
    if GENERATION not in found:
        return sorted(found - PARTS) + sorted(REQUIRED_PARTS - found)
    odd = []
    for name in found - WHOLE_PARTS:
        match = INNER.fullmatch(name)
        if match is None or (match["part"] and match["part"] not in COMPONENT_PARTS):
            odd.append(name)
    return sorted(odd) + sorted(WHOLE_PARTS - found)


def extract(path: Path, entries: Mapping[str, Entry], folder: Path) -> None:
    """Write the parts into ``folder``; each is digested again while it is written.

    Raises ArchiveError when a part is no longer what was verified.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("rb") as file:
        for entry in entries.values():
            target = folder / entry.name
            digest = hashlib.sha256()
            file.seek(entry.offset)
            for above in list(Path(entry.name).parents)[:-1]:
                if (folder / above).is_symlink():
                    raise ArchiveError(f"{folder / above} is a link; nothing is unpacked into it.")
            target.parent.mkdir(parents=True, exist_ok=True)
            # A link that lies there already is replaced, not followed.
            target.unlink(missing_ok=True)
            with target.open("xb") as out:
                for piece in pieces(file, entry.size):
                    digest.update(piece)
                    out.write(piece)
            if digest.hexdigest() != entry.sha256:
                raise ArchiveError(
                    f"The part '{entry.name}' of {path} changed while it was unpacked.", AGAIN
                )
            target.chmod(_mode(entry.name))


def _write_part(file: BinaryIO, whole: Digest, name: str, source: Source) -> None:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if not NAME.fullmatch(name) or size > LARGEST:
        what = f"'{name}' ({size:,} bytes) cannot be a part of a package."
        raise UsageError(what, "Parts are files below 8 GB with plain names.")
    _put(file, whole, _header(name, size))
    if isinstance(source, bytes):
        _put(file, whole, source)
    else:
        with source.open("rb") as part:
            for piece in pieces(part, size):
                _put(file, whole, piece)
    _put(file, whole, bytes(-size % BLOCK))


def _put(file: BinaryIO, whole: Digest, content: bytes) -> None:
    file.write(content)
    whole.update(content)


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, _mode(name)
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def _mode(name: str) -> int:
    return 0o755 if name.endswith(EXECUTABLE) else 0o644


def _entries(file: BinaryIO, path: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    last = "its beginning"
    while True:
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise ArchiveError(f"{path} is truncated after {last}.", AGAIN)
        if not any(header):
            break
        if len(entries) == MOST_PARTS:
            raise ArchiveError(f"{path} holds more parts than a package has.", AGAIN)
        entry = _entry(file, header, last, path)
        if entry.name in entries:
            raise ArchiveError(f"{path} holds the part '{entry.name}' twice.", AGAIN)
        entries[entry.name] = entry
        last = f"the part '{entry.name}'"
    if file.read(BLOCK + 1) != bytes(BLOCK):
        raise ArchiveError(f"The end of {path}, after {last}, is altered.", AGAIN)
    return entries


def _entry(file: BinaryIO, header: bytes, last: str, path: Path) -> Entry:
    try:
        info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        what = f"The header after {last} of {path} is altered, or this is not a package."
        raise ArchiveError(what, AGAIN) from error
    if not NAME.fullmatch(info.name) or not 0 <= info.size <= LISTS.get(info.name, LARGEST):
        what = f"{path} holds a part '{printable(info.name)}' of {info.size:,} bytes, which no package has."
        raise ArchiveError(what, AGAIN)
    if _header(info.name, info.size) != header:
        raise ArchiveError(f"The header of the part '{info.name}' of {path} is altered.", AGAIN)
    offset, digest, read = file.tell(), hashlib.sha256(), 0
    for piece in pieces(file, info.size):
        digest.update(piece)
        read += len(piece)
    padding = -info.size % BLOCK
    filler = file.read(padding)
    if read < info.size or len(filler) < padding:
        what = f"{path} is truncated in the part '{info.name}' ({read:,} of {info.size:,} bytes are there)."
        raise ArchiveError(what, AGAIN)
    if any(filler):
        raise ArchiveError(f"The padding of the part '{info.name}' of {path} is altered.", AGAIN)
    return Entry(info.name, offset, info.size, digest.hexdigest())


def _check_sums(file: BinaryIO, entries: Mapping[str, Entry], path: Path) -> None:
    for name in (SUMS, MANIFEST):
        if name not in entries:
            what = f"{path} has no part '{name}': it is not a package of mpq-deploy."
            raise ArchiveError(what, "See mpq-deploy package.")
    file.seek(entries[SUMS].offset)
    text = file.read(entries[SUMS].size).decode("ascii", "replace")
    listed = {
        name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())
    }
    others = [name for name in entries if name != SUMS]
    if list(listed) != others or text != "".join(f"{listed[name]}  {name}\n" for name in others):
        what = f"The part '{SUMS}' of {path} is altered: it does not list the parts that are there."
        raise ArchiveError(what, AGAIN)
    wrong = [name for name in others if entries[name].sha256 != listed[name]]
    if not wrong:
        return
    # The manifest repeats the digests of the other parts: that tells whether the part or the list
    # was altered.
    file.seek(entries[MANIFEST].offset)
    manifest = file.read(entries[MANIFEST].size).decode("utf-8", "replace")
    altered = wrong[0]
    if altered != MANIFEST and f'"{entries[altered].sha256}"' in manifest:
        altered = SUMS
    what = (
        f"The part '{altered}' of {path} is altered: its SHA-256 is not the one it was packed with."
    )
    raise ArchiveError(what, AGAIN)


def part_digest(source: Source) -> str:
    """Return the SHA-256 of a part."""
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else file_digest(source)


def pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield ``size`` bytes in pieces; fewer when the file ends before."""
    left = size
    while left > 0:
        piece = file.read(min(PIECE, left))
        if not piece:
            return
        left -= len(piece)
        yield piece

"""Files from others: read within limits, or refused with one line that names file and key.

Standard library only: devices use it, too. NumPy's files are read by ``system.array_file``, YAML by
``system.yaml_file``, pictures by ``system.picture_file``.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mpq_deploy.errors import InputError, MpqError
from mpq_deploy.system.names import printable

# Largest JSON text read, in bytes, where the caller names no limit: 30 times the largest plan that
# we know. The values of a text take up to 25 times its size in memory.
TEXT_BYTES = 16 << 20
# What no file of ours comes near: levels of nesting, values in a text, digits of a number.
DEPTH, VALUES, DIGITS = 64, 16_000_000, 40

# What a clone without Git LFS leaves in a large file's place begins with.
LFS = b"version https://git-lfs.github.com/spec/"
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_input(
    path: Path, *, error: type[MpqError] = InputError, hint: str = "", follow: bool = True
) -> BinaryIO:
    """Open a regular file for reading; never waits for a named pipe or a device.

    ``follow`` False refuses a symbolic link at the end of ``path``. Raises ``error`` (with
    ``hint``) where there is no such file, it is something else, or it cannot be read.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "" if follow else "O_NOFOLLOW"):
        flags |= getattr(os, name, 0) if name else 0
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as problem:
        raise error(f"There is no file {_shown(path)}.", hint or "Check the path.") from problem
    except (OSError, ValueError) as problem:
        raise error(f"{_shown(path)} cannot be read: {_why(problem)}.", hint) from problem
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise error(
            f"{_shown(path)} is {_KINDS.get(kind, 'something else')}, not a file.",
            hint or "Give a regular file.",
        )
    file = os.fdopen(descriptor, "rb")
    if file.read(len(LFS)) == LFS:
        file.close()
        what = f"{_shown(path)} is a Git LFS pointer, not the file that it stands for."
        raise error(what, "Fetch the files themselves: git lfs pull, in their folder.")
    file.seek(0)
    return file


def read_bytes(
    path: Path,
    *,
    limit: int = TEXT_BYTES,
    error: type[MpqError] = InputError,
    hint: str = "",
    follow: bool = True,
) -> bytes:
    """Return a file's content of at most ``limit`` bytes. Raises ``error`` as ``open_input``."""
    with open_input(path, error=error, hint=hint, follow=follow) as file:
        try:
            content = file.read(limit + 1)
        except OSError as problem:
            raise error(f"{_shown(path)} cannot be read: {_why(problem)}.", hint) from problem
    if len(content) > limit:
        what = f"{_shown(path)} has more than {limit:,} bytes, the maximum."
        raise error(what, hint)
    return content


def read_text(
    path: Path, *, limit: int = TEXT_BYTES, error: type[MpqError] = InputError, hint: str = ""
) -> str:
    """Return a UTF-8 file's text. Raises ``error`` as ``read_bytes``, and for other encodings."""
    content = read_bytes(path, limit=limit, error=error, hint=hint)
    return decoded(content, str(path), error=error, hint=hint)


def decoded(
    content: bytes, source: str, *, error: type[MpqError] = InputError, hint: str = ""
) -> str:
    """Return UTF-8 text. Raises ``error`` that names ``source`` and the byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        what = f"{printable(source)} is not UTF-8 text: byte {problem.start:,} is wrong."
        raise error(what, hint) from problem


def read_json(
    path: Path,
    *,
    limit: int = TEXT_BYTES,
    infinite: bool = False,
    error: type[MpqError] = InputError,
    hint: str = "",
) -> Any:
    """Return the values of a JSON file (see ``parse_json``). Raises ``error`` as ``read_text``."""
    text = read_text(path, limit=limit, error=error, hint=hint)
    return parse_json(text, str(path), infinite=infinite, error=error, hint=hint)


def read_json_object(
    path: Path,
    *,
    limit: int = TEXT_BYTES,
    infinite: bool = False,
    error: type[MpqError] = InputError,
    hint: str = "",
) -> dict[str, Any]:
    """As ``read_json``, for a file whose content is an object."""
    values = read_json(path, limit=limit, infinite=infinite, error=error, hint=hint)
    return as_object(values, str(path), error=error, hint=hint)


def as_object(
    values: Any, source: str, *, error: type[MpqError] = InputError, hint: str = ""
) -> dict[str, Any]:
    """Return ``values`` where they are a JSON object. Raises ``error`` that names ``source``."""
    if isinstance(values, dict):
        return values
    raise error(f"{printable(source)} holds {_kind(values)}, not an object.", hint)


def parse_json(
    text: str | bytes,
    source: str,
    *,
    infinite: bool = False,
    error: type[MpqError] = InputError,
    hint: str = "",
) -> Any:
    """Return the values of a JSON text; ``source`` names it in errors.

    ``infinite``: infinities are taken, as diffusers writes them into schedulers' files. Raises
    ``error`` for text that is not JSON, a key that occurs twice, NaN, numbers of more than
    ``DIGITS`` digits, more than ``DEPTH`` levels or ``VALUES`` values.
    """
    try:
        if isinstance(text, bytes):
            text = decoded(text, source, error=error, hint=hint)
        values = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError as problem:
        what = f"{printable(source)} is nested more than {DEPTH} levels deep."
        raise error(what, hint) from problem
    except ValueError as problem:
        raise error(
            f"{printable(source)} is not JSON: {printable(str(problem))}.", hint
        ) from problem
    check_values(values, source, infinite=infinite, error=error, hint=hint)
    return values


def check_values(
    values: Any,
    source: str,
    *,
    infinite: bool = False,
    error: type[MpqError] = InputError,
    hint: str = "",
) -> None:
    """Raise ``error`` for NaN, infinities, nesting beyond ``DEPTH`` or more than ``VALUES`` values.

    ``values``: what a parser of JSON or YAML made. Shared parts count each time they occur.
    """
    place: list[str | int] = []
    for count, value in enumerate(_walk(values, place)):
        problem = ""
        if len(place) > DEPTH:
            problem = f"is nested more than {DEPTH} levels deep"
        elif count >= VALUES:
            problem = f"comes after {VALUES:,} values, the maximum"
        elif isinstance(value, float) and not math.isfinite(value):
            if math.isnan(value) or not infinite:
                problem = f"is {value}, which is not a usable number"
        elif isinstance(value, str) and not value.isascii() and _lone_surrogate(value):
            problem = "holds a lone surrogate (half a character)"
        if problem:
            where = ".".join(map(str, place))[:200]
            where = f"'{printable(where)}'" if where else "its content"
            raise error(f"{printable(source)}: {where} {problem}.", hint)


def _walk(values: Any, place: list[str | int]) -> Iterator[Any]:
    """Yield every value and every text used as a key; ``place`` is kept as the keys that lead there."""
    yield values
    waiting = [_members(values)]
    while waiting:
        for key, value in waiting[-1]:
            del place[len(waiting) - 1 :]
            place.append(key)
            if isinstance(key, str) and not key.isascii():
                yield key
            yield value
            if isinstance(value, (dict, list, tuple)) and value:
                waiting.append(_members(value))
                break
        else:
            waiting.pop()


def _members(values: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(values, dict):
        return iter(values.items())
    return enumerate(values) if isinstance(values, (list, tuple)) else iter(())


def _lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


@contextmanager
def whole(path: Path, error: type[MpqError] = InputError, hint: str = "") -> Iterator[None]:
    """Raise ``error`` where what is made of the file or folder at ``path`` in the block fails.

    For files that programs write: whoever altered them gets one line, not a traceback.
    """
    try:
        yield
    except MpqError:
        raise
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
        *(RuntimeError, TypeError, ValueError),
    ) as problem:
        said = printable(" ".join(str(problem).split())[:200])
        what = (
            f"{_shown(path)} does not have the expected content ({type(problem).__name__}: {said})."
        )
        raise error(what, hint or "It was altered: create it again.") from problem


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key '{key}' occurs twice")
            seen.add(key)
    return values


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _kind(values: Any) -> str:
    names = {list: "a list", str: "text", bool: "a boolean", type(None): "nothing"}
    return names.get(type(values), "a number")


def _shown(path: Path) -> str:
    return printable(str(path)[:500])


def _why(problem: Exception) -> str:
    if isinstance(problem, OSError):
        if problem.errno == errno.ELOOP:
            return "it is a symbolic link"
        return problem.strerror or str(problem)
    return str(problem)

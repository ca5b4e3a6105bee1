"""Names from others: checked before they become paths, and shown without control characters.

Standard library only: devices use it, too.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from mpq_deploy.errors import InputError, MpqError

# File names that every system takes, and that no shell, tar or option parser reads as anything
# else (our choice).
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,98}")
# Windows opens devices by these names, whatever follows a dot.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
# Longest name of a layer, an input or a model (our choice; exporters write a few hundred).
LONGEST_NAME = 4096
# Unicode's classes of control characters, of formatting ones (text direction, zero width), of lone
# halves of surrogate pairs, and of line and paragraph separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def plain_name(name: object, what: str, error: type[MpqError] = InputError) -> str:
    """Return ``name`` where it is a plain file name: letters, digits, ``._-``, at most 99 of them.

    ``what`` says in errors whose name it is ("the target's name"). Raises ``error`` for anything
    else: paths, ``..``, hidden files, names with spaces, names that Windows gives to devices.
    """
    if isinstance(name, str) and PLAIN.fullmatch(name) and not _RESERVED.fullmatch(name):
        return name
    raise error(
        f"{what} is {_quoted(name)}, which is not a plain name.",
        "A plain name has letters, digits, '.', '_' and '-' only, and starts with a letter or digit.",
    )


def path_inside(
    folder: Path, name: object, what: str, error: type[MpqError] = InputError, suffix: str = ""
) -> Path:
    """Return the path of the plain ``name`` (and ``suffix``) directly inside ``folder``.

    The only way in which a stranger's name becomes a path. Raises ``error`` as ``plain_name``.
    """
    return folder / (plain_name(name, what, error) + suffix)


def checked_name(name: object, what: str, error: type[MpqError] = InputError) -> str:
    """Return the name of a layer, an input or a model: text that one line can show.

    Raises ``error`` where it is empty, longer than ``LONGEST_NAME``, or holds control or formatting
    characters (line ends, terminal escapes, marks that turn the direction of text).
    """
    if isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and printable(name) == name:
        return name
    raise error(
        f"{what} is {_quoted(name)}.",
        "Names must have 1 to 4096 characters, none of them a control character.",
    )


def printable(text: str, keep: str = "") -> str:
    r"""Return ``text`` with control and formatting characters as escapes (``\x1b``, ``\u202e``).

    ``keep``: characters that stay as they are, such as line ends.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escaped(one) if unicodedata.category(one) in _HIDDEN and one not in keep else one
        for one in text
    )


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _quoted(name: object) -> str:
    """Show ``name``, shortened, for an error."""
    text = printable(name) if isinstance(name, str) else f"{type(name).__name__} {name!r}"
    return f"'{text[:57]}...'" if len(text) > 60 else f"'{text}'"

"""Imported by every Python of test_portable.py, as its sitecustomize: what Windows lacks and forbids.

Taken away: modules and functions of Unix. Refused: links, forks, text in the locale's encoding by
this package, and to rename, replace or remove a file that this process holds open or mapped, which
Windows says is used by another process. Linux shows what is held in /proc.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

# psutil comes first: on Linux it is built on resource. The tests' own packages may lack it.
with contextlib.suppress(ImportError):
    import psutil  # noqa: F401

BLOCKED = ("fcntl", "resource", "pwd", "grp", "termios")
# Of the tests alone, and written for the system that it finds itself on.
TESTS_ONLY = ("peft", "accelerate")
UNIX_ONLY = [
    "fork",
    "forkpty",
    "getpgid",
    "setsid",
    "killpg",
    "getuid",
    "geteuid",
    "sched_getaffinity",
]
REFUSED = ("os.symlink", "os.link", "os.fork", "os.forkpty")
MOVES = ("os.rename", "os.remove", "os.rmdir")
WATCHED = frozenset((*REFUSED, *MOVES))


def held() -> set[str]:
    """Return the files that this process has open or mapped."""
    names = set()
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            names.add(os.readlink(f"/proc/self/fd/{number}"))  # noqa: PTH115
        except OSError:
            continue
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    names.update(fields[5] for line in maps if len(fields := line.split(None, 5)) == 6)
    return {name for name in names if name.startswith("/") and not Path(name).is_dir()}


class Rules:
    """An audit hook. What it does itself is not looked at."""

    def __init__(self) -> None:
        self._looking = False

    def __call__(self, event: str, values: tuple[object, ...]) -> None:
        """Refuse what Windows would."""
        if event not in WATCHED or self._looking:
            return
        self._looking = True
        try:
            if event in REFUSED:
                raise PermissionError(f"Windows has no {event}{values}")
            folder = values[-1] if event != "os.rename" else -1
            root = Path(f"/proc/self/fd/{folder}").resolve() if folder != -1 else Path.cwd()
            paths = [root / os.fsdecode(one) for one in values[:2] if isinstance(one, str | bytes)]
            for path in paths:
                whole = str(path.parent.resolve() / path.name)
                # filelock has another class for Windows, which closes its file first.
                if event == "os.remove" and path.name.endswith(".lock"):
                    continue
                busy = [name for name in held() if name == whole or name.startswith(f"{whole}/")]
                if busy:
                    raise PermissionError(f"{event} of {whole}: {busy[0]} is used by this process")
        finally:
            self._looking = False


sys.modules.update(dict.fromkeys((*BLOCKED, *TESTS_ONLY)))  # type: ignore[arg-type]
for unix in UNIX_ONLY:
    vars(os).pop(unix, None)
warnings.filterwarnings("error", category=EncodingWarning, module="mpq_deploy")
sys.addaudithook(Rules())
os.environ["BLOCKED"] = "1"

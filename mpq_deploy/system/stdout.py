"""stdout is data: what libraries write to file descriptor 1 goes to stderr, only ``sys.stdout`` reaches it."""

from __future__ import annotations

import os
import sys


def claim_stdout() -> None:
    """Give ``sys.stdout`` a descriptor of its own (UTF-8), and point descriptor 1 at stderr.

    C libraries and child processes that print then write to stderr. For the start of a process;
    does nothing where somebody has replaced ``sys.stdout``, such as a test that captures it.
    """
    stream = sys.stdout
    if stream is not sys.__stdout__:
        return
    if not _is_open(2):
        # Whatever is opened next would get this number.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        if null != 2:
            os.close(null)
    if stream is not None:
        stream.flush()
        sys.stdout = os.fdopen(
            os.dup(1),
            "w",
            1 if stream.line_buffering else -1,
            encoding="utf-8",
            errors="backslashreplace",
        )
    elif _is_open(1):
        # The process began without stdout, and a file has got its number.
        return
    os.dup2(2, 1)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True

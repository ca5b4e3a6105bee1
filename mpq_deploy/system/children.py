"""Child processes: modules run by this Python that end with this process.

A child's stdin is a pipe that only this process holds open. It carries orders; when it closes, the
child ends. Standard library only: devices use it, too.
"""

from __future__ import annotations

import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

# Exit code of a child whose parent is gone.
ORPHANED = 5
# Before each frame: how many bytes it has.
FRAME = struct.Struct("<Q")


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs ``module`` with this Python."""
    return [sys.executable, "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """The environment of a child process that imports what this one does (the package may lie in a zip file)."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def apart() -> dict[str, Any]:
    """Return options of Popen for a child that Ctrl-C in the terminal does not reach."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def run_child(
    module: str, *arguments: str, seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``module`` to its end (see ``orders_from_parent``); return its exit code and output.

    Raises subprocess.TimeoutExpired when it takes longer than ``seconds``; it is killed then.
    """
    read, write = os.pipe()
    try:
        return subprocess.run(
            child_command(module, *arguments),
            stdin=read,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            env=child_environment(),
            timeout=seconds,
        )
    finally:
        os.close(read)
        os.close(write)


def orders_from_parent(
    read: Callable[[IO[bytes]], bytes] | None = None,
) -> queue.SimpleQueue[bytes]:
    """In a child: return the orders that come on stdin, and end this process when that closes.

    ``read`` reads one order, b"" at the end; None: there are none. Afterwards descriptor 0 reads
    nothing, here and in children of this process.
    """
    stream = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def watch() -> None:
        try:
            while order := read(stream) if read else stream.read(1):
                orders.put(order)
        finally:
            # Nobody waits for an answer any more, also when the parent was killed.
            os._exit(ORPHANED)

    threading.Thread(target=watch, daemon=True).start()
    return orders


def read_frame(stream: IO[bytes]) -> bytes:
    """Read what ``write_frame`` wrote; b"" at the end, also where that is in the middle of a frame."""
    head = stream.read(FRAME.size)
    if len(head) < FRAME.size:
        return b""
    (size,) = FRAME.unpack(head)
    content = stream.read(size)
    return content if len(content) == size else b""


def write_frame(stream: IO[bytes], content: bytes) -> None:
    """Write ``content``, which is not empty, for the other end of a pipe, at once."""
    stream.write(FRAME.pack(len(content)))
    stream.write(content)
    stream.flush()


def fate(code: int) -> str:
    """Say how a process ended, from its exit code, in words after "it"."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"

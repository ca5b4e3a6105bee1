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
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from mpq_deploy.errors import EngineError
from mpq_deploy.system.import_path import children_path

# Exit code of a child whose parent is gone.
ORPHANED = 5
# Most that a child may write to stdout or stderr, and to a log (our choice): a builder's verbose log
# of a large model has a hundred megabytes.
OUTPUT_BYTES, LOG_BYTES = 16 << 20, 2 << 30
LAST_BYTES_SECONDS = 5.0
# What `python -m` does, without the current folder on the import path (Python 3.10 has no -P).
START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import runpy; del sys.argv[0]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
# Before each frame: how many bytes it has.
FRAME = struct.Struct("<Q")


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs ``module`` with this Python, and imports nothing from its folder."""
    return [sys.executable, "-c", START, module, *arguments]


def child_environment() -> dict[str, str]:
    """The environment of a child process that imports what this one does (the package may lie in a zip file)."""
    return {**os.environ, "PYTHONPATH": children_path()}


def apart() -> dict[str, Any]:
    """Return options of Popen for a child that Ctrl-C in the terminal does not reach."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def run_child(
    module: str, *arguments: str, seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``module`` to its end (see ``orders_from_parent``); return its exit code and output.

    Raises subprocess.TimeoutExpired when it takes longer than ``seconds``, and EngineError when it
    writes more than ``OUTPUT_BYTES``; it is killed then.
    """
    read, write = os.pipe()
    try:
        command = child_command(module, *arguments)
        return run_bounded(command, seconds=seconds, stdin=read, env=child_environment())
    finally:
        os.close(read)
        os.close(write)


def run_bounded(
    command: Sequence[str],
    *,
    seconds: float | None,
    stdin: int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    log: IO[bytes] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` to its end; return its exit code and what it wrote, as text.

    ``log`` gets both streams instead, up to ``LOG_BYTES``. Raises subprocess.TimeoutExpired when it
    takes longer than ``seconds``, EngineError when it writes more than ``OUTPUT_BYTES`` to a
    stream; it is killed then.
    """
    pipe, joined = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(
        command, stdin=stdin, stdout=pipe, stderr=joined if log else pipe, env=env
    )
    streams = [
        Collected(process, stream, log) for stream in (process.stdout, process.stderr) if stream
    ]
    try:
        code = process.wait(seconds)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        for stream in streams:
            stream.end()
    if any(stream.full for stream in streams):
        limit = LOG_BYTES if log else OUTPUT_BYTES
        raise EngineError(f"{command[0]} wrote more than {limit:,} bytes, and was stopped.")
    if any(stream.failed for stream in streams):
        raise next(stream.failed for stream in streams if stream.failed)
    out, errors = ([stream.text() for stream in streams] + [""])[:2]
    return subprocess.CompletedProcess(list(command), code, out, errors)


class Collected:
    """Reads one stream of ``process`` to its end, at most up to the limit; then the process is killed."""

    def __init__(
        self, process: subprocess.Popen[bytes], stream: IO[bytes], log: IO[bytes] | None = None
    ) -> None:
        self.full, self._content = False, bytearray()
        self.failed: OSError | None = None
        self._process, self._stream, self._log = process, stream, log
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        left = LOG_BYTES if self._log else OUTPUT_BYTES
        try:
            # Pieces as they come: a log is read while it grows.
            while piece := self._stream.read1(1 << 16):  # type: ignore[attr-defined]
                left -= len(piece)
                if left < 0:
                    self.full = True
                    self._process.kill()
                    return
                if self._log:
                    self._log.write(piece)
                    self._log.flush()
                else:
                    self._content += piece
        except (OSError, ValueError) as error:
            # A full disk; or the stream was closed, since a process that outlives ours holds it.
            self.failed = error if isinstance(error, OSError) else None
            self._process.kill()

    def end(self) -> None:
        """Wait for the last bytes; not for processes that our child has left behind."""
        self._thread.join(LAST_BYTES_SECONDS)
        if not self._thread.is_alive():
            self._stream.close()

    def text(self) -> str:
        """What was read, as text."""
        return self._content.decode("utf-8", "replace").replace("\r\n", "\n")


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
    return f"exited with code {code}"

"""Workers forked from a server that has their imports, in the suite's own process tree.

A worker's imports take seconds, its work on a tiny model milliseconds. The forked one runs the same
module over the same pipes, in a session, folder and environment of its own; what starting a Python
adds is tested in tests/system.
"""

from __future__ import annotations

import atexit
import os
import pickle
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpq_deploy.system.children import child_command, child_environment
from mpq_deploy.system.parallel.processes import start_process

IMPORTED = (
    *("mpq_deploy.system.parallel.child", "mpq_deploy.sensitivity.probe"),
    *("mpq_deploy.evaluate.evaluate", "mpq_deploy.rounding.rounder", "mpq_deploy.runtime.ort"),
    *("mpq_deploy.calibrate.calibrate", "mpq_deploy.rounding.salient_rows"),
)
# stdin, stdout and stderr of the worker, and where the server says how it ended.
DESCRIPTORS = 4
STARTED: list[Forked] = []


class Forked:
    """What ``subprocess.Popen`` is for a worker: its pipes, and how it ends."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        orders, answers, ends = os.pipe(), os.pipe(), os.pipe()
        given = (orders[0], answers[1], 2, ends[1])
        asked = pickle.dumps((module, str(Path.cwd()), environment))
        server = _server()
        socket.send_fds(server, [len(asked).to_bytes(8, "little")], list(given))
        server.sendall(asked)
        self.pid = int.from_bytes(_received(server, 8), "little")
        for descriptor in (orders[0], answers[1], ends[1]):
            os.close(descriptor)
        self.stdin, self.stdout = os.fdopen(orders[1], "wb"), os.fdopen(answers[0], "rb")
        self.returncode: int | None = None
        self._ends = os.fdopen(ends[0], "rb")

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal; raises as Popen's does."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._ends, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a forked worker", timeout or 0)
            self.returncode = int(self._ends.read())
            self._ends.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def start_worker(environment: dict[str, str]) -> Any:
    """Start a worker as ``processes.start_process`` does; forked if it has one thread, as the server has."""
    if environment.get("OMP_NUM_THREADS") != "1":
        return start_process(environment)
    worker = Forked("mpq_deploy.system.parallel.child", environment)
    STARTED.append(worker)
    return worker


def living_workers() -> list[int]:
    """The forked workers of this process that have not ended."""
    return [one.pid for one in STARTED if one.poll() is None]


_SERVERS: dict[int, socket.socket] = {}


def _server() -> socket.socket:
    """The connection to this process's server, which is started first."""
    if os.getpid() not in _SERVERS:
        ours, its = socket.socketpair()
        command = child_command(__name__, str(its.fileno()))
        process = subprocess.Popen(command, pass_fds=[its.fileno()], env=child_environment())
        its.close()
        _SERVERS[os.getpid()] = ours
        atexit.register(process.wait)
        atexit.register(ours.close)
    return _SERVERS[os.getpid()]


def _received(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        piece = connection.recv(size - len(content))
        if not piece:
            raise EOFError("The server of forked workers is gone.")
        content += piece
    return content


def serve(connection: socket.socket) -> None:
    """Fork workers as asked for, and say how each ended, until the connection closes."""
    ends: dict[int, int] = {}
    wakes, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        selector.register(wakes, selectors.EVENT_READ)
        while True:
            ready = [key.fd for key, _ in selector.select()]
            if wakes in ready:
                os.read(wakes, 4096)
                _tell(ends)
            if connection.fileno() in ready:
                head, descriptors, *_ = socket.recv_fds(connection, 8, DESCRIPTORS)
                if not head:
                    return
                asked = pickle.loads(_received(connection, int.from_bytes(head, "little")))
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for one in (connection.detach(), wakes, woken, *ends.values()):
                        os.close(one)
                    _work(descriptors, *asked)
                for one in descriptors[:-1]:
                    os.close(one)
                ends[pid] = descriptors[-1]
                connection.sendall(pid.to_bytes(8, "little"))


def _tell(ends: dict[int, int]) -> None:
    """Say how each worker ended that has."""
    for pid in list(ends):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            end = ends.pop(pid)
            os.write(end, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(end)


def _work(descriptors: list[int], module: str, folder: str, environment: dict[str, str]) -> None:
    """In the forked process: be a worker to its end."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, one in enumerate(descriptors[:-1]):
        os.dup2(one, number)
        os.close(one)
    os.close(descriptors[-1])
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = [module]
    code = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        if code:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    for name in IMPORTED:
        __import__(name)
    serve(socket.socket(fileno=int(sys.argv[1])))

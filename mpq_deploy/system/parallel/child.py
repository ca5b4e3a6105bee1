"""A worker process: opens a job once, then computes shards one after the other, then the next job.

Orders come on stdin, answers go to stdout, both pickled; what it prints goes to stderr. When the
process that started it ends, however that ends, so does this one.

Orders: ("open", opener, root), ("run", number, task), ("close",), None (end). Answers: ("line" or "warn",
text), ("steps", number, steps), ("done", number, arrays), ("failed", number or None, error).
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

from mpq_deploy.errors import DiskError, MpqError
from mpq_deploy.system.children import ORPHANED, orders_from_parent, read_frame, write_frame
from mpq_deploy.system.compute import compute_on, computing_on
from mpq_deploy.system.files import disk_error
from mpq_deploy.system.libraries import start_lightly
from mpq_deploy.system.parallel.work import TRACEBACK, Result, ShardError, Within, Work, stepper
from mpq_deploy.system.stdout import claim_stdout


class Worker:
    """Answers orders through ``send``, which takes one tuple."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self._work: Work | None = None
        self._root = Path()

    def obey(self, order: tuple[Any, ...]) -> None:
        """Do what ``order`` says; an error becomes an answer."""
        number = order[1] if order[0] == "run" else None
        try:
            if order[0] == "open":
                self._root = order[2]
                self._work = order[1](order[2], self._talk(None))
            elif order[0] == "close":
                self._work = None
                # Sessions and modules are in cycles; nothing of a job is held while waiting for the next.
                gc.collect()
            else:
                self._send(("done", number, self._run(order[1], order[2])))
        except Exception as error:
            self._send(("failed", number, sendable(error, self._root)))

    def _run(self, number: int, task: Any) -> Result:
        if self._work is None:
            raise ShardError(
                "A worker was given a shard before its job.", "This is a bug: please report it."
            )
        return self._work(task, self._talk(number))

    def _talk(self, number: int | None) -> Within:
        def progress(index: int, steps: int) -> None:
            if number is not None:
                self._send(("steps", index, steps))

        return Within(
            lambda text: self._send(("line", text)),
            lambda text: self._send(("warn", text)),
            stepper(progress, number or 0),
        )


def sendable(error: Exception, root: Path) -> MpqError:
    """Return ``error`` itself where it is ours, else what it was: a DiskError about ``root``, or a ShardError."""
    if isinstance(error, MpqError):
        return error
    if isinstance(error, OSError) and isinstance(found := disk_error(error, root), DiskError):
        return found
    failed = ShardError(
        f"A worker failed: {type(error).__name__}: {error}.", "Run with --debug to see where."
    )
    failed.__dict__[TRACEBACK] = "\n" + "".join(
        traceback.format_exception(type(error), error, error.__traceback__)
    )
    return failed


def main() -> None:
    """Obey until the order to end comes, or the starter is gone."""
    orders = orders_from_parent(read_frame)
    claim_stdout()
    start_lightly()
    # Descriptor 1 is stderr from here on; print goes there, too.
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(lambda answer: write_frame(answers.buffer, pickle.dumps(answer)))
    try:
        # Where the starter computes, as exactly as there.
        with compute_on(computing_on()):
            # Only what our parent wrote: pickles can run code.
            while (order := pickle.loads(orders.get())) is not None:  # noqa: S301
                worker.obey(order)
    except BrokenPipeError:
        os._exit(ORPHANED)


if __name__ == "__main__":
    main()

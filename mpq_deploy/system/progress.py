"""Where stages report progress: silent, plain lines (CI), or live bars (terminal). Talk goes to stderr only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from mpq_deploy.system.names import printable

Advance = Callable[[int], None]

# Control characters that texts of ours hold; those of names are shown as escapes.
LINE_ENDS = "\n\t"


class Talk:
    """The silent one, and the interface of the others.

    ``ahead``: gives what is left of a whole build, in words, while there is one.
    """

    ahead: Callable[[], str] | None = None

    def left(self) -> str:
        """Return what is left of a whole build, in words; empty where that is not known."""
        return self.ahead() if self.ahead else ""

    def line(self, text: str) -> None:
        """Say one line."""

    def warn(self, text: str) -> None:
        """Say one line that the user should not miss."""

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """Show progress of ``total`` equal steps; the yielded function moves it on by n steps."""
        yield lambda steps: None


class PlainTalk(Talk):
    """One line per event, for logs: a bar becomes a line at its start and one at its end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def line(self, text: str) -> None:
        """Write the line."""
        self._stream.write(printable(text, LINE_ENDS) + "\n")
        self._stream.flush()

    def warn(self, text: str) -> None:
        """Write the line, marked."""
        self.line(f"warning: {text}")

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """Write one line when the work is done."""
        started = time.monotonic()
        yield lambda steps: None
        taken = f"  {what}: {total} in {time.monotonic() - started:.1f} s"
        self.line(", ".join(filter(None, (taken, self.left()))))


class WarningTalk(PlainTalk):
    """Warnings alone: who wants no progress still learns what to look at."""

    def line(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Write the line, marked."""
        super().line(f"warning: {text}")

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """Show nothing."""
        yield lambda steps: None


class RichTalk(Talk):
    """Live bars with the rate and the time left, on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def line(self, text: str) -> None:
        """Write the line."""
        self._console.print(printable(text, LINE_ENDS), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Write the line, marked."""
        text = f"warning: {printable(text, LINE_ENDS)}"
        self._console.print(text, style="yellow", markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """Draw the bar while the block runs."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(printable(what), total=total, rate="", left=self.left())
            started = time.monotonic()

            def advance(steps: int) -> None:
                progress.advance(task, steps)
                done = progress.tasks[0].completed
                rate = f"{done / max(time.monotonic() - started, 1e-6):.1f}/s"
                progress.update(task, rate=rate, left=self.left())

            yield advance

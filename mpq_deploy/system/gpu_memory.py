"""The memory of torch's GPU: what is free, and what is done where it runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from mpq_deploy.system.compute import (
    CPU,
    compute_on,
    computing_on,
    free_cached_memory,
    out_of_memory,
)
from mpq_deploy.system.progress import Talk

Opened = TypeVar("Opened")
Piece = TypeVar("Piece")
Done = TypeVar("Done")


def free_bytes(device: Any) -> int | None:
    """Return what torch may still take of the memory of a GPU, its ``device``; None on the CPU."""
    if device.type == CPU:
        return None
    import torch

    # What torch has taken and holds no tensor is free for it alone.
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + held)


class Shrinking(Generic[Opened]):
    """Work in smaller pieces where the GPU's memory runs out, then on the CPU; both are said.

    ``what`` it is, for people. ``open`` makes what it is done with, where the process computes then.
    """

    def __init__(self, open: Callable[[], Opened], what: str, talk: Talk) -> None:
        self._open, self._what, self._talk = open, what, talk
        self._place, self._halvings = computing_on(), 0
        self._opened: Opened | None = None

    def run(
        self,
        piece: Piece,
        halve: Callable[[Piece], Sequence[Piece]],
        work: Callable[[Opened, Piece], Done],
    ) -> list[Done]:
        """Return what ``work`` makes of ``piece``, or of what ``halve`` makes of it (nothing: it is one).

        Later pieces are halved as often from the start.
        """
        pieces = [piece]
        for _ in range(self._halvings):
            pieces = _halved(pieces, halve)
        done = list[Done]()
        while pieces:
            try:
                with compute_on(self._place):
                    if self._opened is None:
                        self._opened = self._open()
                    done.append(work(self._opened, pieces[0]))
                del pieces[0]
                continue
            except Exception as error:
                if self._place.torch is None or not out_of_memory(error):
                    raise
            # Outside of the handler: the error holds what the work had made.
            if halve(pieces[0]):
                self._halvings, pieces = self._halvings + 1, _halved(pieces, halve)
                then = "the batch is halved"
            else:
                self._place, self._opened = replace(self._place, torch=None), None
                then = "the rest runs on the CPU"
            self._talk.line(f"  {self._what}: the GPU's memory ran out, {then}")
            free_cached_memory()
        return done


def _halved(pieces: list[Piece], halve: Callable[[Piece], Sequence[Piece]]) -> list[Piece]:
    return [part for one in pieces for part in halve(one) or [one]]

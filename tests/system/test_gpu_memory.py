"""Work where a GPU's memory runs out: halves, remembered, then the CPU; and which errors say so."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from mpq_deploy.system.compute import Compute, compute_on, computing_on, out_of_memory
from mpq_deploy.system.gpu_memory import Shrinking
from mpq_deploy.system.progress import Talk

pytestmark = pytest.mark.torch
FULL = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.6 GiB."


class Said(Talk):
    def __init__(self) -> None:
        self.lines = list[str]()

    def line(self, text: str) -> None:
        self.lines.append(text)


def halves(piece: range) -> list[range]:
    middle = len(piece) // 2
    return [piece[:middle], piece[middle:]] if middle else []


@pytest.mark.parametrize(("fits", "sizes"), [(8, [8, 8]), (3, [2] * 8), (0, [1] * 16)])
def test_pieces_are_halved_until_they_fit(fits: int, sizes: list[int]) -> None:
    talk, opened, tried = Said(), list[Compute](), list[int]()

    def open_here() -> Compute:
        opened.append(computing_on())
        return opened[-1]

    def work(place: Compute, piece: range) -> list[int]:
        assert place == computing_on()
        tried.append(len(piece))
        if place.torch is not None and len(piece) > fits:
            raise RuntimeError(FULL)
        return list(piece)

    with compute_on(Compute(None, 0)):
        shrinking = Shrinking(open_here, "work", talk)
        done = [shrinking.run(range(start, start + 8), halves, work) for start in (0, 8)]
    parts = [part for one in done for part in one]
    assert [len(part) for part in parts] == sizes
    assert [number for part in parts for number in part] == list(range(16))
    # What did not fit is not tried again.
    assert tried.count(8) == (2 if fits == 8 else 1)
    assert opened == [Compute(None, 0)] + [Compute()] * (fits == 0)
    assert len(talk.lines) == {8: 0, 3: 2, 0: 4}[fits]
    assert (fits > 0) == (not talk.lines or "the rest runs on the CPU" not in talk.lines[-1])


def test_other_errors_and_the_cpu_s_pass() -> None:
    def work(_: None, error: Exception) -> None:
        raise error

    with compute_on(Compute(None, 0)), pytest.raises(RuntimeError, match="mat1"):
        Shrinking(lambda: None, "work", Talk()).run(RuntimeError("mat1"), lambda _: [], work)
    with compute_on(Compute()), pytest.raises(MemoryError):
        Shrinking(lambda: None, "work", Talk()).run(MemoryError(FULL), lambda _: [], work)


@pytest.mark.parametrize(
    ("said", "ran_out"),
    [
        (FULL, True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", False),
    ],
)
def test_what_says_that_a_gpu_has_no_memory(said: str, ran_out: bool) -> None:
    assert out_of_memory(RuntimeError(said)) == ran_out

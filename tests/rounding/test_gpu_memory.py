"""A layer that the GPU has no memory for: fewer forms at once, then the CPU, and both are said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mpq_deploy.graph.layers import Layer
from mpq_deploy.recipe import QuantizeSettings
from mpq_deploy.rounding.hessian import Hessian
from mpq_deploy.rounding.quantizers import Rounding
from mpq_deploy.rounding.rounder import FEWER, Rounder
from mpq_deploy.system.compute import Compute, compute_on, computing_on
from mpq_deploy.system.progress import Talk
from tests.rounding.layers_to_round import layer_to_round

torch = pytest.importorskip("torch")
LAYER, _, INPUTS = layer_to_round(Layer("fc", "Gemm", "w", (40, 64), 0, 1, ()), (64,), 2)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Said(Talk):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def candidates(monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> tuple[Any, Said]:
    """Round, each of ``errors`` ending an attempt; return (device, rows) of each attempt, and what was said."""
    attempts: list[tuple[int | None, int]] = []

    def rounded(self: Rounder, moments: Hessian, how: Rounding) -> None:
        attempts.append((computing_on().torch, how.rows))
        if len(attempts) <= len(errors):
            raise errors[len(attempts) - 1]

    monkeypatch.setattr(Rounder, "_rounded", rounded)
    monkeypatch.setattr(Compute, "torch_device", lambda self: torch.device("cpu"))
    recipe: Any = SimpleNamespace(quantize=QuantizeSettings())
    parts: Any = SimpleNamespace()
    said = Said()
    rounder = Rounder(parts, recipe, parts, parts, {}, parts, said)
    with compute_on(Compute(None, 0)):
        rounder._candidates(Hessian(LAYER, INPUTS.blocks, (64,), 100))
        assert computing_on().torch == 0
    return attempts, said


def test_fewer_forms_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, said = candidates(monkeypatch, [OUT_OF_MEMORY, OUT_OF_MEMORY])
    rows = attempts[0][1]
    assert attempts == [(0, rows), (0, rows // FEWER), (None, Rounding(True, 0.05).rows)]
    assert ["fewer forms" in said.lines[0], "on the CPU" in said.lines[1]] == [True, True]
    assert all(LAYER.name in line for line in said.lines)


def test_nothing_is_said_where_memory_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts, said = candidates(monkeypatch, [])
    assert len(attempts) == 1 and said.lines == []


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="of its own"):
        candidates(monkeypatch, [ValueError("an error of its own")])

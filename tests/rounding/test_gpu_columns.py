"""Rounding with torch's tensors against NumPy's arrays: equal but for last digits, and nothing waits for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mpq_deploy.formats.candidates import Choices, LayerCandidates, round_candidates
from mpq_deploy.formats.fp8 import E4M3Matrix, RequantizedMatrix
from mpq_deploy.formats.interfaces import INT4, INT8
from mpq_deploy.formats.minifloat import E2M1, E4M3, Minifloat
from mpq_deploy.formats.nvfp4 import Nvfp4Matrix
from mpq_deploy.formats.scheme import FP16, SCHEMES
from mpq_deploy.graph.layers import Layer
from mpq_deploy.rounding.arrays import TorchNames, cast
from mpq_deploy.rounding.float_levels import round_levels
from mpq_deploy.rounding.quantizers import (
    Grid,
    Rounding,
    choose_multiple_scale,
    choose_scale,
    gptq_codes,
    refine_rounding,
)
from mpq_deploy.rounding.row_grids import RowForm, round_forms
from mpq_deploy.system.compute import Compute, compute_on
from tests.rounding.layers_to_round import hessian_error, layer_to_round

torch = pytest.importorskip("torch")
gpu_columns = pytest.importorskip("mpq_deploy.rounding.gpu_columns")

from tests.fake_gpu import FakeGpu  # noqa: E402

LAYERS = {
    "conv": layer_to_round(Layer("conv", "Conv", "w", (24, 16, 3, 3), 0, 1, ()), (144,), 1),
    "product": layer_to_round(Layer("fc", "Gemm", "w", (40, 320), 0, 1, ()), (256, 64), 2),
    "groups": layer_to_round(Layer("dw", "Conv", "w", (16, 8, 3, 3), 0, 4, ()), (72,), 3),
}
HOW = Rounding(True, 0.05, 2)


@pytest.fixture
def torch_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors lie on the CPU where they would lie on a GPU."""
    monkeypatch.setattr(Compute, "torch_device", lambda self: torch.device("cpu"))
    with compute_on(Compute(None, 0)):
        yield


def rounded(name: str, how: Rounding) -> LayerCandidates:
    layer, weight, inputs = LAYERS[name]
    schemes = [s for s in SCHEMES.values() if s.quantized and not s.refusal(layer)]
    schemes = [s for s in schemes if layer.group == 1 or not s.branch]
    return round_candidates(layer, Choices((FP16, *schemes), {}), weight, inputs, how)


@pytest.fixture(scope="module")
def by_numpy() -> dict[str, LayerCandidates]:
    return {name: rounded(name, HOW) for name in LAYERS}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [HOW.rows, 1], ids=["side by side", "one form at a time"])
def test_every_form_has_the_codes_and_the_error_that_numpy_gives_it(
    name: str, rows: int, by_numpy: dict[str, LayerCandidates], torch_on_cpu: None
) -> None:
    found, expected = rounded(name, Rounding(True, 0.05, 2, rows)), by_numpy[name]
    assert len(expected.forms) > 20
    for form, wanted in expected.forms.items():
        arrays, others = found.forms[form].arrays(), wanted.arrays()
        assert {n: (a.dtype, a.shape) for n, a in arrays.items()} == {
            n: (a.dtype, a.shape) for n, a in others.items()
        }
        for part in (n for n in arrays if n.rpartition(".")[2] in ("codes", "levels")):
            assert np.mean(arrays[part] != others[part]) < 0.01, (form, part)
        errors = [
            hessian_error(LAYERS[name], c.forms[form].dequantize()) for c in (found, expected)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=1e-4), form


@pytest.mark.parametrize("kind", [E4M3, E2M1], ids=lambda kind: kind.name)
def test_tensors_are_encoded_as_arrays_are(kind: Minifloat) -> None:
    values = np.sort(kind.values[np.isfinite(kind.values)])
    halfway = (values[1:] + values[:-1]) / 2
    ends = [np.nextafter(halfway, np.float32(to)) for to in (-np.inf, np.inf)]
    random = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * kind.largest / 2
    x = np.concatenate([values, halfway, *ends, random, [np.float32(1e9), np.float32(-1e-9)]])
    codes = kind.encode(torch.from_numpy(x))
    np.testing.assert_array_equal(codes.numpy(), kind.encode(x))
    np.testing.assert_array_equal(kind.decode(codes).numpy(), kind.decode(kind.encode(x)))
    nearest = kind.nearest(torch.from_numpy(x), TorchNames(torch.device("cpu")))
    np.testing.assert_array_equal(nearest.numpy(), kind.nearest(x, np))


def placeless(*shape: int, dtype: Any = None) -> Any:
    """Return a tensor that has a shape, a type and a device, and no numbers."""
    return torch.empty(shape, dtype=dtype or torch.float32, device="meta")


def test_nothing_is_fetched_from_the_gpu_and_no_devices_are_mixed() -> None:
    weight, block, rest = placeless(20, 160), placeless(128, 128), placeless(32, 32)
    xp = TorchNames(weight.device)
    importance = placeless(160)
    with FakeGpu() as gpu:
        scale = choose_scale(weight, importance, 5, INT4)
        multiples, channel = choose_multiple_scale(weight, importance, scale)
        columns = xp.arange(160) // 32
        step = cast(scale, np.float32)
        cut = [Grid(step, columns, -8, 7).cut(slice(0, 128))]
        cut.append(Grid(step[:, :1], xp.zeros(128, np.int64), INT8.quant_min, INT8.quant_max))
        codes = gptq_codes(weight[:, :128], cut, block, 0.05)
        assert [code.shape for code in codes] == [(20, 128)] * 2
        started = [(placeless(20, 160, dtype=torch.int8), scale)] * 2
        order = refine_rounding(weight, started, [block, rest], 0.05, 1, 5)
        assert order[0][0].dtype == torch.int8 and order[0][1].dtype == torch.float16
        empty = xp.zeros(weight.shape, np.uint8)
        blocks = xp.zeros((20, 10), np.uint8)
        grids = {
            "e4m3": E4M3Matrix(empty, scale[:, 0]),
            "nvfp4": Nvfp4Matrix(empty, blocks, np.asarray(1.0, np.float16)),
            "w4f8": RequantizedMatrix(xp.zeros(weight.shape, np.int8), multiples, channel),
        }
        levels = round_levels(weight, grids, [block, rest], HOW)
        assert {m.codes.device.type for m in levels.values()} == {"meta"}
        forms = (RowForm(2), RowForm(0, 1), RowForm(8))
        simulated = round_forms(weight, forms, [block, rest], HOW)
        assert {m.codes.shape for m in simulated.values()} == {(20, 160)}
    assert gpu.fetched == 0


def test_replaying_a_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's graphs, which does the recorded pass on the tensors of the record."""

    class Graph:
        replays = 0

        def __init__(self, work: Any, changed: list, read: list) -> None:
            self._pass = work, changed, read

        def replay(self) -> None:
            work, changed, read = self._pass
            work(changed, read)
            Graph.replays += 1

    def record(self: gpu_columns.Replayed, given: Any, changed: int) -> tuple[Graph, list]:
        # What lies in them when they are recorded is nothing of the pass's.
        own = [torch.full_like(tensor, 7) for tensor in given]
        return Graph(self._work, own[:changed], own[changed:]), own

    _, weight, inputs = LAYERS["product"]
    tensors = torch.from_numpy(weight), [torch.from_numpy(inputs.blocks[0])]
    grid = RequantizedMatrix(
        torch.zeros((40, 256), dtype=torch.int8),
        torch.full((40, 8), 0.03125, dtype=torch.float16),
        torch.full((40,), 0.015625, dtype=torch.float16),
    )

    def made() -> list[Any]:
        rounded = round_levels(tensors[0][:, :256], {"w4f8": grid}, tensors[1], HOW)
        steps = torch.full((40, 1), 0.05), torch.zeros(256, dtype=torch.int64)
        codes = gptq_codes(tensors[0][:, :256], [Grid(*steps, -8, 7)] * 2, tensors[1][0], 0.05)
        start = [(codes[0], torch.full((40, 8), 0.05, dtype=torch.float16))]
        refined = refine_rounding(tensors[0][:, :256], start, tensors[1], 0.05, 3)
        return [rounded["w4f8"].codes, *codes, *refined[0]]

    expected = made()
    monkeypatch.setattr(gpu_columns, "PLAIN_PASSES", 0)
    monkeypatch.setattr(gpu_columns, "_records", lambda device: True)
    monkeypatch.setattr(gpu_columns.Replayed, "_record", record)
    for found, wanted in zip(made(), expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted.numpy())
    assert Graph.replays > 20

"""A format that the package does not know, in this one file, goes from the recipe to the graph that runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.branches.rows import Rows
from mpq_deploy.formats.interfaces import Rounder, Scheme, WeightFormat
from mpq_deploy.formats.layer_rounding import LayerRounding
from mpq_deploy.formats.scheme import SCHEMES, register, schemes_named
from mpq_deploy.graph.layers import Layer, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED
from mpq_deploy.runtime.ort import make_session
from tests.pipeline.runs import build, recipe_for, save_denoiser

LEVELS = 31
# Outputs this wide stay in FP16.
FEWEST_CHANNELS = 8
TARGET = """
extends: rtx
name: mine
schemes: {Conv: [fp16, w6p], Gemm: [fp16, w6p], MatMul: [fp16]}
rules:
  - {families: [w8a8, w8a16, w4a16, w4a8], reason: "the device knows powers of two alone"}
"""


# --- the format: what a file in formats/ would hold -------------------------------------------------------------


@dataclass(frozen=True)
class PowerMatrix:
    """Codes int8 [O, K] times 2 ** ``exponents`` int8 [O]."""

    codes: np.ndarray
    exponents: np.ndarray

    def dequantize(self) -> np.ndarray:
        return np.ldexp(self.codes.astype(np.float32), self.exponents[:, None].astype(np.int32))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"codes": self.codes, "exponents": self.exponents}


@dataclass(frozen=True)
class PowerWeight(WeightFormat):
    """Six bits, in bytes, and a power of two per output channel."""

    bits = 6
    engine_types = ("Int8",)

    @property
    def form(self) -> str:
        return "power6"

    def refusal(self, layer: Layer) -> str:
        return (
            f"it has {layer.out_channels} channels" if layer.out_channels < FEWEST_CHANNELS else ""
        )

    def bytes_of(self, layer: Layer) -> int:
        return layer.weights + 2 * layer.out_channels

    @property
    def rounder(self) -> Rounder:
        return round_powers

    def read(self, arrays: Mapping[str, np.ndarray]) -> PowerMatrix:
        return PowerMatrix(arrays["codes"], arrays["exponents"])

    def write(self, to: Any, matrix: PowerMatrix) -> Any:
        scale = np.ldexp(np.float32(1), matrix.exponents.astype(np.int32))
        inputs = [
            to.codes(lambda: to.folded(matrix.codes), "INT8", to.layer.weight_shape),
            to.constant("scale", scale),
        ]
        return to.insert(
            "DequantizeLinear", inputs, {"axis": to.layer.out_axis}, "weight_dequantize"
        )


def round_powers(schemes: Sequence[Scheme], layer: LayerRounding) -> dict[str, Any]:
    amax = np.maximum(np.abs(layer.weight).max(axis=1), 1e-3)
    exponents = np.ceil(np.log2(amax / LEVELS)).astype(np.int8)
    codes = np.rint(np.ldexp(layer.weight, -exponents[:, None].astype(np.int32)))
    return {schemes[0].weight_form: PowerMatrix(codes.astype(np.int8), exponents)}


POWER = Scheme("w6p", PowerWeight(), meaning="6-bit weights times powers of two, FP16 arithmetic")

# --- the tests --------------------------------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[None]:
    register([POWER])
    yield
    del SCHEMES[POWER.name]


def test_a_made_up_format_goes_from_the_recipe_to_the_graph(
    registered: None, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(TARGET, encoding="utf-8")
    model, run = save_denoiser(tmp_path), tmp_path / "run"
    allocate = {"allocate__schemes": [POWER.name], "allocate__branches": []}
    build(
        recipe_for(model, budget=0.6, target=str(tmp_path / "mine.yaml"), **allocate),
        run,
        "quantize",
    )

    plan = json.loads((run / "allocate" / "plan.json").read_text(encoding="utf-8"))
    taken = {name for name, scheme in plan["schemes"].items() if scheme == POWER.name}
    rows = {row["name"]: row for row in plan["layers"]}
    exported = onnx.load(run / "export" / "model.onnx")
    layers = {
        layer.name: layer for layer in layer_graph(load_model(run / "export" / "model.onnx")).layers
    }
    assert taken
    assert any("channels" in row["refused"].get(POWER.name, "") for row in rows.values())
    assert constant_bytes(run / "quantize" / DEPLOYED) == plan["size_bytes"] <= plan["budget_bytes"]

    # The float model with weights rounded here, by plain arithmetic.
    for tensor in exported.graph.initializer:
        layer = next((layer for layer in layers.values() if layer.weight == tensor.name), None)
        if layer is not None and layer.name in taken:
            weight = onnx.numpy_helper.to_array(tensor)
            others = tuple(axis for axis in range(weight.ndim) if axis != layer.out_axis)
            step = 2 ** np.ceil(np.log2(np.abs(weight).max(axis=others, keepdims=True) / LEVELS))
            rounded = (np.rint(weight / step) * step).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))
    onnx.save(exported, tmp_path / "reference.onnx")
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((2, 3, 8, 8)).astype(np.float32),
        "timestep": np.array([5, 900], np.float32),
    }
    found, expected = (
        make_session(path, 1).run(None, feeds)[0]
        for path in (run / "quantize" / SIMULATED, tmp_path / "reference.onnx")
    )
    # Biases and the other layers' weights are in FP16.
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


def test_branches_that_suit_stand_beside_it_and_names_are_taken_once(registered: None) -> None:
    assert [scheme.name for scheme in schemes_named(["w6p"])] == ["w6p"]
    assert not Rows(1).suits(POWER)
    with pytest.raises(ValueError, match="'w6p' already"):
        register([POWER])


def test_a_target_that_does_not_list_it_refuses_it(registered: None) -> None:
    layer = Layer("fc", "Gemm", "fc.weight", (16, 16), 0, 1, ())
    assert "does not list w6p; nearest: w8a16" in load_target("rtx").refusal(layer, POWER)


def test_nobody_knows_it_before(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Unknown scheme 'w6p'"):
        schemes_named(["w6p"])
    (tmp_path / "mine.yaml").write_text(TARGET, encoding="utf-8")
    with pytest.raises(UsageError, match="unknown scheme family 'w6p'"):
        load_target(tmp_path / "mine.yaml")

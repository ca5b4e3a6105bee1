"""Why a budget is infeasible: whose bytes they are, and what would lift them."""

from __future__ import annotations

import pytest

from mpq_deploy.allocate.floor import floor_causes, floor_text
from mpq_deploy.allocate.problem import LayerChoice
from mpq_deploy.engine.target import load_target
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.census import Census, NoLayers
from mpq_deploy.graph.layers import Layer

JETSON = load_target("jetson-orin-nano")


def conv(name: str, **more: object) -> Layer:
    return Layer(name, "Conv", f"{name}.weight", (64, 64, 3, 3), 0, 1, (), **more)  # type: ignore[arg-type]


def choice(layer: Layer, *schemes: str) -> LayerChoice:
    sizes = {name: SCHEMES[name].weight_bytes(layer) for name in schemes}
    return LayerChoice(layer.name, (), sizes, dict.fromkeys(schemes, 0.0), {}, {})


def test_every_byte_beyond_four_bits_has_a_reason() -> None:
    grouped = conv("grouped", no_product="it has 2 groups; a product has only one")
    layers = [conv("conv_in"), grouped, conv("small"), conv("chosen")]
    choices = [
        choice(layers[0], "fp16"),
        choice(layers[1], "fp16", "w8a8"),
        choice(layers[2], "fp16", "w4a16-b128"),
        choice(layers[3], "fp16"),
    ]
    why = JETSON.refusal(grouped, SCHEMES["w4a16-b128"])
    refused = {"conv_in": {}, "grouped": {"w4a16-b128": why}, "small": {}, "chosen": {}}
    rules = ([("conv_in", ("fp16",))], [("chosen", ("fp16",))])
    causes = floor_causes(layers, choices, refused, rules, JETSON)
    assert [cause.layers for cause in causes] == [("conv_in",), ("chosen",), ("grouped",)]
    assert "protected by the target" in causes[0].reason
    assert "protected by the recipe" in causes[1].reason
    assert "2 groups" in causes[2].reason and "nearest" not in causes[2].reason
    assert causes[2].lift.startswith("--target rtx, which takes it, or a device that shows it")
    smallest = sum(min(one.bytes.values()) for one in choices) + 1000
    others = (NoLayers("have a weight that the graph computes at run time", 2, 4_000_000),)
    census = Census(4, 294_912, others)
    text = floor_text(causes, smallest, 1000, 4 * 2 * 64 * 576, census)
    assert "4 of 6 Conv, Gemm and MatMul are layers" in text and "at run time (4.00 MB)" in text
    shares = [float(word) for word in text.split() if word.startswith("0.")]
    assert sum(shares) == pytest.approx(smallest / (4 * 2 * 64 * 576), abs=3e-4)
    assert (
        "grouped take beyond 4 bits" in text
        and "mpq-deploy probe --target jetson-orin-nano" in text
    )


def test_a_recipe_that_leaves_schemes_out_is_told_so() -> None:
    layer = conv("a", window=None)
    causes = floor_causes([layer], [choice(layer, "fp16")], {"a": {}}, ([], []), load_target("rtx"))
    assert causes[0].lift == "more of allocate.schemes"

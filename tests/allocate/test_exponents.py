"""One exponent per activation, and everything INT8 at its best: by hand on a few layers."""

from __future__ import annotations

from mpq_deploy.allocate.exponents import best_int8, one_exponent_each
from mpq_deploy.engine.target import load_target
from mpq_deploy.graph.layers import Layer, LayerUse

NAMES = ("fp16", "w8a8", "w8a8+scale3", "w8a8+scale7", "w8a8-timestep", "w8a8-timestep+scale7")


def layer(name: str, tensor: str) -> Layer:
    return Layer(
        name, "Gemm", f"{name}.w", (64, 64), 0, 1, (LayerUse(name, tensor, f"{name}_out"),)
    )


LAYERS = (layer("q", "x"), layer("k", "x"), layer("other", "y"))
# Alone, k would take 3 tenths; both together lose least with 7. Of y's range by timestep the plain one is best.
LOSSES = {
    "q": dict(zip(NAMES, (0, 9.0, 5.0, 1.0, 4.0, 2.0))),
    "k": dict(zip(NAMES, (0, 9.0, 2.0, 3.0, 4.0, 2.5))),
    "other": dict(zip(NAMES, (0, 9.0, 2.0, 3.0, 0.5, 1.0))),
}


def test_readers_of_a_tensor_agree() -> None:
    found = one_exponent_each(LAYERS, dict.fromkeys(LOSSES, NAMES), LOSSES)
    assert found["q"] == found["k"] == ("fp16", "w8a8", "w8a8+scale7", "w8a8-timestep+scale7")
    assert found["other"] == ("fp16", "w8a8", "w8a8+scale3", "w8a8-timestep")


def test_a_layer_that_lacks_the_best_takes_what_it_has() -> None:
    allowed = {**dict.fromkeys(LOSSES, NAMES), "k": ("fp16", "w8a8", "w8a8-timestep")}
    assert one_exponent_each(LAYERS, allowed, LOSSES)["k"] == allowed["k"]


def test_everything_int8_is_the_least_loss_of_each_tensor() -> None:
    found = best_int8(LAYERS, load_target("rtx"), LOSSES, predicts=True)
    names = {name: scheme.name for name, scheme in found.items()}
    # w8a8+scale7 4.0 in all, w8a8-timestep+scale7 4.5
    assert names == {"q": "w8a8+scale7", "k": "w8a8+scale7", "other": "w8a8-timestep"}
    static = best_int8(LAYERS, load_target("rtx"), LOSSES, predicts=False)
    assert {scheme.name for scheme in static.values()} == {"w8a8"}

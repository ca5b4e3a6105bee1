"""INT4 in blocks is a candidate only where it is smaller than what it would replace."""

from __future__ import annotations

import pytest

from mpq_deploy.formats.candidates import choices_for
from mpq_deploy.formats.scheme import SCHEMES, schemes_named
from mpq_deploy.graph.layers import Layer

BLOCKS = schemes_named(["w4a16", "w4a8"])


def linear(out: int, into: int) -> Layer:
    return Layer("fc", "Gemm", "fc.weight", (out, into), 0, 1, ())


@pytest.mark.parametrize("op", ["Gemm", "MatMul", "Conv"])
def test_a_layer_of_one_input_stays_out_of_blocks(op: str) -> None:
    """A block of one weight is a scale per weight; TensorRT-RTX cannot tell along which axis it lies."""
    shape, axis = {"Gemm": ((32, 1), 0), "MatMul": ((1, 32), 1), "Conv": ((32, 1, 1, 1), 0)}[op]
    layer = Layer("time", op, "time.weight", shape, axis, 1, ())
    choices = choices_for(layer, (SCHEMES["w8a8"], *BLOCKS), lambda *_: "")
    assert [scheme.name for scheme in choices.schemes] == ["fp16", "w8a8"]
    assert set(choices.refused) == {scheme.name for scheme in BLOCKS}
    assert all("bytes are not fewer than the 64 of FP16" in why for why in choices.refused.values())


def test_two_inputs_are_enough() -> None:
    assert SCHEMES["w4a16-b32"].refusal(linear(32, 2)) == ""
    # With INT8's scale beside that of the only block nothing is saved over INT8.
    assert "160 bytes are not fewer than the 128 of INT8" in SCHEMES["w4a8-b32"].refusal(
        linear(32, 2)
    )


@pytest.mark.parametrize("into", [1, 2, 3, 4, 6, 9, 48, 320])
def test_every_block_scheme_that_is_left_is_the_smallest_form(into: int) -> None:
    layer = linear(64, into)
    for one in BLOCKS:
        if not one.refusal(layer):
            assert one.weight.bytes_of(layer) < min(
                SCHEMES[other].weight.bytes_of(layer) for other in ("w8a8", "fp16")
            )

"""Engines of FP8 and FP4 for Ada and Blackwell: every planned layer is shown as such by the builder's own log."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.engine.builder import BatchProfile, BuildRequest, build_engine
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.engine.target import load_target
from mpq_deploy.graph.attention import projections
from mpq_deploy.graph.layers import Layer, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.additions import Additions
from mpq_deploy.models.export import export_denoiser, load_exported
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.system.progress import Talk
from tests.engine.float_plans import write_floats
from tests.engine.plans import Written, profile
from tests.graphs import denoiser_graph
from tests.tiny_models import (
    ONE_LEVEL,
    ONE_LEVEL_CLASSES,
    TEXT_WIDTH,
    TOKENS,
    tiny_conditional_folder,
    tiny_scheduler,
    tiny_transformer_conditions,
    tiny_transformer_folder,
    tiny_unet_folder,
)

pytestmark = pytest.mark.rtx

# Kernels of a plan of one scheme, how many at least compute as planned, and which of q, k and v are one. Keys that are
# transposed at once stay apart; in networks, which add biases and split heads, they do not.
PLANS = [
    ("rtx-ada", "f8a8", {"gemm FP8": 5, "correlation FP8": 7}, ["k", "qv"]),
    ("rtx-ada", "w4f8-b32", {"gemm FP8": 5, "correlation FP8": 6}, ["k", "qv"]),
    ("rtx-ada", "f8a16", {"runtime_fusion FP8": 4}, ["k", "q", "v"]),
    ("rtx-blackwell", "f8a8", {"gemm FP8": 5, "correlation FP8": 7}, ["k", "q", "v"]),
    ("rtx-blackwell", "nvfp4", {"gemm FP4E2M1": 5}, ["k", "qv"]),
]
MIXED = ("nvfp4", "f8a8", "w8a8", "w4f8-b32", "w4a16-b32")


def build(written: Written, target: str, out: Path, batch: BatchProfile) -> EngineRecord:
    """Build and verify; return the record, whose products are those of the log."""
    pytest.importorskip("tensorrt_rtx")
    request = BuildRequest(written.model, load_target(target).build_target, batch)
    record = build_engine(request, out, written.expected, Talk())
    assert record.verified and not record.problems
    lines = (out / "layers.txt").read_text(encoding="utf-8").splitlines()
    nodes = {layer.name: f"[ONNX Layer: {layer.nodes[0]}]" for layer in written.expected.layers}
    for product in record.products:
        alike = [f"LayerType: {kind}," for kind in ("gemm", "runtime_fusion")]
        named = [line for line in lines if all(nodes[name] in line for name in product.layers)]
        assert any(kind in line for line in named for kind in alike), product
    return record


@pytest.mark.parametrize(
    "target, scheme, least, together", PLANS, ids=[f"{t}-{s}" for t, s, *_ in PLANS]
)
def test_every_layer_computes_as_planned(
    tmp_path: Path, target: str, scheme: str, least: dict[str, int], together: list[str]
) -> None:
    exported = denoiser_graph(size=8).save(tmp_path / "exported.onnx")
    written = write_floats(exported, tmp_path, lambda *_: scheme, target)
    record = build(written, target, tmp_path / "engine", profile())
    kernels = record.kernels
    assert all(kernels.get(kind, 0) >= count for kind, count in least.items()), kernels
    heads = {f"attn.to_{letter}": letter for letter in "qkv"}
    found = ["".join(heads.get(name, "") for name in one.layers) for one in record.products]
    assert sorted(filter(None, found)) == together


def test_formats_mix_in_one_engine(tmp_path: Path) -> None:
    exported = denoiser_graph(size=8).save(tmp_path / "exported.onnx")
    written = write_floats(exported, tmp_path, lambda i, _: MIXED[i % len(MIXED)])
    kernels = build(written, "rtx-blackwell", tmp_path / "engine", profile()).kernels
    assert {"gemm FP4E2M1", "gemm FP8", "correlation FP8", "gemm Int8"} <= set(kernels)


def unet(folder: Path) -> tuple[Path, Additions]:
    return tiny_unet_folder(folder, **ONE_LEVEL_CLASSES), Additions()


def conditional(folder: Path) -> tuple[Path, Additions]:
    path = tiny_conditional_folder(folder, **ONE_LEVEL)
    (path / "scheduler_config.json").write_text(json.dumps(tiny_scheduler()), encoding="utf-8")
    states = np.random.default_rng(0).standard_normal((2, TOKENS, TEXT_WIDTH)).astype(np.float32)
    np.savez(folder / "c.npz", encoder_hidden_states=states)
    return path, Additions(conditions=folder / "c.npz")


def transformer(class_name: str, folder: Path) -> tuple[Path, Additions]:
    path = tiny_transformer_folder(folder, class_name)
    if class_name == "DiTTransformer2DModel":
        np.savez(folder / "c.npz", class_labels=np.array([0, 1]))
        return path, Additions(conditions=folder / "c.npz")
    conditions = tiny_transformer_conditions(folder / "c.npz", class_name)
    return path, Additions(conditions=conditions)


NETWORKS = {
    "UNet2D": unet,
    "UNet2DCondition": conditional,
    "DiT": partial(transformer, "DiTTransformer2DModel"),
    "SD3": partial(transformer, "SD3Transformer2DModel"),
}


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_diffusers(tmp_path: Path, name: str) -> None:
    """Everything in FP8 for Ada, then formats in turns for Blackwell."""
    denoiser = open_denoiser(*NETWORKS[name](tmp_path))
    export_denoiser(denoiser, tmp_path / "export")
    exported = load_exported(tmp_path / "export")
    groups = projections(layer_graph(load_model(exported.model)))
    heads = {layer.name for group in groups for layer in group}
    spec = exported.spec
    shapes = {item.name: item.shape for item in spec.inputs if item.batched}
    for target, schemes in (("rtx-ada", ("f8a8", "w4f8-b32")), ("rtx-blackwell", MIXED)):
        folder = tmp_path / target
        folder.mkdir()
        names = (spec.timestep_name, spec.sample.name)

        def choose(number: int, layer: Layer, schemes: tuple[str, ...] = schemes) -> str:
            return "f8a8" if layer.name in heads else schemes[number % len(schemes)]

        written = write_floats(exported.model, folder, choose, target, names)
        taken = {layer.scheme for layer in written.expected.layers}
        assert "f8a8" in taken and (target == "rtx-ada" or "nvfp4" in taken)
        record = build(written, target, folder / "engine", BatchProfile(1, 2, 4, shapes))
        assert any(kind.endswith("FP8") for kind in record.kernels)
        # FP8 products of one input: one kernel for Ada, kernels of their own for Blackwell.
        together = {name for one in record.products if len(one.layers) > 1 for name in one.layers}
        assert heads and heads & together == (heads if target == "rtx-ada" else set())

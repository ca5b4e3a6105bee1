"""What torch's exporters write, at the opsets that people use, opens, agrees with torch and builds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

from mpq_deploy.calls.recorded import CallSet  # noqa: E402
from mpq_deploy.errors import ModelError  # noqa: E402
from mpq_deploy.graph.layers import layer_graph  # noqa: E402
from mpq_deploy.graph.load import load_model  # noqa: E402
from mpq_deploy.models.export import export_denoiser  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from mpq_deploy.onnx_torch import operators  # noqa: E402
from mpq_deploy.onnx_torch.torch_graph import TorchGraph  # noqa: E402
from mpq_deploy.runtime.ort import session_options  # noqa: E402
from tests.calls.sets import samples_of  # noqa: E402
from tests.exported_networks import NETWORKS, Form  # noqa: E402
from tests.pipeline.runs import build, describe, recipe_for  # noqa: E402

pytestmark = pytest.mark.torch

# Layers of each network: what is computed from weights counts like what is stored.
LAYERS = {"unet": 13, "transformer": 9, "conv1d": 13, "conv3d": 13, "computed": 13, "squeezed": 3}
SCRIPT = [
    Form("unet", "script", 11, "fp32"),
    Form("unet", "script", 13, "bf16"),
    Form("unet", "script", 14, "fp16", open_sizes=True),
    Form("unet", "script", 20, "fp32", open_sizes=True),
    Form("transformer", "script", 14, "fp16", open_sizes=True),
    Form("transformer", "script", 17, "bf16"),
    Form("transformer", "script", 20, "fp32"),
    Form("conv1d", "script", 13, "fp16"),
    Form("conv1d", "script", 18, "bf16", open_sizes=True),
    Form("conv3d", "script", 11, "fp16"),
    Form("conv3d", "script", 17, "fp32", open_sizes=True),
    Form("computed", "script", 13, "fp16"),
    Form("computed", "script", 17, "fp32", open_sizes=True),
    Form("computed", "script", 18, "bf16", open_sizes=True),
    Form("squeezed", "script", 17, "fp32", open_sizes=True),
    Form("squeezed", "script", 13, "fp16", open_sizes=True),
]
# Each takes seconds, whatever the network.
DYNAMO = [
    Form("transformer", "dynamo", 23, "bf16"),
    Form("computed", "dynamo", 21, "fp32"),
    Form("conv3d", "dynamo", 18, "fp16"),
]
ENGINES = [
    Form("unet", "script", 14, "fp16", open_sizes=True),
    Form("conv3d", "script", 11, "fp16"),
    Form("computed", "script", 17, "fp32", open_sizes=True),
    Form("transformer", "dynamo", 23, "bf16"),
]
QUICK: dict[str, Any] = {
    "budget": 0.6,
    "allocate__schemes": ["w8a8", "w4a16-b32"],
    "allocate__branches": [],
    "calibrate__samples": 4,
    "engine__build": True,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what exports a form once: its file with a YAML beside it, and the network in FP32."""
    done: dict[str, tuple[Path, Any]] = {}

    def export(form: Form) -> tuple[Path, Any]:
        if form.name not in done:
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            path = tmp_path_factory.mktemp(form.name) / "model.onnx"
            module = form.export(path)
            sample = {"name": "sample", "shape": list(NETWORKS[form.network].shape)}
            done[form.name] = describe(path, sample=sample), module
        return done[form.name]

    return export


def inputs(form: Form, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    sample = rng.standard_normal((count, *NETWORKS[form.network].shape)).astype(np.float32)
    return {"sample": sample, "timestep": rng.integers(0, 1000, count)}


# What the last ONNX Runtime for Python 3.10 does not run as later ones do.
OLD_RUNTIME = {
    "conv3d-script11-fp16": "ONNX Runtime 1.23 computes 3D convolutions in FP16 less exactly",
    "transformer-dynamo23-bf16": "ONNX Runtime 1.23 has no kernel for FP16 of opset 23's quantizer",
}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("form", [*SCRIPT, *DYNAMO], ids=lambda form: form.name)
def test_the_float_graph_is_the_network(exported: Any, form: Form, tmp_path: Path) -> None:
    """In ONNX Runtime and in torch, at another batch than it was traced with, with all its layers."""
    path, module = exported(form)
    report = export_denoiser(open_denoiser(path), tmp_path)
    graph = layer_graph(load_model(tmp_path / "model.onnx"))
    assert len(graph.layers) == LAYERS[form.network]
    assert not [one.name for one in graph.others if one.op in ("Conv", "Gemm", "MatMul")]
    feeds = inputs(form, 3)
    with torch.no_grad():
        wanted = module(*map(torch.from_numpy, feeds.values())).numpy()
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    # Factors such as 0.1 are rounded in half precision, and so are weights that TorchScript folds.
    rounded = form.network == "computed" and form.kind != "fp32"
    bound = 1e-2 if rounded else 2e-4
    assert relative(session.run(None, feeds)[0], wanted) < bound
    evaluated = TorchGraph(graph.model)
    values = evaluated.run(evaluated.feed(feeds))
    assert relative(values["out_sample"].numpy(), wanted) < bound
    assert any("bfloat16" in note for note in report.notes) == (form.kind == "bf16")


@pytest.mark.rtx
@pytest.mark.parametrize("form", ENGINES, ids=lambda form: form.name)
def test_a_verified_engine(exported: Any, form: Form, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    if ort.__version__.startswith("1.23.") and form.name in OLD_RUNTIME:
        pytest.skip(OLD_RUNTIME[form.name])
    path, module = exported(form)
    # At every timestep: the first sample is noise, and wider than all that follow.
    quick = {**QUICK, "calibrate__timesteps": 4, "measure__timesteps": 4}
    built = build(recipe_for(path, **quick), tmp_path / "run", "engine")
    record = json.loads((built.run / "engine" / "build.json").read_text(encoding="utf-8"))
    assert not [one for one in record["problems"] if one["severity"] == "wrong"]
    assert not [line for line in built.said if line.startswith("warning: losses are from")]
    # The plan's error is what its losses predict, on the calls that these were measured on.
    predicted = json.loads((built.run / "allocate" / "plan.json").read_text(encoding="utf-8"))
    recorded = CallSet.load(built.run / "calibrate" / "calls")
    errors = []
    options = session_options(1, fake_quant_only=True)
    session = ort.InferenceSession(built.run / "quantize" / "model.onnx", options)
    for sample, timestep in zip(samples_of(recorded), recorded.timesteps):
        times = np.full(len(sample), timestep, np.int64)
        with torch.no_grad():
            wanted = module(torch.from_numpy(sample), torch.from_numpy(times)).numpy()
        half = {"sample": sample.astype(np.float16), "timestep": times}
        change = session.run(None, half)[0].astype(np.float32) - wanted
        errors.append(np.square(change).sum() / np.square(wanted).sum())
    assert 1 / 5 < np.mean(errors) / predicted["predicted_loss"] < 5


def test_gain_needs_no_torch(
    exported: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where torch fails on an operator, the plan is made in ONNX Runtime alone, and says so."""

    def fail(*_: Any) -> Any:
        raise TypeError('reshape() missing 1 required positional arguments: "shape"')

    monkeypatch.setitem(operators.OPERATORS, "Gather", fail)
    path, _ = exported(Form("unet", "script", 14, "fp16", open_sizes=True))
    quick = {**QUICK, "engine__build": False, "allocate__branches": ["rows"]}
    for method in ("gain", "probe"):
        recipe = recipe_for(path, **quick, measure__method=method)
        built = build(recipe, tmp_path / method, "allocate")
        assert any("by kurtosis instead of probes" in line for line in built.said)
        table = json.loads((built.run / "measure" / "table.json").read_text(encoding="utf-8"))
        assert table["metric"] == "gain"


def test_a_branch_by_data_is_refused_in_one_line(tmp_path: Path) -> None:
    @torch.jit.script
    def either(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if bool(t.max() > 500):
            return x * 2
        return x + 1

    class Branching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, sample: Any, timestep: Any) -> Any:
            return self.conv(either(sample, timestep))

    form = Form("unet", "script", 17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Form, "module", lambda self: Branching().eval())
        form.export(tmp_path / "model.onnx")
    path = describe(tmp_path / "model.onnx")
    with pytest.raises(
        ModelError, match=r"\(If\) takes one of two branches by .* at run time"
    ) as caught:
        export_denoiser(open_denoiser(path), tmp_path / "export")
    assert "\n" not in str(caught.value)

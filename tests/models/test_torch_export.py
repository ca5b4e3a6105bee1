"""Export of PyTorch modules: outputs equal, parameters keep their names, nodes are called after their modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mpq_deploy.errors import ModelError
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model, normalise
from mpq_deploy.models import export
from mpq_deploy.models.additions import Additions
from mpq_deploy.models.export import export_denoiser, load_exported
from mpq_deploy.models.open import open_denoiser
from mpq_deploy.models.spec import InputSpec
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.runtime.ort import OrtDenoiser, make_session
from mpq_deploy.system.progress import Talk
from tests.tiny_models import (
    ONE_LEVEL,
    ONE_LEVEL_CLASSES,
    WHOLE_LEVEL,
    tiny_conditional_folder,
    tiny_scheduler,
    tiny_text_pipeline_folder,
    tiny_unet_folder,
)

pytestmark = pytest.mark.torch


def check_names(model: ir.Model, module: Any) -> None:
    """Every parameter is in the file under its name, with its values up to shape."""
    for name, tensor in module.state_dict().items():
        found = model.graph.initializers[name].const_value
        assert found is not None and found.size == tensor.numel(), name
        ours, theirs = found.numpy(), tensor.numpy()
        same = np.array_equal(ours.ravel(), theirs.ravel()) or np.array_equal(ours, theirs.T)
        assert same, name


@pytest.fixture(scope="module")
def class_conditional(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("unet")
    denoiser = open_denoiser(tiny_unet_folder(folder, half=True))
    return denoiser, folder / "export", export_denoiser(denoiser, folder / "export")


@pytest.fixture(scope="module")
def one_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A UNet that other tests export too; the report and the files of its first export."""
    folder = tmp_path_factory.mktemp("one_level")
    model = tiny_unet_folder(folder, **ONE_LEVEL_CLASSES)
    return model, folder / "export", export_denoiser(open_denoiser(model), folder / "export")


@pytest.mark.slow
def test_a_second_export_has_the_same_bytes_and_so_with_weights_that_are_let_go_of(
    one_level: Any, tmp_path: Path
) -> None:
    model, folder, report = one_level
    denoiser = open_denoiser(model)
    again = export_denoiser(denoiser, tmp_path / "export", release=True)
    assert all(parameter.is_meta for parameter in denoiser.network.module.parameters())  # type: ignore[attr-defined]
    assert again.max_relative_error == report.max_relative_error
    for file in folder.iterdir():
        assert (tmp_path / "export" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_unet_exports_equal_and_complete(class_conditional: Any) -> None:
    denoiser, folder, report = class_conditional
    assert report.max_relative_error < 1e-5 and report.opset == 21 and report.batch_sizes == (1, 2)
    files = sorted(p.name for p in folder.iterdir())
    assert files == ["conditions.npz", "denoiser.json", "model.onnx", "model.onnx.data"]
    model = load_model(folder / "model.onnx")
    check_names(model, denoiser.network.module)
    assert all(v.dtype != ir.DataType.FLOAT16 for v in model.graph.initializers.values())
    large = [
        v
        for v in model.graph.initializers.values()
        if v.const_value and v.const_value.nbytes > 1024
    ]
    assert large and all(isinstance(v.const_value, ir.ExternalTensor) for v in large)
    assert report.weight_bytes == sum(
        v.const_value.nbytes for v in model.graph.initializers.values()
    )


def test_the_file_gives_what_the_module_gives_at_other_batch_sizes(class_conditional: Any) -> None:
    import torch

    denoiser, folder, _ = class_conditional
    exported = load_exported(folder)
    assert exported.spec == denoiser.spec and exported.conditions.rows == 5
    for count in (1, 4):
        x = np.random.default_rng(count).standard_normal((count, 3, 8, 8), np.float32)
        labels = np.arange(count)
        with torch.no_grad():
            module = denoiser.network.module
            there = module(
                torch.from_numpy(x), torch.tensor(321), torch.from_numpy(labels)
            ).sample.numpy()
        here = OrtDenoiser(exported.model, exported.spec)(x, 321.0, {"class_labels": labels})
        np.testing.assert_allclose(here, there, atol=1e-4 * np.abs(there).max())


def test_nodes_are_called_after_their_modules(class_conditional: Any) -> None:
    _, folder, _ = class_conditional
    model = load_model(folder / "model.onnx")
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    by_name = {node.name: node for node in model.graph}
    assert (
        by_name["down_blocks.0.resnets.0.conv1/Conv"].inputs[1].name
        == "down_blocks.0.resnets.0.conv1.weight"
    )
    to_q = by_name["down_blocks.1.attentions.0.to_q/MatMul"]
    assert to_q.inputs[1].name == "down_blocks.1.attentions.0.to_q.weight"
    assert "InstanceNormalization" in {node.op_type for node in model.graph}
    assert "GroupNormalization" not in {node.op_type for node in model.graph}
    assert not any(node.metadata_props or node.doc_string for node in model.graph)
    assert str(model.graph.inputs[0].shape[0]) == "batch"
    known = {v.name: v for node in model.graph for v in node.outputs}
    assert all(v.shape is not None and v.dtype is not None for v in known.values())


def test_every_linear_and_convolution_is_a_layer(class_conditional: Any) -> None:
    import torch

    denoiser, folder, _ = class_conditional
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    modules = {
        name
        for name, module in denoiser.network.module.named_modules()
        if isinstance(module, kinds)
    }
    assert {
        layer.name for layer in layer_graph(load_model(folder / "model.onnx")).layers
    } == modules


def test_normalising_an_export_changes_nothing(class_conditional: Any) -> None:
    _, folder, _ = class_conditional
    model = load_model(folder / "model.onnx")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert ir.to_proto(normalise(model)).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("unet", "size"),
    [
        pytest.param({**ONE_LEVEL, "use_linear_projection": True}, 9, id="linear-odd"),
        pytest.param(
            {**WHOLE_LEVEL, "use_linear_projection": False, "num_class_embeds": 3},
            8,
            id="conv-classes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_cross_attention_exports_equal(tmp_path: Path, unet: dict[str, Any], size: int) -> None:
    folder = tiny_conditional_folder(tmp_path, sample_size=size, **unet)
    arrays: dict[str, Any] = {
        "encoder_hidden_states": np.random.default_rng(0).normal(size=(3, 7, 12))
    }
    if "num_class_embeds" in unet:
        arrays["class_labels"] = np.arange(3)
    np.savez(tmp_path / "conditions.npz", **arrays)
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps(tiny_scheduler(prediction_type="v_prediction")), encoding="utf-8"
    )
    denoiser = open_denoiser(
        folder, Additions(conditions=tmp_path / "conditions.npz", scheduler=tmp_path)
    )
    assert denoiser.spec.prediction_type == "v_prediction" and denoiser.spec.pixel_range is None
    report = export_denoiser(denoiser, tmp_path / "export")
    assert report.max_relative_error < 1e-5
    model = load_model(tmp_path / "export" / "model.onnx")
    check_names(model, denoiser.network.module)  # type: ignore[attr-defined]
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert name in {layer.name for layer in layer_graph(model).layers}


@pytest.mark.slow
def test_a_text_pipeline_exports_with_its_decoder(tmp_path: Path) -> None:
    import diffusers
    import torch

    folder = tiny_text_pipeline_folder(tmp_path, **ONE_LEVEL)
    # Latents with a mean and a deviation of their own, as those of Playground's models.
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [2.0, 1.0, 0.5, 3.0]}
    config = folder / "vae" / "config.json"
    values = {**json.loads(config.read_text(encoding="utf-8")), **statistics}
    config.write_text(json.dumps(values), encoding="utf-8")
    text = np.random.default_rng(0).standard_normal((2, 8, 12), np.float32)
    np.savez(tmp_path / "c.npz", encoder_hidden_states=text)
    denoiser = open_denoiser(folder, Additions(conditions=tmp_path / "c.npz"))
    report = export_denoiser(denoiser, tmp_path / "export")
    assert (
        report.max_relative_error < 1e-4
        and report.decoder_error is not None
        and report.decoder_error < 1e-4
    )
    exported = load_exported(tmp_path / "export")
    assert exported.spec.decoder == "decoder.onnx" and exported.decoder is not None
    decoder = load_model(exported.decoder)
    latents = np.random.default_rng(1).standard_normal((2, 4, 8, 8), np.float32)
    session = make_session(exported.decoder)
    found = session.run(None, {session.get_inputs()[0].name: latents})[0]
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    mean, deviation = (torch.tensor(one).reshape(1, 4, 1, 1) for one in statistics.values())
    with torch.no_grad():
        scaled = torch.from_numpy(latents) * deviation / vae.config.scaling_factor + mean
        expected = vae.decode(scaled).sample.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not any(name.startswith("encoder.") for name in decoder.graph.initializers)


def export_module(module: Any, *shapes: tuple[int, ...]) -> ir.Model:
    from mpq_deploy.models.torch_export import TorchNetwork

    inputs = [InputSpec(name=f"x{i}", shape=shape) for i, shape in enumerate(shapes)]
    return TorchNetwork(module, inputs, "out", lambda m, *xs: m(*xs)).to_onnx(Talk())


@pytest.mark.parametrize("term", [0.0, 1e-15, -1e-9, 1e-8])
def test_terms_near_zero_stay(term: float) -> None:
    import torch

    class Ratio(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x / (torch.relu(x) + term)

    model = export_module(Ratio(), (6,))
    # Without the term, 0 / 0 would be NaN; the term 0 itself is of no use.
    assert sum(node.op_type == "Add" for node in model.graph) == (term != 0)


@pytest.mark.parametrize("factor", [1.0, 1 + 5e-6, 0.999999])
def test_factors_near_one_stay(factor: float) -> None:
    import torch

    class Scaled(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.relu(x) * factor

    model = export_module(Scaled(), (6,))
    assert sum(node.op_type == "Mul" for node in model.graph) == (factor != 1)


def test_tied_weights_are_one_layer_and_stored_once() -> None:
    import torch

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(16, 16, bias=False)
            self.second = torch.nn.Linear(16, 16, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Any) -> Any:
            return self.second(torch.relu(self.first(x)))

    model = export_module(Tied(), (5, 16))
    layers = layer_graph(model).layers
    assert len(layers) == 1 and len(layers[0].uses) == 2
    assert layers[0].weight in ("first.weight", "second.weight")


def test_a_weight_tied_in_two_forms_keeps_both_forms() -> None:
    import torch

    class TwoForms(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: Any) -> Any:
            return torch.matmul(self.plain(x), self.plain.weight)

    module = TwoForms()
    model = export_module(module, (3, 8))
    stored = model.graph.initializers
    np.testing.assert_array_equal(
        stored["plain.weight"].const_value.numpy(), module.plain.weight.detach().numpy()
    )
    transposed = stored["plain.weight.transposed"].const_value.numpy()
    np.testing.assert_array_equal(transposed, module.plain.weight.detach().numpy().T)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_unet_folder(tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"mid_block\.resnets\.0\.conv1\.weight.* 1 values"):
        export_denoiser(open_denoiser(folder), tmp_path / "export")


def test_timesteps_of_a_learned_embedding_are_whole(tmp_path: Path) -> None:
    table: dict[str, Any] = {"time_embedding_type": "learned", "num_train_timesteps": 1000}
    folder = tiny_unet_folder(tmp_path, num_class_embeds=None, **ONE_LEVEL_CLASSES, **table)
    # The folder's pipeline makes the calls; then our own sampler does.
    index = folder / "model_index.json"
    for _ in range(2):
        denoiser = open_denoiser(folder)
        assert denoiser.spec.timestep is not None and denoiser.spec.timestep.dtype == "int64"
        feeds = export._case(denoiser, 2, np.random.default_rng(0))
        assert feeds["timestep"].dtype == np.int64
        assert denoiser.network.reference(feeds).shape == (2, 3, 8, 8)
        index.unlink(missing_ok=True)


def test_a_module_that_pytorch_itself_cannot_run_is_named() -> None:
    import torch

    inputs = [InputSpec(name="x", shape=(3, 9, 9)), InputSpec(name="t")]
    linear = torch.nn.Linear(8, 8)
    network = TorchNetwork(linear, inputs, "y", lambda m, x, t: m(x))
    with pytest.raises(ModelError, match=r"Linear cannot be run .* of \[3, 9, 9\]") as refused:
        network.to_onnx(Talk())
    assert "sample_size" in refused.value.hint


EXPORTED = """
import sys
import traceback
import torch
from mpq_deploy.models.spec import InputSpec
from mpq_deploy.models.torch_export import TorchNetwork
from mpq_deploy.system.libraries import quiet_libraries, show_libraries
from mpq_deploy.system.progress import Talk

class Branching(torch.nn.Module):
    def forward(self, x, t):
        return x if x.sum() > 0 else x * 2


class Eigenvalues(torch.nn.Module):
    def forward(self, x, t):
        return torch.linalg.eigvals(x[:, None] * x[..., None]).real


inputs = [InputSpec(name="x", shape=(4,)), InputSpec(name="t")]
for begin in (quiet_libraries, show_libraries):
    begin()
    for module in (Branching(), Eigenvalues()):
        try:
            TorchNetwork(module, inputs, "y", lambda m, x, t: m(x, t)).to_onnx(Talk())
        except Exception as error:
            print(error)
            if begin is show_libraries:
                traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        print("with debug:", file=stream, flush=True)
"""


def test_the_exporters_words_are_one_line_and_whole_with_debug() -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", EXPORTED], capture_output=True, encoding="utf-8", timeout=300
    )
    quiet, loud = done.stdout.split("with debug:\n")[:2]
    nothing, traces = done.stderr.split("with debug:\n")[:2]
    assert nothing == "" and len(quiet.splitlines()) == 2
    assert "data-dependent expression" in quiet.splitlines()[0]
    assert "def forward(self" in traces and "This is step 1/3" in traces
    for lines in (quiet.splitlines(), loud.splitlines()):
        assert any("No ONNX function found" in line and "linalg_eig" in line for line in lines)

"""Slots for LoRAs through the stages: plan, graphs, engine, package and report, and a run without them."""

from __future__ import annotations

import json
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from mpq_deploy import load
from mpq_deploy.calls.recorded import RecordedCalls
from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.graph.writers.lora_slots import SLOTTED, SLOTTED_SIMULATED
from mpq_deploy.run.view import Run
from mpq_deploy.system.progress import Talk
from tests.graphs import denoiser_graph
from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import FEW_SCHEMES, Built, build, recipe_for, save_denoiser

Cli = Callable[..., Outcome]
RANK = 4
SETTINGS: dict[str, Any] = {"target": "rtx-ada", "lora_slots": RANK, "budget": 0.6}
SETTINGS |= {"evaluate__controls": False, "allocate__objective": "quality"}
# The attention of the tiny denoiser: three layers of 32 channels that read one tensor, and a fourth.
LAYERS, WIDTH = ("to_q", "to_k", "to_v", "to_out"), 32


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny denoiser with its attention in a block, by its name."""
    graph = denoiser_graph(channels=16, size=8)
    for node in graph.nodes:
        for place, name in enumerate(node.input):
            if name.startswith("attn.to_") and name.endswith(".weight"):
                node.input[place] = f"mid_block.attentions.0.{name}"
    for one in graph.weights:
        if one.name.startswith("attn.to_"):
            one.name = f"mid_block.attentions.0.{one.name}"
    return save_denoiser(tmp_path_factory.mktemp("named"), graph)


@pytest.fixture(scope="module")
def slotted(named: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    run = tmp_path_factory.mktemp("slotted") / "run"
    return build(recipe_for(named, **SETTINGS, **FEW_SCHEMES), run)


def test_bytes_and_time_are_in_plan_and_report(slotted: Built) -> None:
    plan = read(slotted.run / "allocate" / "plan.json")
    slots = plan["lora_slots"]
    assert slots["rank"] == RANK and slots["layers"] == len(LAYERS)
    graph = onnx.load(slotted.run / "quantize" / SLOTTED, load_external_data=False).graph
    inputs = {one.name: one.type.tensor_type for one in graph.input if ".lora_" in one.name}
    assert len(inputs) == 2 * len(LAYERS)
    sizes = [np.prod([dim.dim_value for dim in one.shape.dim]) for one in inputs.values()]
    assert slots["size_bytes"] == 2 * sum(sizes) == 2 * RANK * 2 * WIDTH * len(LAYERS)
    assert {one.elem_type for one in inputs.values()} == {onnx.TensorProto.FLOAT16}
    assert 0 < slots["latency_ms"] < plan["latency"]["ours_ms"]
    assert slotted.report["lora_slots"] == slots
    said = [note for note in slotted.report["notes"] if "LoRA slots of rank 4 in 4 layers" in note]
    assert len(said) == 1 and f"{slots['size_bytes']:,} bytes of inputs" in said[0]
    for name in ("report.md", "report.html"):
        assert said[0] in (slotted.run / name).read_text(encoding="utf-8")


def test_a_run_without_slots_has_the_same_constants_and_less_time(
    slotted: Built, named: Path, tmp_path: Path
) -> None:
    import shutil

    run = Path(shutil.copytree(slotted.run, tmp_path / "run"))
    plain = build(recipe_for(named, **{**SETTINGS, "lora_slots": 0}, **FEW_SCHEMES), run)
    assert plain.made == ["allocate", "quantize", "engine", "evaluate", "report"]
    assert not (run / "quantize" / SLOTTED).exists() and plain.report["lora_slots"] is None
    before, after = (read(one / "allocate" / "plan.json") for one in (slotted.run, run))
    if before["schemes"] == after["schemes"]:
        for name in ("model.onnx", "model.fp32.onnx", "weights.bin"):
            one, other = (place / "quantize" / name for place in (slotted.run, run))
            assert one.read_bytes() == other.read_bytes()
        slots = before["lora_slots"]["latency_ms"]
        # Slots keep queries, keys and values from being one product.
        assert before["latency"]["ours_ms"] >= after["latency"]["ours_ms"] + slots - 1e-6
    assert before["latency"]["fp16_ms"] == after["latency"]["fp16_ms"]


def test_a_limit_on_latency_counts_them(slotted: Built, tmp_path: Path, cli: Cli) -> None:
    import shutil

    run = Path(shutil.copytree(slotted.run, tmp_path / "run"))
    plan = read(run / "allocate" / "plan.json")
    others = plan["latency"]["others_ms"]
    tight = others + plan["lora_slots"]["latency_ms"] / 2
    outcome = cli("allocate", run, "--max-latency", f"{tight:.6f}ms")
    assert outcome.code == 2 and "ms" in outcome.err


def test_filled_slots_are_the_fused_model_within_what_quantizing_costs(slotted: Built) -> None:
    """The float graph with the LoRA in its weights, beside the quantized one with it in its slots."""
    opened = Run.opened(slotted.run, Talk())
    calls = RecordedCalls(opened.calibration.inputs, opened.exported.spec)
    feeds = calls.feed(1, np.arange(4))
    source, ours = slotted.run / "export" / "model.onnx", slotted.run / "quantize"
    plain = answer(source, feeds)
    usual = error(answer(ours / SLOTTED_SIMULATED, feeds), plain)
    # Updates of a sixth of the weights' size, and as large as these: they leave the ranges of INT8.
    for width, low, high in ((0.12, 0, 3), (0.3, 30, 1000)):
        fused, given = fused_with(source, width)
        changed = answer(fused, feeds)
        found = error(answer(ours / SLOTTED_SIMULATED, feeds, given), changed)
        assert low * usual < found < high * usual
        assert found < error(changed, plain) / 3


def lora_file(path: Path, factors: dict[str, Any], part: str = "unet") -> str:
    """A file in peft's names."""
    from safetensors.numpy import save_file

    tensors = {f"{part}.{n}.weight": np.asarray(v, np.float32) for n, v in factors.items()}
    save_file(tensors, path)
    return str(path)


def test_a_loaded_run_takes_loras_and_warns_of_large_ones(slotted: Built, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    opened = Run.opened(slotted.run, Talk())
    calls = RecordedCalls(opened.calibration.inputs, opened.exported.spec)
    feeds = calls.feed(1, np.arange(4))
    ours = slotted.run / "quantize" / SLOTTED_SIMULATED
    # Updates of 0.17 and of about one times the weights' norms: only these leave the ranges of INT8.
    given = {w: fused_with(slotted.run / "export" / "model.onnx", w)[1] for w in (0.12, 0.3)}
    files = {w: lora_file(tmp_path / f"{w}.safetensors", some) for w, some in given.items()}

    def output(unet: Any) -> Any:
        return unet(torch.from_numpy(feeds["sample"]), float(feeds["timestep"][0])).sample.numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unet = load(slotted.run, lora=files[0.12])
        np.testing.assert_allclose(output(unet), answer(ours, feeds, given[0.12]), atol=1e-4)
        unet.use_loras()
        np.testing.assert_allclose(output(unet), answer(ours, feeds), atol=1e-4)
        np.testing.assert_allclose(output(unet), output(load(slotted.run)), atol=1e-4)
    said = r"change 4 of 4 layers of the unet by more than 0.2 times their weights' norm .*clipped"
    with pytest.warns(UserWarning, match=said):
        unet.use_loras(files[0.3])
    np.testing.assert_allclose(output(unet), answer(ours, feeds, given[0.3]), atol=1e-4)
    with pytest.warns(UserWarning, match="4 layers of the text_encoder are left out, which load"):
        load(slotted.run, lora=lora_file(tmp_path / "t.safetensors", given[0.12], "text_encoder"))


def test_what_a_loaded_run_cannot_take_is_refused(slotted: Built, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    given = fused_with(slotted.run / "export" / "model.onnx", 0.12)[1]
    file = lora_file(tmp_path / "a.safetensors", given)
    with pytest.raises(UsageError, match=r"has no slots for LoRAs\. Build with --lora-slots RANK"):
        load(slotted.run / "export" / "model.onnx", lora=file)
    with pytest.raises(UsageError, match="no slots for LoRAs"):
        load(slotted.run).use_loras(file)
    other = {name.replace("attn", "attn9"): values for name, values in given.items()}
    for part, factors in (("unet", other), ("transformer", given)):
        wrong = lora_file(tmp_path / "b.safetensors", factors, part)
        with pytest.raises(ModelError, match=rf"'{part}\.mid\S+' in \S+ updates"):
            load(slotted.run, lora=wrong)
    with pytest.raises(UsageError, match=r"a slot of rank 4, and is given 4 of .* \+ 4 of"):
        load(slotted.run, lora=[file, file])


def fused_with(source: Path, width: float) -> tuple[bytes, dict[str, Any]]:
    """The float graph with a random LoRA in its weights, and the LoRA's factors."""
    rng, given = np.random.default_rng(3), {}
    model = onnx.load(source)
    for layer in LAYERS:
        name = f"mid_block.attentions.0.attn.{layer}"
        shapes = (RANK, WIDTH), (WIDTH, RANK)
        down, up = (rng.standard_normal(shape) * width for shape in shapes)
        given[f"{name}.lora_A"], given[f"{name}.lora_B"] = down, up
        (tensor,) = (one for one in model.graph.initializer if one.name == f"{name}.weight")
        whole = onnx.numpy_helper.to_array(tensor) + (up @ down).T.astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(whole, tensor.name))
    return model.SerializeToString(), given


def answer(source: bytes | Path, feeds: dict[str, Any], slots: dict[str, Any] | None = None) -> Any:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(source if isinstance(source, bytes) else str(source), options)
    taken = dict(feeds)
    for one in session.get_inputs():
        if ".lora_" in one.name:
            values = np.zeros(one.shape) if slots is None else slots[one.name]
            # By way of FP32, as a LoRA's file holds them: rounded at once, one may be another number.
            taken[one.name] = values.astype(np.float32).astype(np.float16)
    return session.run(None, taken)[0]


def error(found: Any, expected: Any) -> float:
    return float(np.sum((found - expected) ** 2) / np.sum(expected**2))


@pytest.mark.rtx
def test_the_engine_and_the_package_hold_them(slotted: Built, tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx")
    import shutil

    run = Path(shutil.copytree(slotted.run, tmp_path / "run"))
    recipe = run / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8").replace("build: false", "build: true")
    recipe.write_text(text, encoding="utf-8")
    assert cli("engine", run).code == 0
    record = read(run / "engine" / "build.json")
    assert record["verified"] and not record["problems"]
    kernels = (run / "engine" / "layers.txt").read_text(encoding="utf-8")
    assert all(f"Name: mid_block.attentions.0.attn.{one}.lora_B" in kernels for one in LAYERS)
    out = tmp_path / "x.mpq.tar"
    assert cli("package", run, "--target", "rtx-ada", "--out", out).code == 0
    with tarfile.open(out) as archive:
        (member,) = (one for one in archive.getmembers() if one.name.endswith("model.onnx"))
        content, described = archive.extractfile(member), archive.extractfile("manifest.json")
        assert content is not None and described is not None
        assert content.read() == (run / "quantize" / SLOTTED).read_bytes()
        # trtexec would fill them with random numbers.
        assert json.loads(described.read())["reference"]["empty"] == {
            f"mid_block.attentions.0.attn.{one}.lora_B": 2 * RANK * WIDTH for one in LAYERS
        }


def test_a_model_without_blocks_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="No layer of this model can have a slot for LoRAs"):
        build(recipe_for(model, **SETTINGS), tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()

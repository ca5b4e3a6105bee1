"""Calls recorded around somebody's script: what is written, what is told from it, and builds from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import mpq_deploy
from mpq_deploy.calls.script_calls import DESCRIPTION, ScriptCalls, runs_and_steps
from mpq_deploy.errors import InputError, UsageError
from mpq_deploy.models.spec import DenoiserSpec
from tests.graphs import GraphBuilder, denoiser_graph
from tests.pipeline.runs import build, recipe_for

SIGMAS = (80.0, 24.0, 5.8, 0.66)


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def denoiser(folder: Path) -> Path:
    """A graph of a sample and a timestep."""
    return denoiser_graph(channels=16, size=8).save(folder / "model.onnx")


def sample(session: ort.InferenceSession, seed: int, count: int = 2) -> None:
    """Call a session along a run of four noise levels, in a loop of one's own."""
    x = SIGMAS[0] * random(count, 3, 8, 8, seed=seed)
    for sigma in SIGMAS:
        feeds = {"sample": x / (1 + sigma**2) ** 0.5, "timestep": np.full(count, sigma, np.float32)}
        x = x - 0.1 * session.run(None, feeds)[0]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An ONNX file without any YAML, and the calls of six runs of two samples."""
    folder = tmp_path_factory.mktemp("script")
    session = ort.InferenceSession(denoiser(folder))
    with mpq_deploy.record(session, folder / "calls"):
        for seed in range(6):
            sample(session, seed)
    assert "run" not in vars(session)
    return folder / "model.onnx", folder / "calls"


def test_runs_and_steps_are_told_by_the_way_that_timesteps_go() -> None:
    down_twice = [9.0, 9.0, 4.0, 4.0, 1.0, 1.0, 9.0, 9.0, 4.0, 4.0, 1.0, 1.0]
    steps = [0, 0, 1, 1, 2, 2]
    assert runs_and_steps(down_twice) == [*((0, s) for s in steps), *((1, s) for s in steps)]
    # Flow models may count upwards, second-order samplers call twice at the middle of two steps.
    assert runs_and_steps([0.0, 0.5, 0.5, 1.0, 0.0, 0.5]) == [
        (0, 0),
        (0, 1),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]
    assert runs_and_steps([5.0, 5.0]) == [(0, 0), (0, 0)]


def test_calls_of_a_session_are_written_by_run_and_step(recorded: tuple[Path, Path]) -> None:
    calls = ScriptCalls.open(recorded[1])
    assert calls.inputs == ("sample", "timestep") and calls.timestep == "timestep"
    every = calls.grid(None)
    assert every.count == 12 and np.allclose(every.timesteps, SIGMAS)
    first = SIGMAS[0] * random(2, 3, 8, 8, seed=3) / (1 + SIGMAS[0] ** 2) ** 0.5
    np.testing.assert_array_equal(every.values("sample", 0, slice(6, 8)), first)
    kept, compared = calls.parts(2)
    assert (kept.count, compared.count, len(kept.timesteps)) == (9, 3, 2)
    both = {x.tobytes() for x in kept.values("sample", 0, slice(None))}
    assert not both & {x.tobytes() for x in compared.values("sample", 0, slice(None))}


def test_a_file_is_built_from_its_calls_alone(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    model, calls = recorded
    training = {"steps": 2, "check_every": 2, "batch_size": 2, "held_out": 2, "trajectories": 2}
    changes = {"calls": str(calls), "recover": training, "target": "onnxruntime-cpu"}
    made = build(recipe_for(model, **changes), tmp_path / "run")
    report = made.report
    assert report["size_bytes"] <= report["budget_bytes"]
    assert 0 < report["measured_nmse"] < report["controls"]["int4"]["measured_nmse"]
    assert report["evaluation"]["sampler"] == "recorded calls"
    spec = DenoiserSpec.load(tmp_path / "run" / "export" / "denoiser.json")
    assert spec.recorded and not spec.sampled and spec.sample.shape == (3, 8, 8)
    # Without timesteps to sample at there is no sampler to correct.
    with pytest.raises(UsageError, match="no sampler"):
        build(recipe_for(model, **changes, evaluate__correction="ptqd"), tmp_path / "run")


def encoder() -> GraphBuilder:
    """A text encoder: token ids, no timestep."""
    builder = GraphBuilder()
    builder.input("input_ids", ["N", 6], dtype=onnx.TensorProto.INT64)
    table = builder.weight("table", random(20, 16))
    states = builder.op("Gather", [table, "input_ids"], "states")
    for number in range(3):
        weight = builder.weight(f"layers.{number}.weight", random(16, 16, seed=number) / 4)
        product = builder.op("MatMul", [states, weight], f"product{number}")
        states = builder.op("Tanh", [product], f"states{number}")
    builder.output(states, ["N", 6, 16])
    return builder


def test_a_model_without_timesteps_is_built_as_well(tmp_path: Path) -> None:
    model = encoder().save(tmp_path / "encoder.onnx")
    session = ort.InferenceSession(model)
    ids = np.random.default_rng(0).integers(0, 20, (16, 6))
    with mpq_deploy.record(session, tmp_path / "calls"):
        for row in ids:
            session.run(None, {"input_ids": row[None]})
    made = build(
        recipe_for(model, calls=str(tmp_path / "calls"), target="onnxruntime-cpu", budget=0.7),
        tmp_path / "run",
    )
    assert made.report["evaluation"]["image_kind"] == "features"
    assert 0 < made.report["measured_nmse"] < 0.1


@pytest.mark.torch
def test_a_module_is_recorded_by_the_names_of_its_parameters(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Denoiser(torch.nn.Module):  # type: ignore[misc]
        """D(x, sigma) with preconditioning inside (Karras et al. 2022)."""

        def forward(self, x: Any, sigma: Any, labels: Any = None) -> Any:
            return x / (1 + sigma.reshape(-1, 1) ** 2) ** 0.5

    module = Denoiser()
    with mpq_deploy.record(module, tmp_path / "calls"):
        for sigma in (80.0, 4.0, 0.1):
            module(torch.ones(3, 5), torch.tensor(sigma), labels=torch.arange(3))
    calls = ScriptCalls.open(tmp_path / "calls")
    assert calls.inputs == ("x", "sigma", "labels") and calls.timestep == "sigma"
    every = calls.grid(None)
    assert every.count == 3 and np.allclose(every.timesteps, (80, 4, 0.1))
    assert every.values("labels", 1, slice(None)).tolist() == [0, 1, 2]


def test_what_cannot_be_recorded_is_said(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    model, calls = recorded
    with pytest.raises(UsageError, match="int cannot be recorded"), mpq_deploy.record(3, tmp_path):
        pass
    with (
        pytest.raises(UsageError, match="is not empty"),
        mpq_deploy.record(ort.InferenceSession(model), calls),
    ):
        pass
    session = ort.InferenceSession(model)
    with (
        pytest.raises(UsageError, match="never called"),
        mpq_deploy.record(session, tmp_path / "none"),
    ):
        pass
    feeds = {"sample": random(2, 3, 8, 8), "timestep": np.array([1, 2], np.float32)}
    with (
        pytest.raises(UsageError, match="2 different values of 'timestep'"),
        mpq_deploy.record(session, tmp_path / "training"),
    ):
        session.run(None, feeds)


def test_altered_or_foreign_calls_are_refused(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    _, calls = recorded
    copy = Path(shutil.copytree(calls, tmp_path / "copy"))
    shard = copy / "calls-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="was altered"):
        ScriptCalls.open(copy)
    with pytest.raises(UsageError, match=f"no {DESCRIPTION}"):
        ScriptCalls.open(tmp_path)
    other = encoder().save(tmp_path / "other.onnx")
    with pytest.raises(UsageError, match="have no input 'input_ids'"):
        build(recipe_for(other, calls=str(calls)), tmp_path / "run", "export")


def test_outputs_are_known_by_their_statistics(recorded: tuple[Path, Path]) -> None:
    model, folder = recorded
    every = ScriptCalls.open(folder).grid(None)
    session = ort.InferenceSession(model)
    feeds = {
        "sample": every.values("sample", 1, slice(4, 5)),
        "timestep": np.full(1, SIGMAS[1], np.float32),
    }
    output = session.run(None, feeds)[0].astype(np.float64)
    assert every.outputs["output.mean"][1, 4] == pytest.approx(output.mean(), abs=1e-6)
    assert every.outputs["output.rms"][1, 4] == pytest.approx(np.sqrt((output**2).mean()), rel=1e-5)


def test_calls_of_another_model_are_refused(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    model = onnx.load(recorded[0])
    (weight,) = (w for w in model.graph.initializer if w.name == "conv_out.weight")
    weight.CopyFrom(
        onnx.numpy_helper.from_array(1.2 * onnx.numpy_helper.to_array(weight), weight.name)
    )
    onnx.save(model, tmp_path / "other.onnx")
    recipe = recipe_for(tmp_path / "other.onnx", calls=str(recorded[1]), target="onnxruntime-cpu")
    with pytest.raises(UsageError, match=r"with another model: at timestep \d+ its output has"):
        build(recipe, tmp_path / "run")


def test_a_modules_inputs_are_taken_before_it_writes_into_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Doubling(torch.nn.Module):  # type: ignore[misc]
        def forward(self, sample: Any) -> dict[str, Any]:
            return {"state": None, "sample": sample.mul_(2)}

    module = Doubling()
    with mpq_deploy.record(module, tmp_path / "calls"):
        for seed in range(2):
            module(torch.from_numpy(random(1, 3, seed=seed)))
    calls = ScriptCalls.open(tmp_path / "calls").grid(None)
    np.testing.assert_array_equal(calls.values("sample", 0, slice(0, 1)), random(1, 3))
    double = 2 * random(1, 3).astype(np.float64)
    assert calls.outputs["output.mean"][0, 0] == pytest.approx(double.mean())

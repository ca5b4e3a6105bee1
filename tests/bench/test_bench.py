"""Timing on this machine's CPU through ONNX Runtime; engines with what can be said of them without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from mpq_deploy.bench import bench as bench_module
from mpq_deploy.bench import sources
from mpq_deploy.bench.__main__ import main
from mpq_deploy.bench.bench import Schedule, bench_text, measure, origin_of, ratio_text, results
from mpq_deploy.bench.from_run import fp16_engine, subjects_of
from mpq_deploy.bench.sources import Wish, parse_shapes, subject_of
from mpq_deploy.bench.statistics import ratio, summary
from mpq_deploy.bench.timed_subject import Subject
from mpq_deploy.bench.worker import random_feeds
from mpq_deploy.delivery.device_results import read_results
from mpq_deploy.engine.record import EngineRecord
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import EngineError, MpqError
from mpq_deploy.recipe import load_recipe
from mpq_deploy.report.read import read_report
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import Talk
from tests.graphs import GraphBuilder
from tests.pipeline.runs import build, call, recipe_for, save_denoiser

SHORT = Schedule(calls=20, rounds=5, warm_up=2)


def product(folder: Path, width: int, dims: tuple[int | str, ...] = ("N",)) -> Path:
    """y = relu(x W)^2, ``width`` wide."""
    g = GraphBuilder()
    x = g.input("x", [*dims, width])
    h = g.op("Relu", [g.matmul(x, "fc1", width, width)], "act")
    g.nodes.append(helper.make_node("Mul", [h, h], ["y"], name="square"))
    g.output("y", [*dims, width])
    return g.save(folder / f"w{width}.onnx")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    build(recipe_for(save_denoiser(folder)), folder / "run", "report")
    return folder / "run"


def test_percentiles_and_rates_are_numpys() -> None:
    times = [float(n) for n in range(1, 102)]
    found = summary(times, batch=4)
    assert (found["p50_ms"], found["p90_ms"], found["p99_ms"], found["calls"]) == (
        51.0,
        91.0,
        100.0,
        101,
    )
    assert found["samples_per_second"] == pytest.approx(4 * 1000 / np.mean(times))


def test_the_ratio_cancels_noise_that_meets_both_and_its_interval_holds_the_truth() -> None:
    rng = np.random.default_rng(0)
    slow = np.repeat(1 + rng.random((20, 1)), 5, axis=1)  # the machine is busy for whole rounds
    ours, other = 0.8 * slow, 1.0 * slow
    exact = ratio(ours.tolist(), other.tolist())
    assert exact["value"] == pytest.approx(0.8) and exact["low"] == pytest.approx(0.8)
    noisy = ratio(
        (ours * (1 + 0.2 * rng.random((20, 5)))).tolist(),
        (other * (1 + 0.2 * rng.random((20, 5)))).tolist(),
    )
    assert noisy["low"] is not None and noisy["high"] is not None
    assert noisy["low"] < 0.8 < noisy["high"] < 0.95
    assert ratio(ours.tolist(), other.tolist()) == exact
    same = ratio((1 + rng.random((20, 5))).tolist(), (1 + rng.random((20, 5))).tolist())
    assert "no difference is shown" in ratio_text(same, "ours", "float")
    assert ratio([[1.0]], [[2.0]])["low"] is None


def test_a_larger_model_takes_longer_and_more_memory(tmp_path: Path) -> None:
    small, large = (
        subject_of(product(tmp_path, width), str(width), Wish(threads=1)) for width in (8, 2048)
    )
    found = results(
        measure([small, large], SHORT, Talk()), origin_of(Path(small.file), "onnxruntime", "cpu")
    )
    one, other = found["bench"]["subjects"]
    assert found["bench"]["ratio"]["high"] < 0.5
    assert one["latency"]["calls"] == other["latency"]["calls"] == 20
    assert one["warm_up"]["calls"] == 2
    assert one["latency"]["p50_ms"] <= one["latency"]["p90_ms"] <= one["latency"]["p99_ms"]
    weights = 4 * 2048 * 2048
    assert other["model_rss_bytes"] - one["model_rss_bytes"] > weights
    assert found["engine"]["bytes"] < weights
    assert max(map(len, bench_text(found).splitlines())) <= 80
    assert "says nothing about the engine" in found["bench"]["note"]


def test_subjects_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ABBA: a drift of the clock rate meets both alike."""
    order: list[str] = []
    real = bench_module._Worker.run

    def noted(self: Any, calls: int) -> Any:
        order.append(f"{self._subject.name}{calls}")
        return real(self, calls)

    monkeypatch.setattr(bench_module._Worker, "run", noted)
    path = product(tmp_path, 8)
    subjects = [subject_of(path, name, Wish(threads=1)) for name in "ab"]
    measure(subjects, Schedule(calls=6, rounds=3, warm_up=1), Talk())
    assert order == ["a1", "b1", "a2", "b2", "b2", "a2", "a2", "b2"]


def test_inputs_are_the_same_each_time_and_of_their_types() -> None:
    wanted = {
        "x": ((2, 3), np.dtype("float16")),
        "t": ((), np.dtype("int64")),
        "m": ((2,), np.dtype("bool")),
    }
    first, second = random_feeds(wanted), random_feeds(wanted)
    for name, (shape, kind) in wanted.items():
        assert first[name].shape == shape and first[name].dtype == kind
        np.testing.assert_array_equal(first[name], second[name])
    assert np.std(first["x"].astype(np.float32)) > 0.1


def test_an_open_shape_must_be_given(tmp_path: Path) -> None:
    path = product(tmp_path, 8, ("N", "L"))
    with pytest.raises(MpqError, match=r"'x' of .* has the open shape \['N', 'L', 8\]") as caught:
        measure([subject_of(path, "a", Wish())], SHORT, Talk())
    assert "--shape x:1xNx8" in caught.value.hint
    wish = Wish(shapes=parse_shapes(["x:3x5x8"]))
    assert measure([subject_of(path, "a", wish)], SHORT, Talk())[0].shapes == {"x": [3, 5, 8]}


def test_a_run_is_held_against_its_float_model_and_the_report_takes_it_in(
    run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    done = call("bench", run, "--calls", 20, "--rounds", 5, "--threads", 1, "--json", "--out", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(file.read_text(encoding="utf-8"))
    read = read_results(file)
    assert read.bench is not None and read.bench.ratio is not None
    assert read.bench.ratio.value == found["bench"]["ratio"]["value"]
    assert [one["name"] for one in found["bench"]["subjects"]] == ["ours", "float"]
    assert found["target"] == "onnxruntime-cpu"
    assert found["device"]["gpu"] == ""
    taken = call("report", run, "--device", file)
    assert taken.returncode == 0, taken.stderr
    report = read_report(run)
    device = report.devices[0]
    assert device.graph and device.ratio is not None and device.ratio.against == "float"
    assert device.median_ms == found["latency"]["p50_ms"]
    assert "of float's time" in (run / "report.md").read_text(encoding="utf-8")
    assert "the graph itself" in (run / "report.html").read_text(encoding="utf-8")
    # A CPU's milliseconds are not a latency of the engine that the run is for.
    gated = call("gate", run, "--max-latency", "10s")
    assert gated.returncode == 1
    assert "No engine latency was measured" in gated.stdout


def test_a_process_that_dies_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys; sys.stderr.write('the end\\n'); os.kill(os.getpid(), 11)", encoding="utf-8"
    )
    monkeypatch.setattr(bench_module, "child_environment", lambda: environment)
    with pytest.raises(EngineError, match="was killed by SIGSEGV: the end"):
        measure([subject_of(product(tmp_path, 8), "a", Wish())], SHORT, Talk())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.onnx"], "There is no nowhere.onnx"),
        (["readme.txt"], r"readme.txt is neither an .onnx nor an .engine file"),
        (["m.engine"], "m.engine cannot be timed: No NVIDIA driver was found"),
        (["m.onnx", "--backend", "tensorrt"], "is a graph: tensorrt runs engines"),
        (["m.onnx", "--backend", "tensort"], "'tensort' is not one of"),
        (["m.onnx", "--calls", "10", "--rounds", "3"], "10 calls in 3 rounds"),
        (["m.onnx", "--shape", "x=1"], "'x=1' is not the shape"),
        (["m.onnx", "--batch", "0"], "Invalid batch 0"),
        (["m.onnx", "--device", "cuda"], "No NVIDIA driver was found"),
        (["m.onnx"], "cannot be read as ONNX"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sources, "why_no_gpu", lambda: "No NVIDIA driver was found")
    monkeypatch.chdir(tmp_path)
    for name in ("m.onnx", "m.engine", "readme.txt"):
        (tmp_path / name).write_text("no model", encoding="utf-8")
    assert main(arguments) in (1, 2)
    assert re.search(words, capsys.readouterr().err)


def test_an_engine_is_run_by_what_its_record_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which library and target, without running: no GPU is here."""
    monkeypatch.setattr(sources, "why_no_gpu", lambda: "")
    record = {
        **dict.fromkeys(("target", "version", "file", "sha256"), "rtx"),
        **dict.fromkeys(("bytes", "weights_bytes", "activation_bytes", "planned_bytes"), 1),
        **{"kernels": {}, "verified": True, "problems": [], "backend": "tensorrt_rtx"},
    }
    (tmp_path / "model.engine").write_bytes(b"e")
    (tmp_path / "build.json").write_text(json.dumps(record), encoding="utf-8")
    subject = subject_of(tmp_path / "model.engine", "ours", Wish())
    assert (subject.backend, subject.device, subject.graphs) == ("tensorrt_rtx", "cuda", True)
    assert origin_of(tmp_path / "model.engine", "tensorrt_rtx", "cuda").target == "rtx"
    (tmp_path / "build.json").write_text(
        json.dumps({**record, "backend": "trtexec"}), encoding="utf-8"
    )
    assert subject_of(tmp_path / "model.engine", "ours", Wish()).backend == "tensorrt"
    assert Subject.from_json(replace(subject, shapes={"x": (1, 2)}).to_json()).shapes == {
        "x": (1, 2)
    }


def test_the_engine_side_needs_numpy_alone(tmp_path: Path) -> None:
    """``python -m mpq_deploy.bench`` with torch, onnx, onnxruntime, pydantic and typer blocked."""
    from tests.device.test_installer import isolated

    package = Path(bench_module.__file__).parents[2]
    environment = {**isolated(tmp_path), "PYTHONPATH": f"{tmp_path}:{package}"}
    (tmp_path / "m.engine").write_bytes(b"no engine")
    command = [sys.executable, "-m", "mpq_deploy.bench", str(tmp_path / "m.engine")]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("mpq-bench: ")
    assert "Traceback" not in done.stderr
    shutil.rmtree(tmp_path)


def test_the_engine_side_serves_orders_with_a_fake_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a FAKE of TensorRT and of the GPU: what is asked, answered and kept; no time here means anything."""
    from mpq_deploy.bench.worker import serve
    from mpq_deploy.device import cuda
    from tests.device import fake_tensorrt

    gpu = fake_tensorrt.FakeCuda()
    monkeypatch.setattr(cuda, "Cuda", lambda: gpu)
    monkeypatch.setitem(sys.modules, "fake_tensorrt", fake_tensorrt)
    (tmp_path / "m.engine").write_bytes(b"rtx")
    answers: list[dict[str, Any]] = []
    orders = iter(["3", "5", ""])
    serve(
        Subject("ours", str(tmp_path / "m.engine"), "fake_tensorrt", "cuda", batch=3),
        lambda: next(orders),
        answers.append,
    )
    opened, *timed = answers
    assert opened["shapes"] == {"x": [3, 3], "t": [3]} and opened["clock"] == "GPU events"
    assert [one["milliseconds"] for one in timed] == [[1.5] * 3, [1.5] * 5]
    # Two inputs and an output, of three rows.
    assert timed[-1]["gpu_bytes"] == 4 * (9 + 3 + 9)
    assert (tmp_path / "model.runtime-cache").read_bytes() == b"fake:3,3"


@pytest.mark.rtx
def test_a_run_with_an_engine_is_held_against_an_fp16_engine_that_is_built_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FP16 graph and engine are really made; that a GPU is here is made up, so nothing is run."""
    pytest.importorskip("tensorrt_rtx")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    recipe = load_recipe(copy / "recipe.yaml")
    with open_pipeline(recipe, copy, Talk()) as pipeline:
        built = fp16_engine(pipeline.run, load_target("rtx"))
        record = EngineRecord.load(built.with_name("build.json"))
        assert record.verified and record.kernels
        assert not any("Int8" in kernel or "Int4" in kernel for kernel in record.kernels)
        shutil.copy(built, copy / "engine" / "model.engine")
        shutil.copy(built.with_name("build.json"), copy / "engine")
        before = built.stat().st_mtime_ns
        subjects, origin = subjects_of(pipeline.run, Wish())
        assert [one.backend for one in subjects] == ["onnxruntime"] * 2  # no GPU is here
        monkeypatch.setattr(sources, "why_no_gpu", lambda: "")
        subjects, origin = subjects_of(pipeline.run, Wish())
        assert [(one.name, one.backend) for one in subjects] == [
            ("ours", "tensorrt_rtx"),
            ("FP16", "tensorrt_rtx"),
        ]
        assert subjects[1].file == str(built.resolve())
        assert (origin.target, set(origin.digests)) == ("rtx", {"allocate", "quantize"})
        assert built.stat().st_mtime_ns == before
        cuda, _ = subjects_of(pipeline.run, Wish(device="cuda", backend="onnxruntime"))
        assert [Path(one.file).parent.name for one in cuda] == ["quantize", "fp16"]

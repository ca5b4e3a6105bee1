"""The student computes what the written graph computes, before and after its parameters moved, for every scheme."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mpq_deploy.calibrate.shifted_inputs import shiftable_inputs
from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.formats.branches.cols import ColsMatrix
from mpq_deploy.formats.branches.lowrank import LowRankMatrix
from mpq_deploy.formats.branches.prescaled import ScaledMatrix
from mpq_deploy.formats.branches.rows import RowsMatrix
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.formats.shifts import SHIFT_FORMS
from mpq_deploy.graph.save import constant_bytes
from mpq_deploy.graph.writers.deployed_graphs import (
    DEPLOYED,
    SIMULATED,
    FloatGraph,
    write_quantized,
)
from mpq_deploy.recipe import RecoverSettings
from mpq_deploy.recover.recover import RecoverTask
from mpq_deploy.recover.student import Student
from mpq_deploy.rounding.quantizers import QuantizedMatrix
from mpq_deploy.runtime.ort import make_session
from tests.recover.cases import SIMULATED_FORMS, Case, make_case, normed_denoiser

pytestmark = pytest.mark.torch
FORMS = (
    "fp16",
    "w8a8",
    "w8a16",
    "w4a16",
    "w4a8",
    "w4a16+rows2",
    "w4a8+rows1",
    "w8a8+cols1",
    "w4a8+cols2",
    "w4a16+lowrank8",
    "w8a8+scale5",
    "w4a8+scale5",
    "w8a8-timestep",
    "w8a8-timestep+scale5",
    "w8a8-dynamic",
    "w4a8-dynamic+scale5",
    *SIMULATED_FORMS,
)


def student_of(task: RecoverTask, margin: float = 0.0, segments: int = 1, rank: int = 4) -> Student:
    options = RecoverSettings(rank=rank, margin=margin, seed=0, segments=segments)
    return Student(task.model, task.spec, task.starts, task.stats, options)


def move(student: Student, size: float) -> None:
    """Move every parameter, as training would: adapters by up to some steps, scales and constants by some per cent."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for kind, parameters in student.kinds().items():
            for parameter, unit in parameters:
                noise = torch.from_numpy(
                    rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
                )
                unit = 1.0 if kind == "adapters" else min(unit, 1.0)
                parameter.add_(size * unit * noise)


def write(task: RecoverTask, student: Student, folder: Path) -> Path:
    folder.mkdir()
    scales, constants = student.activation_scales(), student.learned_constants()
    write_quantized(
        FloatGraph(task.model, "timestep", "sample", constants),
        student.rewrites(task.starts),
        scales,
        folder,
    )
    return folder


def write_start(task: RecoverTask, folder: Path) -> Path:
    """Write the plan as the stage quantize does: nothing of the student."""
    from mpq_deploy.graph.writers.quantize_layers import LayerRewrite

    folder.mkdir()
    rounding = {s.activation_form: s for s in SCHEMES.values() if s.activation}
    found = task.stats.activations
    scales = {n + form: s.input_grid(a) for n, a in found.items() for form, s in rounding.items()}
    rewrites = [LayerRewrite(s.layer, s.scheme, s.matrix) for s in task.starts]
    write_quantized(FloatGraph(task.model, "timestep", "sample"), rewrites, scales, folder)
    return folder


def feeds(count: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    sample = rng.standard_normal((count, 3, 8, 8)).astype(np.float32)
    return {"sample": sample, "timestep": np.array([900.0, 400.0, 20.0], np.float32)[:count]}


def by_runtime(path: Path) -> np.ndarray:
    """One call per sample: the samples of a call have one timestep where ranges follow it."""
    session, given = make_session(path, fake_quant_only=True), feeds()
    calls = [{n: v[i : i + 1] for n, v in given.items()} for i in range(len(given["sample"]))]
    return np.concatenate([session.run(["out_sample"], call)[0] for call in calls])


def by_torch(student: Student) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(student.run(student.feed(feeds()))["out_sample"].numpy())


def rounds(wanted: str) -> bool:
    """Whether a form rounds activations."""
    return wanted != "fp16" and "a16" not in wanted


def assert_same(found: np.ndarray, expected: np.ndarray, rounds_activations: bool) -> None:
    if not rounds_activations:
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
        return
    # A value on a rounding boundary may fall to either side: one step of one activation, of one sample in three.
    errors = np.sum((found - expected) ** 2, axis=(1, 2, 3)) / np.sum(expected**2, axis=(1, 2, 3))
    assert np.median(errors) <= 1e-9 and errors.max() <= 1e-3


@pytest.mark.parametrize("wanted", FORMS)
@pytest.mark.parametrize("margin", [0.0, 0.499])
def test_at_the_start_the_student_is_the_plan(
    case: Case, tmp_path: Path, wanted: str, margin: float
) -> None:
    task = case.planned(wanted)
    assert wanted == "fp16" or any(start.matrix is not None for start in task.starts)
    student = student_of(task, margin)
    assert_same(
        by_torch(student),
        by_runtime(write_start(task, tmp_path / "plan") / SIMULATED),
        rounds(wanted),
    )
    for start, rewrite in zip(task.starts, student.rewrites(task.starts)):
        if start.matrix is not None:
            assert rewrite.matrix is not None
            np.testing.assert_array_equal(rewrite.matrix.dequantize(), start.matrix.dequantize())
    write(task, student, tmp_path / "student")
    for name in (DEPLOYED, SIMULATED):
        before, after = (onnx.load(tmp_path / folder / name) for folder in ("plan", "student"))
        assert before == after  # constants included: not a bit differs


@pytest.mark.parametrize("wanted", FORMS)
def test_merged_parameters_compute_what_was_trained_in_the_same_bytes(
    case: Case, tmp_path: Path, wanted: str
) -> None:
    task = case.planned(wanted)
    student = student_of(task)
    start = by_torch(student)
    move(student, 0.03)
    moved = by_torch(student)
    assert np.abs(moved - start).max() > 0.01 * np.abs(start).max()
    written = write(task, student, tmp_path / "student")
    assert_same(moved, by_runtime(written / SIMULATED), rounds(wanted))
    plan = write_start(task, tmp_path / "plan")
    assert constant_bytes(written / DEPLOYED) == constant_bytes(plan / DEPLOYED)
    kinds = {node.op_type for node in onnx.load(written / DEPLOYED).graph.node}
    assert kinds == {node.op_type for node in onnx.load(plan / DEPLOYED).graph.node}


def shifted(task: RecoverTask) -> RecoverTask:
    """Let the channels of all inputs that may be shifted lie around other codes than 0, by finer steps."""
    known, rng = dict(task.stats.activations), np.random.default_rng(8)
    for tensor in shiftable_inputs(task.graph):
        codes = rng.integers(-30, 60, (len(SHIFT_FORMS), len(known[tensor].amax)))
        scales = np.tile([float(np.float16(0.02)), 1.6], (len(SHIFT_FORMS), 1))
        known[tensor] = replace(known[tensor], shifts=codes.astype(np.int16), shift_scales=scales)
    return replace(task, stats=CalibrationStats(known))


@pytest.mark.parametrize("wanted", ["w8a8+scale5", "w8a8-timestep", "w4a8-dynamic+scale5"])
def test_shifted_channels_are_the_graphs_before_and_after_training(
    case: Case, tmp_path: Path, wanted: str
) -> None:
    task = shifted(case.planned(wanted))
    student = student_of(task)
    plan = write_start(task, tmp_path / "plan")
    assert sum(n.name.endswith("/center") for n in onnx.load(plan / DEPLOYED).graph.node) > 2
    first = write(task, student, tmp_path / "first")
    assert onnx.load(plan / DEPLOYED) == onnx.load(first / DEPLOYED)
    for folder in (plan, tmp_path / "moved"):
        if folder != plan:
            move(student, 0.03)
            write(task, student, folder)
        found, expected = by_torch(student), by_runtime(folder / SIMULATED)
        # The weight's product with the shift is held in FP16, and values on a boundary fall to either side.
        # Rounding itself leaves 20 to 500 times as much here.
        assert np.sum((found - expected) ** 2) <= 1e-3 * np.sum(expected**2)
    assert constant_bytes(tmp_path / "moved" / DEPLOYED) == constant_bytes(plan / DEPLOYED)


def test_a_full_adapter_moves_every_code_by_itself(case: Case, tmp_path: Path) -> None:
    task = case.planned("w4a16")
    student = student_of(task, rank=0)
    weight = next(w for w in student.layer_weights if w.layer.op == "Conv")
    before = weight.matrix().detach()
    with torch.no_grad():
        weight.adapter.up[0, 1] = 1e6
    changed = torch.nonzero(weight.matrix() != before)
    assert weight.adapter.down is None and changed.tolist() == [[0, 1]]
    assert_same(
        by_torch(student), by_runtime(write(task, student, tmp_path / "student") / SIMULATED), False
    )
    factors = torch.ones(len(before), 2), torch.full((2, before.shape[1]), 0.5)
    weight.adapter.start_from(*factors)
    torch.testing.assert_close(weight.adapter(), torch.ones_like(before))


@pytest.mark.parametrize("wanted", ["w8a8+scale5", "w4a8+scale5"])
def test_factors_that_a_norm_takes_are_in_its_constants(tmp_path: Path, wanted: str) -> None:
    task = make_case(tmp_path / "case", normed_denoiser()).planned(wanted)
    student = student_of(task)
    plan = write_start(task, tmp_path / "plan")
    muls = [node.name for node in onnx.load(plan / DEPLOYED).graph.node if "prescale" in node.name]
    assert muls and not any("norm" in name for name in muls)
    assert_same(by_torch(student), by_runtime(plan / SIMULATED), True)
    first = write(task, student, tmp_path / "first")
    assert onnx.load(plan / DEPLOYED) == onnx.load(first / DEPLOYED)
    move(student, 0.03)
    moved = write(task, student, tmp_path / "moved")
    assert_same(by_torch(student), by_runtime(moved / SIMULATED), True)
    assert constant_bytes(moved / DEPLOYED) == constant_bytes(plan / DEPLOYED)


def test_codes_of_every_form_move_and_stay_in_range(case: Case) -> None:
    for wanted in sorted(set(FORMS[1:]) - set(SIMULATED_FORMS)):
        task = case.planned(wanted)
        student = student_of(task)
        move(student, 0.3)
        changed = 0
        for start, rewrite in zip(task.starts, student.rewrites(task.starts)):
            for before, after in zip(grids(start.matrix), grids(rewrite.matrix)):
                changed += int((before.codes != after.codes).sum())
                limit = (
                    7
                    if "w4" in wanted and before.codes.min() >= -8 and before.codes.max() <= 7
                    else 127
                )
                assert after.codes.max() <= limit
                assert after.scale.dtype == np.float16 and np.all(after.scale > 0)
        assert changed


def grids(matrix: object) -> list[QuantizedMatrix]:
    if matrix is None:
        return []
    if isinstance(matrix, RowsMatrix):
        return [matrix.body, matrix.promoted]
    if isinstance(matrix, (ColsMatrix, LowRankMatrix, ScaledMatrix)):
        return [matrix.body]
    assert isinstance(matrix, QuantizedMatrix)
    return [matrix]


def test_checkpointed_segments_give_the_same_gradients(case: Case) -> None:
    task = case.planned("w4a8")
    found = []
    for segments in (1, 5):
        student = student_of(task, segments=segments)
        student.run(student.feed(feeds()))["out_sample"].square().sum().backward()
        found.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_every_parameter_learns(case: Case) -> None:
    """After one step of the output's error all kinds have gradients; A has none while B is zero."""
    silent: Callable[[str], bool] = lambda name: name.endswith("adapter.down")  # noqa: E731
    for wanted in (
        "w4a16",
        "w3a6-sim+zres",
        "w3a6-sim+omq",
        "w4a8+cols1",
        "w4a16+lowrank8",
        "w4a8+rows1",
    ):
        student = student_of(case.planned(wanted))
        student.run(student.feed(feeds()))["out_sample"].square().sum().backward()
        dead = [
            n
            for n, p in student.named_parameters()
            if p.grad is None or not bool(p.grad.abs().sum() > 0)
        ]
        assert all(silent(name) or "bias" in name for name in dead), dead

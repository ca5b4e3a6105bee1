"""Every rule of the checker: its graph is found, good forms are not, and TensorRT-RTX does what the rule says."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from mpq_deploy.check.check import RULES, check_model
from mpq_deploy.check.rule import ERRORS
from mpq_deploy.engine.build_log import EngineLog, parse_engine_log
from mpq_deploy.engine.build_worker import BuildJob, InputShapes
from mpq_deploy.engine.builder import WORKER
from mpq_deploy.engine.target import load_target
from mpq_deploy.graph.dialects import DIALECTS
from mpq_deploy.system.children import run_child
from tests.check.forms import BAD, GOOD, Form, model_of

IDS = [f"{form.rule}-{form.target}-{number}" for number, form in enumerate(BAD)]
# TensorRT-RTX is asked what its rules say; the other targets' rules come from documents.
BUILT = [
    form
    for form in (*BAD, *GOOD)
    if load_target(form.target).builder == "tensorrt_rtx" and form.build
]


@pytest.mark.parametrize("form", BAD, ids=IDS)
def test_each_rule_finds_its_form_and_says_how_to_change_it(form: Form, tmp_path: Path) -> None:
    onnx.save(model_of(form), tmp_path / "m.onnx")
    result = check_model(tmp_path / "m.onnx", load_target(form.target))
    found = [finding for finding in result.findings if finding.rule == form.rule]
    assert found, [finding.rule for finding in result.findings]
    assert all(finding.message and finding.fix for finding in found)
    assert max(map(len, result.text().splitlines())) <= 80 or str(tmp_path) in result.text()
    if form.build == "fails":
        assert any(finding.effect in ERRORS for finding in found)


@pytest.mark.parametrize("form", GOOD, ids=range(len(GOOD)))
def test_no_rule_objects_to_a_good_form(form: Form, tmp_path: Path) -> None:
    onnx.save(model_of(form), tmp_path / "m.onnx")
    result = check_model(tmp_path / "m.onnx", load_target(form.target))
    assert [finding.rule for finding in result.findings] == []
    assert result.passes(strict=True)


def test_every_rule_has_a_form_and_every_verdict_a_dialect() -> None:
    assert {rule.name for rule in RULES} == {form.rule for form in BAD}
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule.verdicts) <= set(DIALECTS)
        proofs = {name: verdict.proof for name, verdict in rule.verdicts.items()}
        assert all(
            proof != "built here" for name, proof in proofs.items() if DIALECTS[name].proper
        ), rule.name


def test_every_rule_is_documented_with_what_it_does_where() -> None:
    rows = [
        line.split("|")
        for line in Path("docs/targets.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    documented = {
        row[1].strip(" `"): [cell.strip() for cell in row[3:8]] for row in rows if len(row) == 9
    }
    marks = {"built here": "", "documented": " (d)", "unproven": " (u)"}
    for rule in RULES:
        cells = [
            rule.verdicts.get(name)
            for name in ("trt-10.3", "trt-10.13", "trt-11", "trt-rtx", "onnxruntime")
        ]
        assert documented[rule.name] == [
            one.effect + marks[one.proof] if one else "" for one in cells
        ]


def built(form: Form, folder: Path) -> EngineLog | None:
    """The engine's log; None when the builder refuses or crashes."""
    onnx.save(model_of(form), folder / "m.onnx")
    shapes = (
        {"x": InputShapes(*((size, *form.shape) for size in (1, 2, 4)))}
        if form.batch == "batch"
        else {}
    )
    names = [str(folder / name) for name in ("m.onnx", "engine", "log", "result")]
    BuildJob("tensorrt_rtx", *names, load_target(form.target).compute_capabilities, shapes).save(
        folder / "job.json"
    )
    done = run_child(WORKER, str(folder / "job.json"))
    if done.returncode < 0 or "errors" in json.loads(
        (folder / "result").read_text(encoding="utf-8")
    ):
        return None
    return parse_engine_log((folder / "log").read_text(encoding="utf-8"))


@pytest.mark.rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    "form", BUILT, ids=[f"{form.rule or 'good'}-{number}" for number, form in enumerate(BUILT)]
)
def test_tensorrt_rtx_does_what_the_rule_says(form: Form, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    log = built(form, tmp_path)
    assert (log is None) == (form.build == "fails")
    if log is None:
        return
    narrow = ("Int4", "Int8", "FP8", "FP4")
    computing = [layer for layer in log.layers if layer.compute]
    if form.build == "half":
        # A fusion reads INT8 and dequantizes it: only these multiply integers.
        kernels = [layer for layer in computing if layer.type in ("gemm", "correlation", "deconv")]
        inputs = {tensor.dtype for layer in kernels for tensor in layer.inputs}
        assert "Int8" not in inputs, log.summary()
    if form.build == "unpacked":
        unpacking = [
            layer
            for layer in log.layers
            if not layer.compute
            and any(tensor.dtype.startswith(narrow) for tensor in layer.constants)
        ]
        assert unpacking, [(layer.type, [t.dtype for t in layer.constants]) for layer in log.layers]
    if not form.rule and form.target == "rtx" and computing:
        fused = all(layer.constants or "Int8" in layer.operand_dtypes for layer in computing)
        assert fused, log.summary()

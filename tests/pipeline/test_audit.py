"""An audit of the tiny model: what it writes, that it continues where it stopped, and what users can get wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpq_deploy.allocate.plan_solver import PlanSolver
from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.evaluate import Variant, evaluate
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.graph.writers.plan_graphs import write_plan
from mpq_deploy.report.audit_page import audit_table, write_audit
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.sensitivity.exhaustive import measure_exhaustive
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.studies import compared_losses as losses_module
from mpq_deploy.studies.audit import AUDITED, AuditOptions, check_images, run_audit
from mpq_deploy.studies.audit_result import AuditResult
from mpq_deploy.studies.compared_losses import Losses
from mpq_deploy.studies.compared_plans import PlanQuality
from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import Notes, recipe_for, write_recipe

CHANGES: dict[str, Any] = {
    "allocate__branches": [],
    "allocate__ranges": [],
    "calibrate__samples": 12,
    "measure__samples": 8,
    "measure__batch_size": 8,
    "measure__timesteps": 2,
}
QUICK = ("local_error", "kurtosis", "orm", "size-only", "random")
FLOOR, BUDGET = 0.1, 0.4


def audit(
    model: Path, run: Path, options: AuditOptions, **changes: Any
) -> tuple[AuditResult, list[str]]:
    notes = Notes()
    with open_pipeline(recipe_for(model, **{**CHANGES, **changes}), run, notes) as pipeline:
        result = run_audit(pipeline.current("candidates"), options)
        write_audit(result, run)
    return result, notes.lines


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "run"


@pytest.fixture(scope="module")
def found(model: Path, place: Path) -> AuditResult:
    methods = tuple(m for m in AUDITED if m in (*QUICK, "gain"))
    return audit(model, place, AuditOptions((FLOOR, BUDGET, 0.5), methods))[0]


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_gain_agrees_and_what_knows_nothing_does_not(found: AuditResult) -> None:
    rho = {row.key: row.pooled.rho for row in found.metrics if row.pooled}
    assert rho["gain"] is not None and rho["gain"] > 0.9
    assert rho["size-only"] is None
    gain = found.metric("gain")
    assert gain is not None and gain.calibration is not None and 0.3 < gain.calibration.median < 3
    orm = found.metric("orm")
    assert (
        orm is not None and orm.calibration is None and set(orm.classes or {}) == {"w8a8", "w4a8"}
    )
    assert found.truth.complete and found.truth.pairs == len(found.losses)


def test_every_metric_and_the_truth_have_plans_within_the_budget(found: AuditResult) -> None:
    assert [row.key for row in found.metrics] == ["gain", *QUICK, "exhaustive"]
    for row in found.metrics:
        floor, point, larger = row.plans
        assert floor.nmse is None and "smallest feasible" in floor.refused
        assert point.nmse and point.nmse_error and point.size_ratio and point.size_ratio <= BUDGET
        assert larger.psnr_db is not None


def test_the_three_reports_hold_it(found: AuditResult, place: Path) -> None:
    written = json.loads((place / "audit.json").read_text(encoding="utf-8"))
    assert without_seconds(written) == without_seconds(json.loads(json.dumps(found.as_json())))
    html, text = ((place / f"audit.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    for page in (html, text):
        assert "Does orthogonality capture quantization sensitivity?" in page
        assert "the same 8 calls at each of 2 timesteps" in page and "our reading" in page
    assert html.count("<svg") == 4 and "://" not in html
    for name in ("correlation", "scatter", "nmse", "psnr"):
        drawn = (place / f"audit-{name}.svg").read_text(encoding="utf-8")
        assert drawn.startswith("<svg xmlns=") and f"audit-{name}.svg" in text


def test_the_terminals_table_fits_eighty_columns(found: AuditResult) -> None:
    many = replace(
        found,
        budgets=found.budgets * 4,
        metrics=tuple(replace(m, plans=m.plans * 4) for m in found.metrics),
    )
    for result in (found, many):
        assert max(map(len, audit_table(result).splitlines())) <= 80


def test_a_second_audit_measures_nothing(found: AuditResult, model: Path, place: Path) -> None:
    again, said = audit(
        model,
        place,
        AuditOptions(found.budgets, tuple(m for m in AUDITED if m in (*QUICK, "gain"))),
    )
    assert not [line for line in said if "processor time" in line]
    assert again.as_json() == found.as_json()


class Killed(BaseException):
    """Ends an audit as a signal would: nothing catches it."""


@pytest.mark.parametrize("plans", [0, 3])
def test_killed_between_plans_it_goes_on(
    found: AuditResult,
    model: Path,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plans: int,
) -> None:
    shutil.copytree(place, tmp_path / "run", ignore=shutil.ignore_patterns("plans", ".samples"))
    measure, counted = PlanQuality._measure, []

    def until_killed(self: PlanQuality, schemes: dict[str, str]) -> dict[str, Any]:
        if len(counted) == plans:
            raise Killed
        counted.append(schemes)
        return measure(self, schemes)

    options = AuditOptions(found.budgets, tuple(m for m in AUDITED if m in (*QUICK, "gain")))
    with monkeypatch.context() as patch:
        patch.setattr(PlanQuality, "_measure", until_killed)
        with pytest.raises(Killed):
            audit(model, tmp_path / "run", options)
    kept = list((tmp_path / "run" / "audit" / "plans").glob("*.json"))
    assert len(kept) == plans
    result, said = audit(model, tmp_path / "run", options)
    assert not [line for line in said if "processor time" in line]
    assert without_seconds(result.as_json()) == without_seconds(found.as_json())


def test_killed_in_the_truth_it_keeps_the_parts(
    found: AuditResult, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_module, "SHARD", 20)
    calls = []

    def second_dies(subject: Subject, **more: Any) -> Any:
        calls.append(more)
        if len(calls) == 2:
            raise Killed
        return measure_exhaustive(subject, **more)

    options = AuditOptions((BUDGET,), ("random",), pairs=40)
    with monkeypatch.context() as patch:
        patch.setattr(losses_module, "measure_exhaustive", second_dies)
        with pytest.raises(Killed):
            audit(model, tmp_path / "run", options)
    result, said = audit(model, tmp_path / "run", options)
    assert len([line for line in said if "exhaustive" in line and "processor time" in line]) == 1
    whole = {(row["layer"], row["scheme"]): row["exhaustive"] for row in found.losses}
    assert len(result.losses) == 40 and not result.truth.complete
    # Parts of the truth are what the whole says.
    for row in result.losses:
        assert row["exhaustive"] == pytest.approx(whole[row["layer"], row["scheme"]], rel=1e-5)
    assert result.metric("exhaustive").plans == ()  # type: ignore[union-attr]
    assert any("40 of" in note and "stratified" in note for note in result.notes)


def test_a_perfect_metric_has_correlation_one_and_the_best_plan(
    model: Path, place: Path, found: AuditResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perfect(method: str, subject: Subject) -> Any:
        return measure_exhaustive(subject)

    monkeypatch.setattr(losses_module, "measure", perfect)
    result, _ = audit(model, tmp_path / "run", AuditOptions((BUDGET,), ("gain",)))
    row, truth = result.metric("gain"), result.metric("exhaustive")
    assert (
        row is not None and truth is not None and row.pooled is not None and row.classes is not None
    )
    assert [c.rho for c in (row.pooled, *row.classes.values())] == pytest.approx([1.0] * 5)
    assert row.plans == truth.plans
    with open_pipeline(
        recipe_for(model, **CHANGES, allocate__objective="quality"), place, Notes()
    ) as pipeline:
        pipeline.run_until("candidates")
        losses = Losses(pipeline.run, 8)
        exact = losses.truth(600).table
        best = exact.plan_loss(PlanSolver(pipeline.run, table=exact).solve(str(BUDGET)).schemes)
        for method in QUICK:
            schemes = (
                PlanSolver(pipeline.run, table=losses.metric(method)).solve(str(BUDGET)).schemes
            )
            assert exact.plan_loss(schemes) >= best * (1 - 1e-4)


def test_trajectory_probes_predict_what_single_layers_do_to_final_images(
    found: AuditResult, model: Path, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place, tmp_path / "run")
    options = AuditOptions((BUDGET,), ("trajectory", "size-only"), images=True)
    # As many steps as the trajectories have.
    changes = {"evaluate__samples": 16, "evaluate__steps": 4, "measure__probes": 8}
    result, _ = audit(model, tmp_path / "run", options, **changes)
    trajectory, size = result.metric("trajectory"), result.metric("size-only")
    assert trajectory is not None and trajectory.images is not None and size is not None
    assert trajectory.images.rho is not None and trajectory.images.rho > 0.9
    assert trajectory.images_calibration is not None
    assert 0.5 < trajectory.images_calibration.median < 2
    assert size.images is not None and size.images.rho is None and size.images_calibration is None
    # One pair again: the images of a plan with that layer alone, as arrays.
    row = max((row for row in result.losses), key=lambda row: row["images"])
    recipe = recipe_for(model, **{**CHANGES, **changes})
    with open_pipeline(recipe, tmp_path / "run", Notes()) as pipeline:
        run = pipeline.current("candidates")
        schemes = dict.fromkeys((layer.name for layer in run.exported.graph.layers), "fp16")
        write_plan(run, {**schemes, row["layer"]: row["scheme"]}, tmp_path)
        sampled = evaluate(
            {"one": Variant(tmp_path / SIMULATED)}, run.exported.model, run.recipe.evaluate
        )
    ours, theirs = (sampled.images[name] / 255 for name in ("float", "one"))
    assert row["images"] == pytest.approx(np.mean((ours - theirs) ** 2), rel=0.2)
    # The three pages have it.
    write_audit(result, tmp_path)
    assert "Agreement with the error of final images" in (tmp_path / "audit.md").read_text("utf-8")
    assert "Agreement with the error of final images" in (tmp_path / "audit.html").read_text(
        "utf-8"
    )
    assert "error of final images" in audit_table(result)
    assert max(map(len, audit_table(result).splitlines())) <= 80
    assert found.image_seconds is None and "final images" not in audit_table(found)


def test_images_of_a_model_that_nobody_samples_are_refused(model: Path, place: Path) -> None:
    with open_pipeline(recipe_for(model, **CHANGES), place, Notes()) as pipeline:
        spec = pipeline.current("export").exported.spec
    check_images(spec)
    with pytest.raises(UsageError, match="only recorded calls are known"):
        check_images(spec.model_copy(update={"recorded": True}))


def test_few_calls_are_said_in_the_result(model: Path, tmp_path: Path) -> None:
    audit(model, tmp_path / "run", AuditOptions((BUDGET,), ("orm",), pairs=10, samples=4))
    written = (tmp_path / "run" / "audit.json").read_text(encoding="utf-8")
    assert "only 4 calls" in written and "4 calls are few for orm" in written
    again, said = audit(
        model, tmp_path / "run", AuditOptions((BUDGET,), ("orm", "size-only"), pairs=10, samples=2)
    )
    orm, size = again.metric("orm"), again.metric("size-only")
    assert orm is not None and "needs 3" in orm.refused and orm.plans == ()
    assert size is not None and size.plans[0].nmse
    assert "needs 3" in (tmp_path / "run" / "audit.md").read_text(encoding="utf-8")
    assert any("orm is not measured" in line for line in said)


@pytest.fixture
def refuse(cli: Callable[..., Outcome], model: Path, tmp_path: Path) -> Callable[..., str]:
    def call(*arguments: object) -> str:
        names = {key: value for key, value in CHANGES.items() if key != "allocate__branches"}
        recipe = write_recipe(tmp_path / "recipe.yaml", **names)
        outcome = cli("audit", model, "-r", recipe, "-o", tmp_path / "run", *arguments)
        assert outcome.code == 2 and outcome.out == "", outcome.err
        return outcome.err

    return call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--methods", "probe,kurtosi"),
            ("Unknown method 'kurtosi'", "Did you mean 'kurtosis'?", "size-only"),
        ),
        (("--methods", ","), ("No methods", "probe")),
        (("--methods", "exhaustive"), ("what the methods are compared with",)),
        (("--budgets", "much"), ("Invalid budgets 'much'",)),
        (("--pairs", "0"), ("--pairs",)),
        (
            ("--samples", "9", "--methods", "random"),
            ("9 calls per timestep, but there are 8", "--samples 8"),
        ),
        (("--set", "measure.timestep=2"), ("'measure.timestep'", "Did you mean 'timesteps'?")),
        (("--set", "measure.timesteps"), ("Invalid --set measure.timesteps", "KEY=VALUE")),
        (
            ("--set", "measure.timesteps=5"),
            ("measure.timesteps is 5, but the sampler takes only 4 steps",),
        ),
        (
            ("--set", "measure.sampling=adaptive", "--set", "measure.coarse_timesteps=2"),
            ("measure.sampling is adaptive",),
        ),
    ],
)
def test_what_a_user_can_get_wrong(
    refuse: Callable[..., str], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    said = refuse(*arguments)
    assert "Traceback" not in said
    for word in words:
        assert word in said, (word, said)


def test_a_build_is_left_alone(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run" / "allocate").mkdir(parents=True)
    assert "holds a build" in refuse()


def test_the_command_prints_json(cli: Callable[..., Outcome], model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", **CHANGES)
    options = ("--methods", "random", "--pairs", 12, "--budgets", "0.4", "--json")
    outcome = cli("audit", model, "-r", recipe, "-o", tmp_path / "run", *options)
    assert outcome.code == 0, outcome.err
    values = json.loads(outcome.out)
    assert values["truth"]["pairs"] == 12 and [m["key"] for m in values["metrics"]] == [
        "random",
        "exhaustive",
    ]

"""Several targets in one run: the same results as alone, what they share measured once, added later or at once."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mpq_deploy.cli import app
from mpq_deploy.cli.app import run_until
from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.recipe import Recipe, load_recipe, make_recipe, recipe_over
from mpq_deploy.report import words
from mpq_deploy.report.read import read_report
from mpq_deploy.rounding.hessian import Gathering
from mpq_deploy.run.effort import open_counts
from mpq_deploy.run.folder import RunFolder, base_of, begin_target, open_targets, targets_in
from mpq_deploy.run.several_targets import runs_of, targets_going_on
from mpq_deploy.run.stage_work import ModelWork, works
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.probe import Probing
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.stages import measure
from mpq_deploy.stages.measure import kept_parts
from mpq_deploy.system.progress import Talk
from tests.pipeline import runs

# The first two take the same schemes, the last one more; convolutions are other products there.
NANO, AGX, RTX = "jetson-orin-nano", "jetson-agx-orin", "rtx"
ALL = f"{NANO},{AGX},{RTX}"
MADE = ("candidates", "measure", "allocate", "quantize")
Pairs = set[tuple[str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_denoiser(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def passes() -> Counter[str]:
    """Times that a whole run of several targets went through the model, for rows and for probes."""
    return Counter()


@pytest.fixture(scope="module")
def at_once(model: Path, passes: Counter[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("at-once") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((Gathering, "rows"), (Probing, "probe")):
            patch.setattr(place, name, counting(getattr(place, name), passes, name))
        run_until("quantize", runs.recipe_for(model, target=ALL), run)
    return run


def counting(original: Any, passes: Counter[str], name: str) -> Any:
    def counted(*given: Any) -> Any:
        passes[name] += 1
        return original(*given)

    return counted


def of(run: Path, target: str) -> Path:
    return run / "targets" / target


def content(run: Path, *stages: str) -> dict[str, bytes]:
    files = [path for stage in stages for path in sorted((run / stage).rglob("*"))]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.is_file()}


def pairs(run: Path) -> Pairs:
    losses = SensitivityTable.load(run / "measure").losses
    return {(layer, scheme) for layer, row in losses.items() for scheme in row}


def test_each_target_has_the_plan_and_the_graphs_that_it_has_alone(
    model: Path, at_once: Path, tmp_path: Path
) -> None:
    for target in (NANO, AGX, RTX):
        runs.build(runs.recipe_for(model, target=target), tmp_path / target, "quantize")
    for target in (NANO, AGX):
        assert content(of(at_once, target), *MADE) == content(tmp_path / target, *MADE)
    # Where more is measured side by side, sums of the projections round otherwise.
    assert content(of(at_once, RTX), "candidates") == content(tmp_path / RTX, "candidates")
    tables = [SensitivityTable.load(run / "measure") for run in (of(at_once, RTX), tmp_path / RTX)]
    ours, alone = (np.array([v for row in t.losses.values() for v in row.values()]) for t in tables)
    assert pairs(of(at_once, RTX)) == pairs(tmp_path / RTX)
    np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-12)


def test_all_targets_share_their_passes_through_the_model(
    model: Path, at_once: Path, passes: Counter[str], tmp_path: Path
) -> None:
    alone, run = Counter[str](), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((Gathering, "rows"), (Probing, "probe")):
            patch.setattr(place, name, counting(getattr(place, name), alone, name))
        runs.build(runs.recipe_for(model, target=RTX), run, "measure")
    assert passes == alone and passes["rows"] and passes["probe"]
    assert not any(at_once.glob("targets/*/.shards"))


def test_what_other_targets_passes_left_is_not_forecast_again(model: Path, tmp_path: Path) -> None:
    recipe = runs.recipe_for(model, target=f"{NANO},{RTX}")
    first, second = runs_of(recipe, tmp_path / "run")
    with open_targets(tmp_path / "run"):
        sys.modules["mpq_deploy.cli.app"]._run_one("measure", *first, None, [second])
    run = Run.opened(second[1], Talk())
    work = ModelWork.of(run)
    left = replace(work, probed=kept_parts(run))
    assert works(run.recipe, work)["measure"].adjoints and run.digest("candidates")
    assert works(run.recipe, left)["measure"].adjoints == 0
    both, own = (ModelWork.of(Run.opened(first[1], Talk()), *more) for more in ((run,), ()))
    assert both.pairs == own.pairs
    assert sum(one.forms for one in both.layers) > sum(one.forms for one in own.layers)


def test_export_and_calibration_lie_in_the_run_alone(at_once: Path) -> None:
    assert [one.name for one in targets_in(at_once)] == [NANO, AGX, RTX]
    for name in ("export", "calibrate"):
        assert (at_once / name).is_dir()
        assert not any(of(at_once, target).joinpath(name).exists() for target in (NANO, AGX, RTX))
    assert not (at_once / "candidates").exists()
    assert RunFolder(of(at_once, RTX)).timings().keys() >= {"export", "measure"}


def test_a_target_added_later_measures_its_new_pairs_and_ends_with_the_same_bytes(
    model: Path, at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run_until("quantize", runs.recipe_for(model, target=f"{NANO},{AGX}"), run)
    measured: Pairs = set()
    original = measure.measure

    def watched(method: str, subject: Any) -> Any:
        found = subject.candidates.items()
        measured.update((layer, s.name) for layer, c in found for s in c.schemes)
        return original(method, subject)

    monkeypatch.setattr(measure, "measure", watched)
    run_until("quantize", runs.recipe_for(model, target=RTX), run)
    for target in (NANO, AGX, RTX):
        assert content(of(run, target), *MADE) == content(of(at_once, target), *MADE)
    # Again are weights whose blocks run another way in a product, and bodies beside a new branch.
    again = {scheme.partition("-")[0] for _, scheme in measured & pairs(of(run, NANO))}
    assert measured < pairs(of(run, RTX)) and again <= {"w4a16"}
    measured.clear()
    run_until("quantize", runs.recipe_for(model, target="jetson-orin-nx"), run)
    assert not measured


def test_a_targets_folder_works_as_a_run_and_the_run_works_on_all(
    at_once: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = CliRunner().invoke
    result = run(app, ["-q", "allocate", str(of(at_once, NANO)), "--budget", "0.5"])
    assert result.exit_code == 0 and load_recipe(of(at_once, NANO) / "recipe.yaml").target == NANO
    assert base_of(of(at_once, NANO)) == at_once
    monkeypatch.chdir(of(at_once, NANO))
    assert RunFolder(Path()).stage("export") == at_once / "export"
    monkeypatch.chdir(tmp_path)
    result = run(app, ["-q", "--json", "package", str(at_once)])
    written = json.loads(result.stdout)["targets"]
    assert {Path(one["file"]).name for one in written.values()} == {
        f"run-{target}.mpq.tar" for target in (NANO, AGX, RTX, *written)
    }
    assert run(app, ["-q", "quantize", str(at_once)]).exit_code == 0


@pytest.fixture(scope="module")
def reported(at_once: Path) -> Path:
    assert CliRunner().invoke(app, ["-q", "report", str(at_once), "--as-is"]).exit_code == 0
    return at_once


def test_the_run_has_a_page_with_a_row_for_each_target(reported: Path) -> None:
    page = (reported / "report.html").read_text(encoding="utf-8")
    for target in (NANO, AGX, RTX):
        assert page.count(f'<a href="targets/{target}/report.html">{target}</a>') == 1
        assert (reported / "targets" / target / "report.html").is_file()
        assert digits_of(reported, target) in page


def digits_of(run: Path, target: str) -> str:
    return words.size(read_report(of(run, target)).size_bytes)


def test_gate_holds_all_targets_in_a_line_each(reported: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    kept = run(app, ["gate", str(reported), "--max-size", "0.55"])
    assert kept.exit_code == 0
    assert [line.partition(":")[0] for line in kept.stdout.splitlines()] == [NANO, AGX, RTX]
    sizes = {t: read_report(of(reported, t)).size_bytes for t in (NANO, AGX, RTX)}
    limit, junit = min(sizes.values()), tmp_path / "junit.xml"
    options = ["--max-size", f"{limit}B", "--max-nmse", "1", "--junit", str(junit)]
    missed = run(app, ["gate", str(reported), *options, "--json"])
    results = json.loads(missed.stdout)["targets"]
    assert missed.exit_code == 1 and set(results) == set(sizes)
    for target, result in results.items():
        size, error = result["outcomes"]
        assert (size["status"] == "passed") == (sizes[target] <= limit)
        assert error["status"] == "not measured"
    assert junit.read_text(encoding="utf-8").count("<testsuite ") == 3
    line = run(app, ["gate", str(reported), *options, "--target", RTX]).stdout
    assert line.startswith(f"{RTX}: FAILED: ") and "output error (NMSE))" in line
    same = run(app, ["gate", str(reported), "--max-size", "1", "--target", AGX])
    assert same.exit_code == 0 and same.stdout.count("\n") == 1


def test_compare_takes_targets_by_name(reported: Path, tmp_path: Path) -> None:
    run, page = CliRunner().invoke, str(tmp_path / "page.html")
    twice = ["compare", str(reported), str(reported)]
    found = json.loads(run(app, [*twice, "--json"]).stdout)["targets"]
    for target, comparison in found.items():
        assert {one["target"] for one in comparison["runs"]} == {target}
        assert comparison["against_first"][0]["plan"]["changed"] == 0
    assert set(found) == {NANO, AGX, RTX}
    refused = run(app, [*twice, "--html", page])
    assert isinstance(refused.exception, UsageError) or refused.exit_code == 2
    assert run(app, [*twice, "--html", page, "--target", RTX]).exit_code == 0
    one = ["compare", str(reported), str(of(reported, NANO)), "--target", RTX]
    assert run(app, one).exit_code == 0


def test_sweep_and_bench_take_each_target(reported: Path) -> None:
    run = CliRunner().invoke
    swept = run(app, ["-q", "--json", "sweep", str(reported), "--budgets", "0.5,0.6"])
    assert set(json.loads(swept.stdout)["targets"]) == {NANO, AGX, RTX}
    assert all((of(reported, target) / "sweep.html").is_file() for target in (NANO, AGX, RTX))
    few = ["--calls", "2", "--rounds", "2", "--warm-up", "1", "--device", "cpu", "--target", RTX]
    timed = run(app, ["-q", "--json", "bench", str(reported), *few])
    assert timed.exit_code == 0, timed.exception
    assert set(json.loads(timed.stdout)["targets"]) == {RTX}


@pytest.mark.parametrize("command", ["gate", "compare", "sweep", "bench", "report", "package"])
def test_a_target_that_the_run_lacks_is_answered_with_those_it_has(
    reported: Path, command: str
) -> None:
    limits = ["--max-size", "1"] if command == "gate" else []
    result = CliRunner().invoke(app, [command, str(reported), "--target", "rtx-ada", *limits])
    assert isinstance(result.exception, UsageError)
    said = f"{result.exception.message} {result.exception.hint}"
    assert all(part in said for part in ("no target 'rtx-ada'", NANO, AGX, RTX))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("rtx,rtx-blackwel", "Unknown target 'rtx-blackwel'.*Did you mean 'rtx-blackwell'"),
        ("rtx,rtx", "'rtx' is given twice"),
        ("rtx,", "An empty name in the list of targets 'rtx,'"),
        (["rtx", "rtx"], "given twice"),
    ],
)
def test_a_wrong_list_is_refused_before_any_work(target: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_until("export", make_recipe({"target": target}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=f"(?s){said}"):
        raise UsageError(f"{caught.value.message} {caught.value.hint}")


def test_one_line_says_which_target_to_name(at_once: Path) -> None:
    with pytest.raises(MpqError, match=f"run has no target '{RTX}-ada'"):
        read_report(of(at_once, f"{RTX}-ada"))
    with pytest.raises(MpqError, match="run holds several targets"):
        read_report(at_once)
    with pytest.raises(UsageError, match="run holds several targets"):
        runs.build(make_recipe({}), at_once)
    for arguments in (["sample", str(at_once)], ["package", str(at_once), "-o", "one.tar"]):
        assert CliRunner().invoke(app, ["-q", *arguments]).exit_code != 0
    with pytest.raises(UsageError, match="which holds the others"):
        runs_of(make_recipe({"target": ALL}), of(at_once, NANO))


def test_a_target_is_added_with_the_calls_of_the_others(model: Path, at_once: Path) -> None:
    other = runs.recipe_for(model, target="rtx-ada", calibrate__samples=5)
    with pytest.raises(UsageError, match=f"'calibrate' is not as .*{NANO} was built"):
        runs_of(other, at_once)
    assert len(runs_of(runs.recipe_for(model, target=ALL, calibrate__samples=5), at_once)) == 3
    assert len(runs_of(runs.recipe_for(model), at_once)) == 3


def test_another_effort_goes_on_for_all_targets(
    at_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Recipe] = []
    commands = sys.modules["mpq_deploy.cli.app"]
    monkeypatch.setattr(
        commands, "_run_all", lambda stage, all, crew: begun.extend(r for r, _ in all)
    )
    assert CliRunner().invoke(app, ["build", "-o", str(at_once)]).exit_code == 0
    assert (
        CliRunner().invoke(app, ["build", "-o", str(at_once), "--effort", "quick"]).exit_code == 0
    )
    kept, opened = begun[:3], begun[3:]
    assert not any(map(open_counts, kept)) and all(map(open_counts, opened))
    assert {one.effort for one in opened} == {"quick"}


@pytest.mark.parametrize("arguments", [["--target", f"{ALL},rtx-ada"], ["--recover"]])
def test_without_a_model_a_build_goes_on_with_that_of_the_run(
    model: Path, at_once: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the bundled one, which would take the place of what was built."""
    begun: list[Recipe] = []
    commands = sys.modules["mpq_deploy.cli.app"]
    monkeypatch.setattr(
        commands, "_run_all", lambda stage, all, crew: begun.extend(r for r, _ in all)
    )
    for command in (["build", *arguments], ["export"]):
        begun.clear()
        result = CliRunner().invoke(app, [*command, "-o", str(at_once)])
        assert result.exit_code == 0, result.exception
        assert {str(one.model) for one in begun} == {str(model)}
        new = "--target" in command
        assert [one.target for one in begun] == [NANO, AGX, RTX, "rtx-ada"][: 3 + new]
        assert all(bool(one.recover.steps) == ("--recover" in command) for one in begun)


def test_defaults_are_each_targets_own(tmp_path: Path) -> None:
    (first, _), (second, folder) = runs_of(make_recipe({"target": "rtx,rtx-ada"}), tmp_path)
    assert "f8a8" in second.allocate.schemes and "f8a8" not in first.allocate.schemes
    assert folder == tmp_path / "targets" / "rtx-ada"
    kept = first.model_copy(update={"measure": first.measure.model_copy(update={"probes": 3})})
    begin_target(folder.with_name("rtx"), kept.to_yaml())
    ((added, place),) = targets_going_on(tmp_path, {"target": "rtx-ada"})
    assert (added.allocate.schemes, place) == (second.allocate.schemes, folder)
    assert added.measure.probes == 3
    budget = {"target": "rtx", "budget": "0.5"}
    assert targets_going_on(tmp_path, budget) == [
        (recipe_over(kept.model_dump(mode="json"), budget, ""), folder.with_name("rtx"))
    ]


def test_a_build_that_ends_early_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run_until("export", make_recipe({"target": ALL, "model": "missing.onnx"}), tmp_path / "run")
    assert not list(tmp_path.iterdir())

"""Builds over several processes: every stage has the bytes of a build in one, also when a worker is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import ThreadpoolController

from mpq_deploy.evaluate.metrics.sample_images import Source, sample_many
from mpq_deploy.models.spec import FloatModel
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.rounding import rounder
from mpq_deploy.run.folder import open_run
from mpq_deploy.run.pipeline import Pipeline, open_pipeline
from mpq_deploy.run.view import SHARDS
from mpq_deploy.sensitivity import probe
from mpq_deploy.studies import compared_losses as losses_module
from mpq_deploy.studies.audit import AuditOptions, run_audit
from mpq_deploy.studies.audit_result import AuditResult
from mpq_deploy.studies.sweep import run_sweep
from mpq_deploy.system.children import child_environment
from mpq_deploy.system.parallel import processes
from mpq_deploy.system.parallel.processes import Processes, kept_workers
from mpq_deploy.system.parallel.work import Crew
from mpq_deploy.system.progress import Talk
from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import (
    FEW_SCHEMES,
    Built,
    Notes,
    call,
    command,
    environment,
    recipe_for,
    stage_bytes,
    write_recipe,
)
from tests.pipeline.test_audit import CHANGES, without_seconds


def over(
    crew: Crew | None, model: Path, run: Path, do: Callable[[Pipeline], Any], **changes: Any
) -> tuple[Any, str]:
    """Open the run folder with ``crew``; return what ``do`` returns, and what was said."""
    notes = Notes()
    with open_pipeline(recipe_for(model, **changes), run, notes, crew) as pipeline:
        found = do(pipeline)
    return found, "\n".join(notes.lines)


def remade(run: Path, *stages: str) -> Path:
    for stage in stages:
        shutil.rmtree(run / stage)
    return run


@pytest.fixture(autouse=True, scope="module")
def workers_stay() -> Iterator[None]:
    """What starts for one test works for the next, too: each start imports torch."""

    def without_test() -> dict[str, str]:
        return {k: v for k, v in child_environment().items() if k != "PYTEST_CURRENT_TEST"}

    with pytest.MonkeyPatch.context() as patch, kept_workers():
        patch.setattr(processes, "child_environment", without_test)
        yield


# Without branches no salient channels are looked for, which takes each worker an import of torch.
PLAIN: dict[str, Any] = {"allocate__branches": []}


@pytest.fixture(scope="module")
def plain(model: Path, finished: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run without branches until its candidates, made in one process. Tests leave it as it is."""
    run = Path(shutil.copytree(finished.run, tmp_path_factory.mktemp("plain") / "run"))
    over(None, model, run, lambda pipeline: pipeline.run_until("candidates"), **PLAIN)
    return run


@pytest.mark.parametrize("room", [1 << 30, 1], ids=["side by side", "one at a time"])
def test_layers_rounded_side_by_side_have_the_same_bytes(
    model: Path, finished: Built, tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, most, into = set[str](), [0], rounder.Rounder.into

    def counted(self: rounder.Rounder, folder: Path, moments: Any, lanes: int) -> Path:
        busy.add(moments.layer.name)
        most[0] = max(most[0], len(busy))
        if room > 1 and most[0] == 1:
            # Wait for another layer.
            limit = time.monotonic() + 20
            while len(busy) == 1 and time.monotonic() < limit:
                time.sleep(0.01)
        path = into(self, folder, moments, lanes)
        busy.remove(moments.layer.name)
        return path

    monkeypatch.setattr(rounder.Rounder, "into", counted)
    monkeypatch.setattr(rounder, "rounding_threads", lambda cores: 3)
    monkeypatch.setattr(rounder, "TOGETHER_BYTES", room)
    run = remade(Path(shutil.copytree(finished.run, tmp_path / "run")), "candidates")
    over(None, model, run, lambda pipeline: pipeline.run_until("candidates"))
    assert most[0] == 1 if room == 1 else most[0] in (2, 3)
    assert stage_bytes(run, ("candidates",)) == stage_bytes(finished.run, ("candidates",))


def test_a_build_has_the_same_bytes_over_workers(
    model: Path, finished: Built, tmp_path: Path
) -> None:
    """Over three, an odd number; what is below compares the stages over two."""
    _, said = over(
        Processes(3), model, tmp_path / "run", lambda pipeline: pipeline.run_until("report")
    )
    assert stage_bytes(tmp_path / "run") == stage_bytes(finished.run)
    for name in ("calibration", "rounding", "salient channels", "probes", "evaluation"):
        assert f"  {name} on 3 workers, an estimated " in said
    assert not (tmp_path / "run" / SHARDS).exists()


@pytest.mark.parametrize(
    "changes", [{"rounding": "nearest"}, {"memory_mb": 16, "hessian_rows": 8192}], ids=str
)
def test_layers_are_rounded_alike_over_workers(
    model: Path, plain: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """To nearest, where there are no Hessians; and with Hessians whose rows do not fit their cap at once."""
    found = []
    for crew in (None, Processes(2)):
        run = Path(shutil.copytree(plain, tmp_path / f"run-{len(found)}"))
        settings = {f"quantize__{key}": value for key, value in changes.items()}
        # The scaled bodies too, which nearly all of rounding goes into.
        settings |= {"allocate__branches": ["scale"]}
        over(crew, model, run, lambda pipeline: pipeline.run_until("candidates"), **settings)
        found.append(stage_bytes(run, ("candidates",)))
        assert not list((run / ".scratch").glob("*"))
    assert found[0] == found[1] != stage_bytes(plain, ("candidates",))


def test_layers_are_rounded_by_one_thread_of_blas(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: with others some products round otherwise, and the bytes would depend on the crew."""
    blas, seen, real = (
        ThreadpoolController().select(user_api="blas"),
        set(),
        rounder.round_candidates,
    )

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.update(found["num_threads"] for found in blas.info())
        return real(*arguments, **named)

    monkeypatch.setattr(rounder, "round_candidates", watched)
    with blas.limit(limits=2):
        over(None, model, tmp_path / "run", lambda pipeline: pipeline.run_until("candidates"))
        assert {found["num_threads"] for found in blas.info()} == {2}
    assert seen == {1}


def test_a_stopped_measurement_goes_on_with_the_timesteps_that_are_finished(
    model: Path, run: Path, finished: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    remade(run, "measure")
    real, seen = probe.Probing.probe, []

    def stopping(self: Any, step_index: int, *rest: Any) -> float:
        seen.append(step_index)
        if step_index == 1:
            raise KeyboardInterrupt
        return real(self, step_index, *rest)

    monkeypatch.setattr(probe.Probing, "probe", stopping)
    with pytest.raises(KeyboardInterrupt):
        over(None, model, run, lambda pipeline: pipeline.run_until("measure"))
    assert (
        seen == [0, 1] and len(list((run / SHARDS / "measure").glob("*.npz"))) == 2
    )  # the batch size, and one timestep
    seen.clear()
    monkeypatch.setattr(
        probe.Probing,
        "probe",
        lambda self, step, *rest: (seen.append(step), real(self, step, *rest))[1],
    )
    over(None, model, run, lambda pipeline: pipeline.run_until("measure"))
    assert seen == [1]
    assert stage_bytes(run) == stage_bytes(finished.run)
    assert not (run / SHARDS).exists()


def test_a_sweep_over_workers_is_the_same_sweep(model: Path, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    budgets = [0.35, 0.45, 0.6]

    def swept(pipeline: Pipeline) -> dict[str, Any]:
        return run_sweep(pipeline.current("measure", "controls"), budgets, True)

    alone, _ = over(None, model, run, swept)
    spread, said = over(Processes(2), model, other, swept)
    assert alone == spread and all("measured_nmse" in point for point in alone["points"])
    assert (run / "sweep.json").read_bytes() == (other / "sweep.json").read_bytes()
    assert "measuring plans on 2 workers" in said


def test_an_audit_over_workers_is_the_same_audit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_module, "SHARD", 9)
    changes = {**CHANGES, **FEW_SCHEMES}
    options, found = AuditOptions((0.35, 0.5), ("probe", "size-only"), 30), []

    def audited(pipeline: Pipeline) -> AuditResult:
        return run_audit(pipeline.current("candidates"), options)

    over(None, model, tmp_path / "0", lambda pipeline: pipeline.run_until("candidates"), **changes)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    for crew in (None, Processes(2)):
        run = tmp_path / str(len(found))
        result, said = over(crew, model, run, audited, **changes)
        found.append(without_seconds(json.loads(json.dumps(result.as_json()))))
    assert found[0] == found[1]
    assert "exhaustive on 2 workers" in said and "measuring plans on 2 workers" in said
    assert stage_bytes(
        tmp_path / "0", ("audit-exhaustive-000", "audit-exhaustive-002", "audit-probe")
    ) == stage_bytes(
        tmp_path / "1", ("audit-exhaustive-000", "audit-exhaustive-002", "audit-probe")
    )


def test_images_are_the_same_with_any_crew_of_as_many_threads(model: Path, run: Path) -> None:
    def sampled(pipeline: Pipeline) -> Any:
        exported, given = pipeline.run.exported, pipeline.run.crew
        source = {"float": Source(exported.path, 3, True)}
        settings = EvaluateSettings(samples=40, steps=3, seed=3, batch_size=8)
        float_model = FloatModel(exported.path, exported.spec, exported.conditions)
        return sample_many(source, float_model, settings, None, Talk(), given).images["float"]

    alone, _ = over(None, model, run, sampled)
    assert (alone == over(Processes(2), model, run, sampled)[0]).all()


def test_the_options_reach_the_stages(
    model: Path, run: Path, finished: Built, cli: Callable[..., Outcome]
) -> None:
    said = cli("measure", remade(run, "measure"), "--workers", 2)
    assert said.code == 0 and "probes on 2 workers" in said.err, said.err
    assert stage_bytes(run) == stage_bytes(finished.run)
    assert cli("measure", run, "--workers", 0).code == 2


def test_two_builds_at_once_do_not_meet(model: Path, finished: Built, tmp_path: Path) -> None:
    """In different run folders both end with the reference bytes; in one and the same the second is refused."""
    recipe = write_recipe(tmp_path / "recipe.yaml", model=str(model))
    runs = [tmp_path / "one", tmp_path / "two"]
    ways = {
        "stderr": subprocess.PIPE,
        "stdout": subprocess.DEVNULL,
        "text": True,
        "env": environment(),
    }
    builds = [subprocess.Popen(command("build", "-r", recipe, "-o", run), **ways) for run in runs]
    with open_run(tmp_path / "held"):
        refused = call("build", "-r", recipe, "-o", tmp_path / "held")
    assert refused.returncode == 1
    assert f"in use by another process (pid {os.getpid()})" in refused.stderr
    for build, run in zip(builds, runs, strict=True):
        _, said = build.communicate(timeout=300)
        assert build.returncode == 0, said
        assert stage_bytes(run) == stage_bytes(finished.run)

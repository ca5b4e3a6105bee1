"""The forecast's arithmetic with a made-up clock, and what a build says of it."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import Recipe, make_recipe
from mpq_deploy.rounding.rounder import Rounder
from mpq_deploy.run import forecast, machine_speed
from mpq_deploy.run.forecast import (
    Forecast,
    Outlook,
    StageForecast,
    rounding_seconds,
    stage_seconds,
)
from mpq_deploy.run.machine_speed import Speed, probe_batch, speed_of
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.stage_work import LayerWork, ModelWork, works
from mpq_deploy.sensitivity import layer_weights, probe
from mpq_deploy.system.quantities import Duration, duration_text
from tests.pipeline.runs import Notes, build, recipe_for, save_denoiser

# Nothing takes time but the calls of the model.
CALLS_ALONE = Speed({"1": 1.0, "16": 0.5}, 0.0, 0.0, 0.0, 0.0, 0.0)
LAYER = LayerWork(64, 576, 1, 1024, 65536, 10, 3, 4, 6, 20)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, ModelWork]:
    """A recipe, the run folder of its export, and what is known of the model."""
    folder = tmp_path_factory.mktemp("exported")
    recipe = recipe_for(save_denoiser(folder))
    build(recipe, folder / "run", "export")
    with open_pipeline(recipe, folder / "run", Notes()) as pipeline:
        return recipe, folder / "run", ModelWork.of(pipeline.current("export"))


def test_calls_cost_what_their_batch_costs(exported: tuple[Recipe, Path, ModelWork]) -> None:
    recipe, _, model = exported
    # 4 samples of 4 steps, one call at each of 2 timesteps, 4 observed at each.
    found = stage_seconds(recipe, model, CALLS_ALONE)
    assert found["calibrate"] == 4 * 4 + 2 + 4 * 2
    large = make_recipe({**recipe.model_dump(mode="json")})
    large = large.model_copy(update={"calibrate": large.calibrate.replace(batch_size=16)})
    assert stage_seconds(large, model, CALLS_ALONE)["calibrate"] == found["calibrate"] / 2
    assert found["allocate"] == found["report"] == 0


def test_compiling_rounding_on_its_first_call_is_not_its_speed(
    exported: tuple[Recipe, Path, ModelWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run, model = exported
    now, original = [0.0], Rounder.into

    def slow_at_first(self: Rounder, *given: Any) -> Path:
        now[0] += 0.25 if now[0] else 100.0
        return original(self, *given)

    monkeypatch.setattr(Rounder, "into", slow_at_first)
    with open_pipeline(recipe, run, Notes()) as pipeline:
        given = pipeline.current("export"), model, lambda layer: 0.5
        assert machine_speed._time_rounding(*given, clock=lambda: now[0]) == 0.5


def test_passes_back_cost_each_of_their_directions(
    exported: tuple[Recipe, Path, ModelWork],
) -> None:
    recipe, _, model = exported
    speed = replace(CALLS_ALONE, forward=1.0, back=100.0)
    calls = 2 * recipe.measure.samples
    assert stage_seconds(recipe, model, speed)["measure"] == calls * (1 + 100 * 2)


def test_errors_are_stacked_in_each_batch_where_memory_does_not_hold_them(
    exported: tuple[Recipe, Path, ModelWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run, model = exported
    batches = works(recipe, model)["measure"].adjoints / probe_batch(recipe, model)
    assert batches > 1
    made, expected, original = Counter[bool](), dict[bool, float](), layer_weights.form_stack
    for held in (True, False):
        if not held:
            monkeypatch.setattr(forecast, "STACK_BYTES", 0)
            monkeypatch.setattr(probe, "STACK_BYTES", 0)
        monkeypatch.setattr(
            layer_weights,
            "form_stack",
            lambda *given, held=held: made.update([held]) or original(*given),
        )
        expected[held] = stage_seconds(recipe, model, replace(CALLS_ALONE, forward=1e-9, pace=1.0))[
            "measure"
        ]
        with open_pipeline(recipe, run, Notes()) as pipeline:
            pipeline.current("candidates")
            shutil.rmtree(run / "measure", ignore_errors=True)
            pipeline.ensure("measure")
    assert made[False] == batches * made[True] == batches * len(model.layers)
    elements = sum(
        layer.weights * (layer.forms + 1 + 2 * bool(layer.promoted)) for layer in model.layers
    )
    again = forecast.STACKED * (batches - 1) * elements
    assert expected[False] - expected[True] == pytest.approx(again)


def test_nothing_gets_shorter_by_more_of_a_count(exported: tuple[Recipe, Path, ModelWork]) -> None:
    _, _, model = exported
    speed = Speed({"1": 0.1}, 0.1, 0.2, 0.1, 1e-11, 1.0)
    usual = Recipe()
    before = stage_seconds(usual, model, speed)
    for stage, setting in (
        ("calibrate", "calibrate.samples"),
        ("calibrate", "calibrate.observed"),
        ("candidates", "quantize.refinements"),
        ("candidates", "quantize.noise_draws"),
        ("measure", "measure.calls"),
        ("measure", "measure.probes"),
        ("evaluate", "evaluate.samples"),
        ("evaluate", "evaluate.steps"),
    ):
        section, name = setting.split(".")
        part = getattr(usual, section)
        count = part.directions if name == "probes" else getattr(part, name)
        more = part.model_copy(update={name: 2 * count})
        after = stage_seconds(usual.model_copy(update={section: more}), model, speed)
        assert after[stage] > before[stage], setting
        assert all(after[one] >= before[one] * 0.999 for one in before if one != "candidates")


def test_small_layers_and_parts_of_large_ones_are_rounded_side_by_side(
    exported: tuple[Recipe, Path, ModelWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _, model = exported
    speed = Speed({"1": 0.0}, 0.0, 0.0, 0.0, 0.0, 1.0)

    def candidates(rows: int, threads: int) -> float:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", str(threads))
        layers = (replace(LAYER, rows=rows),) * 4
        return stage_seconds(recipe, replace(model, layers=layers), speed)["candidates"]

    for rows in (64, 100_000):
        rest = candidates(rows, 1) - 4 * rounding_seconds(replace(LAYER, rows=rows), recipe)
        assert candidates(rows, 2) - rest == pytest.approx((candidates(rows, 1) - rest) / 2)


def test_rounding_grows_with_forms_width_and_refinements() -> None:
    usual = Recipe()
    base = rounding_seconds(LAYER, usual)
    assert rounding_seconds(replace(LAYER, forms=20), usual) > base
    wider = rounding_seconds(replace(LAYER, columns=4 * 576), usual)
    assert wider > 4 * (base - rounding_seconds(replace(LAYER, forms=0, refined=0), usual))
    none = usual.model_copy(update={"quantize": usual.quantize.replace(refinements=0)})
    nearest = usual.model_copy(update={"quantize": usual.quantize.replace(rounding="nearest")})
    assert rounding_seconds(LAYER, nearest) < rounding_seconds(LAYER, none) < base


def test_what_is_left_follows_what_stages_took() -> None:
    now = 0.0
    ahead = Outlook({"calibrate": 100.0, "measure": 200.0, "evaluate": 700.0}, lambda: now)
    assert ahead.left == 1000 and ahead.text() == "17 min left in all"
    ahead.start("calibrate")
    now = 40.0
    assert ahead.left == 960
    ahead.finish("calibrate", 100.0)
    assert ahead.left == 900
    ahead.finish("measure", 800.0)
    # Finished ones took three times as long; a tenth of the whole counts as seen to be right.
    assert ahead.left == pytest.approx(700 * (900 + 100) / (300 + 100))
    ahead.start("evaluate")
    now += 1e6
    assert ahead.left == 0 and ahead.text() == ""
    # What was never forecast changes nothing; what turns out to be current is no longer ahead.
    ahead.finish("export", 50.0)
    assert ahead.left == pytest.approx(700 * 1000 / 400)
    ahead.skip("evaluate")
    assert ahead.left == 0


def test_the_table_has_80_columns_and_every_stage() -> None:
    from mpq_deploy.run.forecast import FEWER

    stages = {name: StageForecast(59 * 60.0, 123 * 10**9, few) for name, few in FEWER.items()}
    stages["controls"] = replace(stages["controls"], bytes=0)
    lines = Forecast(stages, ("a note",)).lines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines] == ["forecast", *FEWER, "together", "a"]
    assert "59 min" in lines[1] and "123.0 GB" in lines[1]
    assert f"{len(FEWER) * 59 / 60:.1f} h" in lines[-2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (8, "8 s"), (89, "89 s"), (90, "1.5 min"), (1860, "31 min"), (5400, "1.5 h")],
)
def test_times_are_said_in_two_digits(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30min", 1800), ("2h", 7200), ("0.5 H", 1800), ("1e2s", 100)],
)
def test_durations(text: str, seconds: float) -> None:
    assert Duration.parse(text).seconds == seconds
    assert make_recipe({"time": text}).to_yaml().count(f"time: {text}") == 1


@pytest.mark.parametrize("text", ["", "30", "30m", "-5min", "0s", "min", "1h30min", "inf h"])
def test_no_durations(text: str) -> None:
    with pytest.raises(UsageError, match="Invalid duration"):
        Duration.parse(text)


def test_speed_is_timed_once_for_a_graph_and_device(
    exported: tuple[Recipe, Path, ModelWork], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder, model = exported
    calls: list[int] = []

    def timed(*_: Any) -> Speed:
        calls.append(1)
        return replace(CALLS_ALONE, opening=float(len(calls)))

    monkeypatch.setattr(machine_speed, "time_machine", timed)
    with open_pipeline(recipe, folder, Notes()) as pipeline:
        run = pipeline.current("export")
        (folder / machine_speed.FILE).unlink(missing_ok=True)
        first, again = (speed_of(run, model, lambda layer: 1.0) for _ in range(2))
        assert first == again and len(calls) == 1
        # Damaged or altered: timed again.
        file = folder / machine_speed.FILE
        file.write_text(file.read_text(encoding="utf-8").replace("1.0", "2.0"), encoding="utf-8")
        assert speed_of(run, model, lambda layer: 1.0).opening == 2

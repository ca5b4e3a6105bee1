"""What a user can get wrong ends with one message that says what, the value found and how to fix it."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from filelock import FileLock
from onnx import TensorProto, numpy_helper

from mpq_deploy.run.folder import RECORD
from mpq_deploy.system.locks import LOCK, OWNER
from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import (
    DIGESTED,
    Built,
    build,
    describe,
    recipe_for,
    save_denoiser,
    stage_bytes,
    write_recipe,
)

Cli = Callable[..., Outcome]


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """Check exit code and message: one message of at most two lines, no traceback, nothing on stdout."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    message = outcome.err[outcome.err.index("mpq-deploy: ") :]
    assert len(message.splitlines()) <= 2, message
    for word in words:
        assert word in message, (word, message)


def bad_model(cli: Cli, tmp_path: Path, model: Path | str) -> Outcome:
    recipe = write_recipe(tmp_path / "recipe.yaml")
    return cli("build", model, "--recipe", recipe, "-o", tmp_path / "new")


# --- the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere/model.onnx", "nowhere", "emojy", ""])
def test_no_such_model(cli: Cli, tmp_path: Path, name: str) -> None:
    outcome = bad_model(cli, tmp_path, name)
    refused(outcome, 2, f"There is no model '{name}'", "bundled models: ")
    assert name != "emojy" or "Did you mean 'emoji'?" in outcome.err


def test_the_model_of_a_run_is_gone(cli: Cli, tmp_path: Path) -> None:
    """Each command that needs it names the run, and where it was; given at its new place, it goes on."""
    pytest.importorskip("torch")
    from tests.tiny_models import tiny_unet_folder

    model, run = tiny_unet_folder(tmp_path, num_class_embeds=None), tmp_path / "run"
    moved = tmp_path / "moved" / model.name
    recipe = write_recipe(tmp_path / "recipe.yaml")
    assert cli("export", model, "--recipe", recipe, "-o", run).code == 0
    moved.parent.mkdir()
    model.rename(moved)
    for command in (["build", "-o", run, "-b", "0.9"], ["calibrate", run]):
        said = f"The model '{model}', of which {run} was built, is not there."
        refused(cli(*command), 2, said, f"build MODEL -o {run}")
    # Another name is of no model that the run knows.
    refused(
        cli("build", tmp_path / "typo", "-o", run), 2, f"There is no model '{tmp_path / 'typo'}'"
    )
    again = cli("export", moved, "--recipe", recipe, "-o", run)
    assert again.code == 0 and "up to date" in again.err


def test_a_folder_that_is_no_model(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("a", encoding="utf-8")
    refused(
        bad_model(cli, tmp_path, tmp_path / "photos"),
        2,
        "is not a diffusers model",
        "model_index.json",
    )


@pytest.mark.torch
def test_pickled_weights(cli: Cli, tmp_path: Path) -> None:
    from tests.tiny_models import tiny_unet_folder

    folder = tiny_unet_folder(tmp_path)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(
        bad_model(cli, tmp_path, folder), 1, "diffusion_pytorch_model.bin", "safe_serialization"
    )
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps({"a": 1}))
    refused(
        bad_model(cli, tmp_path, tmp_path / "model.ckpt"),
        1,
        "model.ckpt is neither a .safetensors nor an .onnx",
        "safe_serialization",
    )


@pytest.mark.parametrize("kept", [0, 1, 100, 5000])
def test_a_truncated_file(cli: Cli, tmp_path: Path, model: Path, kept: int) -> None:
    path = describe(tmp_path / "cut.onnx")
    path.write_bytes(model.read_bytes()[:kept])
    refused(
        bad_model(cli, tmp_path, path),
        1,
        "cut.onnx",
        f"{kept:,} bytes",
        "truncated or not an ONNX model",
    )


def test_a_file_of_another_kind(cli: Cli, tmp_path: Path) -> None:
    path = describe(tmp_path / "picture.onnx")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    refused(bad_model(cli, tmp_path, path), 1, "picture.onnx", "not an ONNX model")


def test_an_onnx_file_without_its_yaml(cli: Cli, tmp_path: Path, model: Path) -> None:
    shutil.copy(model, tmp_path / "alone.onnx")
    refused(bad_model(cli, tmp_path, tmp_path / "alone.onnx"), 2, "alone.yaml", "sample: NAME")


@pytest.mark.parametrize(
    ("location", "word"),
    [
        ("../secret.bin", "outside"),
        ("/etc/passwd", "outside"),
        ("link.bin", "outside"),
        ("gone.bin", "no file"),
    ],
)
def test_external_data_elsewhere(
    cli: Cli, tmp_path: Path, model: Path, location: str, word: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 16))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    proto = onnx.load(model)
    weight = next(t for t in proto.graph.initializer if t.name == "mid.conv1.weight")
    length = len(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    path = describe(folder / "model.onnx")
    path.write_bytes(proto.SerializeToString())
    refused(bad_model(cli, tmp_path, path), 1, word, f"'{location}'")


def with_weight(model: Path, folder: Path, name: str, change: Callable[[Any], None]) -> Path:
    """A copy of ``model`` in which the weight ``name`` was changed."""
    proto = onnx.load(model)
    weight = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(weight).copy()
    change(array)
    weight.CopyFrom(numpy_helper.from_array(array, name))
    folder.mkdir()
    onnx.save(proto, folder / "model.onnx")
    return describe(folder / "model.onnx")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(cli: Cli, tmp_path: Path, model: Path, value: float) -> None:
    def spoil(array: Any) -> None:
        array.flat[7] = value

    path = with_weight(model, tmp_path / "model", "mid.conv1.weight", spoil)
    refused(bad_model(cli, tmp_path, path), 1, "'mid.conv1.weight'", "NaN or infinite")


def test_activations_that_overflow(cli: Cli, tmp_path: Path, model: Path) -> None:
    """Finite biases, but the values behind them are not: the message names where and when."""

    def enlarge(array: Any) -> None:
        array[...] = 3e38

    path = with_weight(model, tmp_path / "model", "down.downsample.bias", enlarge)
    refused(
        bad_model(cli, tmp_path, path),
        1,
        "NaN or Inf",
        "at timestep ",
        "'mid.conv1_out'",
        "the Conv 'mid.conv1'",
    )


def test_activations_that_overflow_only_later(tmp_path: Path, model: Path) -> None:
    """Along the trajectory, not yet on noise: calibration names where and when."""
    from mpq_deploy.errors import ModelError

    def enlarge(array: Any) -> None:
        array[...] = 3e37

    path = with_weight(model, tmp_path / "model", "conv_out.bias", enlarge)
    with pytest.raises(ModelError, match=r"at timestep \d+: first in '\S+', the output of the "):
        build(recipe_for(path), tmp_path / "run")


# --- recipe and options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "rtxx"}, ("target 'rtxx'", "Did you mean 'rtx'?")),
        ({"calibrate__timestep": 3}, ("'calibrate.timestep'", "Did you mean 'timesteps'?")),
        ({"budgte": 0.3}, ("'budgte'", "Did you mean 'budget'?")),
        ({"allocate__schemes": ["fp16", "w8a9"]}, ("'w8a9'", "Did you mean 'w8a8'?")),
        ({"measure__method": "prob"}, ("measure.method", "'probe'", "'prob'")),
        ({"calibrate__timesteps": 9}, ("9 timesteps", "4 steps")),
        ({"calibrate__samples": 0}, ("calibrate.samples", "0")),
        ({"evaluate__seed": 1}, ("evaluate.seed", "calibrate.seed", "both 1")),
        ({"calibrate": 3}, ("calibrate", "3")),
        ({"conditions": "nowhere.npz"}, ("nowhere.npz",)),
        ({"scheduler": "nowhere"}, ("nowhere",)),
        (
            {"allocate__protect": [{"layers": "nolayer*", "schemes": ["fp16"]}]},
            ("'nolayer*' matches no layer",),
        ),
    ],
)
def test_a_wrong_recipe(
    cli: Cli,
    tmp_path: Path,
    model: Path,
    run: Path,
    finished: Built,
    changes: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", **changes)
    refused(cli("build", model, "--recipe", recipe, "-o", run), 2, *words)
    usable(cli, run, finished)


def test_no_scheme_is_allowed(cli: Cli, tmp_path: Path, model: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", allocate__schemes=[])
    outcome = cli("build", model, "-r", recipe, "-o", tmp_path / "new")
    refused(outcome, 2, "smallest feasible budget is 1.0000", "more of allocate.schemes")


def usable(cli: Cli, run: Path, finished: Built) -> None:
    """The run folder is as it was: its recipe, its stages, and the commands that go on from it."""
    assert yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")) == yaml.safe_load(
        (finished.run / "recipe.yaml").read_text(encoding="utf-8")
    )
    assert stage_bytes(run) == stage_bytes(finished.run)
    assert not [path.name for path in run.iterdir() if path.name.endswith((".partial", ".old"))]


@pytest.mark.parametrize("budget", ["0", "-1", "40", "abc", "", "nan", "0MB", "200%", "4.5bit"])
def test_a_budget_that_is_none(
    cli: Cli, model: Path, run: Path, finished: Built, budget: str
) -> None:
    outcome = cli("allocate", run, f"--budget={budget}")
    refused(outcome, 2, f"'{budget}'", "at most 100%" if budget == "200%" else "0.35")
    usable(cli, run, finished)


@pytest.mark.parametrize("budget", ["0.05", "0.1bits", "1kB"])
def test_an_infeasible_budget_names_one_that_works(
    cli: Cli, model: Path, run: Path, finished: Built, budget: str
) -> None:
    outcome = cli("allocate", run, "--budget", budget)
    refused(outcome, 2, budget, "smallest feasible budget is ")
    usable(cli, run, finished)
    smallest = outcome.err.split("smallest feasible budget is ")[1].split(" ")[0]
    assert cli("allocate", run, "--budget", smallest).code == 0
    size = json.loads((run / "allocate" / "plan.json").read_text(encoding="utf-8"))["size_bytes"]
    named = outcome.err.split("smallest feasible budget is ")[1].split("(")[1].split(" bytes")[0]
    assert size == int(named.replace(",", ""))
    assert "Conv, Gemm and MatMul are layers" in outcome.err


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "{: :", "\x00"])
def test_a_recipe_that_is_no_mapping(cli: Cli, tmp_path: Path, model: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    refused(
        cli("build", model, "-r", tmp_path / "recipe.yaml", "-o", tmp_path / "new"),
        2,
        "recipe.yaml",
    )
    assert not (tmp_path / "new").exists()


def test_no_such_recipe(cli: Cli, tmp_path: Path, model: Path) -> None:
    refused(cli("build", model, "-r", tmp_path / "none.yaml"), 2, "no recipe", "none.yaml")
    refused(cli("build", model, "-r", tmp_path), 2, str(tmp_path))


# --- the run folder -------------------------------------------------------------------------------------------


def test_a_folder_in_use(cli: Cli, run: Path, finished: Built) -> None:
    with FileLock(run / LOCK):
        (run / OWNER).write_text("4242", encoding="utf-8")
        refused(cli("allocate", run, "--budget", "0.5"), 1, "in use by another process", "4242")
    usable(cli, run, finished)
    assert cli("allocate", run).code == 0


def test_a_folder_of_another_format(cli: Cli, run: Path) -> None:
    (run / "run.json").write_text(json.dumps({"format": 99, "made_by": "9.9"}), encoding="utf-8")
    before = stage_bytes(run)
    refused(cli("allocate", run, "--budget", "0.5"), 1, "mpq-deploy 9.9", "format 99")
    (run / "run.json").write_text("{", encoding="utf-8")
    refused(cli("allocate", run, "--budget", "0.5"), 1, "run.json is not JSON")
    assert stage_bytes(run) == before


def test_a_folder_of_something_else(cli: Cli, tmp_path: Path, model: Path) -> None:
    holiday = tmp_path / "holiday"
    holiday.mkdir()
    (holiday / "beach.jpg").write_text("sand", encoding="utf-8")
    refused(cli("build", model, "-o", holiday), 1, "is not a run folder", "beach.jpg")
    assert sorted(path.name for path in holiday.iterdir() if path.name != ".lock") == ["beach.jpg"]
    refused(cli("allocate", holiday), 2, "is not a run folder", "recipe.yaml")
    refused(cli("allocate", tmp_path / "nowhere"), 2, "is not a run folder")
    assert not (tmp_path / "nowhere").exists()


def test_a_file_instead_of_a_folder(cli: Cli, tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("a", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(cli("build", model, "-o", place), 1, str(place), "cannot be written", "with -o")


def test_a_run_instead_of_a_model(cli: Cli, tmp_path: Path, run: Path) -> None:
    for command in ("build", "audit"):
        wrong = cli(command, run, "-o", tmp_path / "new")
        refused(wrong, 2, "is a run folder, not a model", f"build -o {run}")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "made"),
    [
        (
            lambda run: (run / "quantize" / "stage.json").write_text(
                '{"stage": "qu', encoding="utf-8"
            ),
            ["quantize", "report"],
        ),
        (
            lambda run: (run / "quantize" / "stage.json").write_text("[]", encoding="utf-8"),
            ["quantize", "report"],
        ),
        (
            lambda run: (run / "quantize" / "stage.json").write_bytes(b"\xff\xfe"),
            ["quantize", "report"],
        ),
        (lambda run: flip(run / "quantize" / "weights.bin"), ["quantize", "report"]),
        (lambda run: (run / "measure" / "stage.json").unlink(), ["measure", "report"]),
        (lambda run: shutil.rmtree(run / "calibrate"), ["calibrate", "report"]),
        (lambda run: (run / "timings.json").write_text("{", encoding="utf-8"), ["report"]),
        (lambda run: (run / "timings.json").write_text("[1]", encoding="utf-8"), ["report"]),
        (lambda run: (run / "report.json").unlink(), ["report"]),
        (lambda run: (run / "latency.json").write_text("{", encoding="utf-8"), ["report"]),
        (lambda run: (run / "sweep.json").write_text("{", encoding="utf-8"), ["report"]),
        (lambda run: (run / "page.json").write_text("{", encoding="utf-8"), ["report"]),
        (lambda run: (run / "engine.timing.json").write_text("{", encoding="utf-8"), ["report"]),
    ],
)
def test_damaged_files_are_made_again(
    model: Path, run: Path, finished: Built, damage: Callable[[Path], None], made: list[str]
) -> None:
    damage(run)
    again = build(recipe_for(model), run)
    assert again.made == made
    assert stage_bytes(run) == stage_bytes(finished.run)


@pytest.mark.parametrize("stage", DIGESTED)
def test_one_altered_bit_of_a_stage_makes_it_again(
    model: Path, run: Path, finished: Built, stage: str
) -> None:
    """In a graph, in weights, in figures, in a digest of the record: what comes after need not be made again."""
    rng = np.random.default_rng(len(stage))
    files = sorted(path for path in (run / stage).rglob("*") if path.is_file())
    record = run / stage / RECORD
    for path in {*(files[i] for i in rng.permutation(len(files))[:2]), record}:
        content = bytearray(path.read_bytes())
        digest = re.search(rb'": "([0-9a-f]{64})', content) if path == record else None
        place = int(rng.integers(*digest.span(1)) if digest else rng.integers(len(content)))
        content[place] ^= 1 << int(rng.integers(4))
        path.write_bytes(content)
        again = build(recipe_for(model), run)
        assert again.made == [stage, "report"], (path, place)
        assert stage_bytes(run) == stage_bytes(finished.run)


def test_altered_figures_outside_the_stages_are_left_out(model: Path, run: Path) -> None:
    """One digit that is still a number: the figure would go into the report unseen."""
    path = run / "latency.json"
    text = path.read_text(encoding="utf-8")
    found = re.search(r'"float_ms": [^1-8]*([1-8])', text)
    assert found is not None
    path.write_text(
        text[: found.start(1)] + str(int(found[1]) + 1) + text[found.end(1) :], encoding="utf-8"
    )
    again = build(recipe_for(model), run)
    assert again.report["cpu_latency"] is None
    assert any("latency.json cannot be read" in line and "altered" in line for line in again.said)


def test_a_damaged_cache_entry_is_made_again(model: Path, run: Path, finished: Built) -> None:
    for entry in (run / ".samples").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    shutil.rmtree(run / "evaluate")
    again = build(recipe_for(model), run)
    assert again.made == ["evaluate", "report"]
    assert any("cache entry" in line for line in again.said)
    assert stage_bytes(run) == stage_bytes(finished.run)


def test_a_bad_model_leaves_the_run_usable(
    cli: Cli, tmp_path: Path, run: Path, finished: Built, model: Path
) -> None:
    """Another model that cannot be read, into a folder that is finished: nothing of it is lost."""
    path = describe(tmp_path / "cut.onnx")
    path.write_bytes(model.read_bytes()[:3000])
    recipe = write_recipe(tmp_path / "recipe.yaml")
    refused(cli("build", path, "-r", recipe, "-o", run), 1, "cut.onnx")
    usable(cli, run, finished)
    outcome = cli("allocate", run)
    assert outcome.code == 0
    assert outcome.err.count("up to date") == 5


def test_damaged_sources_are_named(cli: Cli, tmp_path: Path) -> None:
    """A YAML that does not fit the file says which entry, and what the model has."""
    path = save_denoiser(tmp_path / "model")
    described = yaml.safe_load(path.with_suffix(".yaml").read_text(encoding="utf-8"))
    path.with_suffix(".yaml").write_text(
        yaml.safe_dump({**described, "timestep": "timestop"}), encoding="utf-8"
    )
    refused(bad_model(cli, tmp_path, path), 2, "'timestop'", "Did you mean 'timestep'?")


def test_candidates_of_an_older_form_are_made_again(model: Path, run: Path) -> None:
    """A run folder of a version that wrote its candidates otherwise is not misread."""
    record = run / "candidates" / "stage.json"
    values = json.loads(record.read_text(encoding="utf-8"))
    del values["inputs"]["candidates.format"]
    record.write_text(json.dumps(values), encoding="utf-8")
    again = build(recipe_for(model), run)
    assert again.made == ["candidates", "report"]
    assert any("candidates.format changed" in line for line in again.said)

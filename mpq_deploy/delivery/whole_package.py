"""Package the run of a whole pipeline: every component, what generates with them, reference images.

In: the run of a whole pipeline, a target. Out: one archive; unpacked and installed it is a folder
for ``mpq-deploy generate``. Where the target builds engines each component is a package of its own
in ``components/NAME``; else it is the graph for ONNX Runtime.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpq_deploy.delivery.generation import MADE_FROM, check_parts, generation_of
from mpq_deploy.delivery.package import (
    INSTALLER,
    SCRIPT,
    alternatives,
    check_plan,
    installer,
    package_parts,
)
from mpq_deploy.device.archive import MANIFEST, Source, part_digest, write_archive
from mpq_deploy.device.generate.generation_folder import COMPONENTS, FILE
from mpq_deploy.device.generate.generator import Generator
from mpq_deploy.device.generate.residency import RUNTIME_BYTES, residency
from mpq_deploy.device.whole_installer import made
from mpq_deploy.device.whole_manifest import ReferenceImage, WholeManifest
from mpq_deploy.engine.builder import ENGINE
from mpq_deploy.engine.target import Target
from mpq_deploy.errors import MpqError, UsageError
from mpq_deploy.recipe import load_recipe
from mpq_deploy.run.folder import RECIPE, open_run
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.run.pipeline_file import PipelineFile
from mpq_deploy.run.view import Run
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.memory import Room
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.release import __version__

# Reference images, of so many steps at most: differences of arithmetic grow from step to step.
IMAGES, STEPS = 2, 4
PROMPT = "a photo"
# What a device's image may differ by, over the image's variance (our choice): by another order of
# sums in ONNX Runtime, and by FP16 arithmetic in engines, where no GPU has shown it yet.
TOLERANCE, ENGINE_TOLERANCE = 1e-3, 2e-2
SCRIPT_TEXT = """#!/bin/sh
# Installs this package on the device: verify, build each component, make the reference images.
set -eu
cd "$(dirname "$0")"
sha256sum --check --quiet SHA256SUMS || { echo "build.sh: the package is damaged: unpack it again" >&2; exit 1; }
exec python3 install.pyz --unpacked . "$@"
"""


def make_whole_package(run: Path, target: Target, out: Path, talk: Talk) -> dict[str, Any]:
    """Write the package of the whole pipeline's run at ``run``; return what was written.

    Its parts' graphs are made current for their plans. Raises RunFolderError for a run that is in
    use, UsageError as ``generation_of`` and, where the target builds engines, as ``make_package`` do.
    """
    with open_run(run):
        return _written(run, target, out, talk)


def _written(run: Path, target: Target, out: Path, talk: Talk) -> dict[str, Any]:
    view = PipelineFile.load(run)
    check_parts(run, view)
    deployed = {name: _deployed(run / COMPONENTS / name, target, talk) for name in view.parts}
    place = generation_of(run, talk)
    described = read_json_object(place / FILE)
    engines = target.builder != "none"
    parts: dict[str, Source] = {
        path.relative_to(place).as_posix(): path
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name != MADE_FROM
    }
    if engines:
        parts = {name: one for name, one in parts.items() if not name.startswith(COMPONENTS)}
    digests: dict[str, dict[str, str]] = {}
    prompts: list[str] = []
    for name, part in deployed.items():
        digests[name] = {"quantize": part.digest(part.deployed_stage)}
        prompts += _prompts(part)
        if engines:
            described["parts"][name] |= _engine_parts(part, target, name, parts)
    sizes = {name: int(one["memory_bytes"]) for name, one in described["parts"].items()}
    images, drawn = _reference_images(place, prompts or [PROMPT])
    parts |= drawn | {FILE: (json.dumps(described, indent=1, sort_keys=True) + "\n").encode()}
    parts |= {INSTALLER: installer(), SCRIPT: SCRIPT_TEXT.encode()}
    manifest = WholeManifest(
        name=Path(view.source).name,
        made_by=__version__,
        target=target.build_target,
        parts={name: part_digest(one) for name, one in parts.items()},
        components=sizes,
        images=images,
        tolerance=ENGINE_TOLERANCE if engines else TOLERANCE,
        digests=digests,
        alternatives=alternatives(target),
        notes=view.notes,
    )
    manifest.check()
    _say_memory(sizes, target, talk)
    parts[MANIFEST] = manifest.to_json().encode()
    digest = write_archive(out, parts)
    return {"file": str(out), "sha256": digest, "bytes": out.stat().st_size, "parts": sorted(parts)}


def _deployed(own: Path, target: Target, talk: Talk) -> Run:
    """Make the graphs of a part's run at ``own`` current; return it."""
    with open_pipeline(load_recipe(own / RECIPE), own, talk, computes=False) as pipeline:
        return pipeline.deployed(corrected=target.builder != "none")


def _engine_parts(run: Run, target: Target, name: str, parts: dict[str, Source]) -> dict[str, Any]:
    """Add a component's own package to ``parts``; return what generation.json says of its engine."""
    try:
        check_plan(run, target)
    except MpqError as error:
        again = f"Build the whole for it: mpq-deploy build MODEL --target {target.name} -o RUN"
        raise type(error)(f"{name}: {error.message}", again) from error
    own, manifest = package_parts(run, target)
    own[MANIFEST] = manifest.to_json().encode()
    parts |= {f"{COMPONENTS}/{name}/{file}": one for file, one in own.items()}
    return {
        "file": f"engine/{ENGINE}",
        "largest_batch": manifest.batches[2],
        "memory_bytes": manifest.needed_bytes - RUNTIME_BYTES,
    }


def _prompts(run: Run) -> list[str]:
    """Return the prompts that the denoiser's run was calibrated with."""
    calls = run.exported.spec.pipeline.calls if run.exported.spec.pipeline else ()
    found = [call["prompt"] for call in calls if isinstance(call.get("prompt"), str)]
    return list(dict.fromkeys(found))[:IMAGES]


def _reference_images(
    place: Path, prompts: list[str]
) -> tuple[tuple[ReferenceImage, ...], dict[str, Source]]:
    """Return what the images are of, and the files; none of a denoiser that takes a mask with each call."""
    generator = Generator(place)
    if generator.generation.paints:
        return (), {}
    defaults, images, files = generator.generation.defaults, [], dict[str, Source]()
    for number, prompt in enumerate(prompts[:IMAGES]):
        steps = min(int(defaults["steps"]), STEPS)
        file = f"reference/{number}.png"
        asked = ReferenceImage(file, prompt, steps, float(defaults["guidance"]), number)
        content = io.BytesIO()
        # Stored, not deflated: the bytes must not depend on the version of zlib.
        made(generator, asked).save(content, "PNG", compress_level=0)
        images.append(asked)
        files[file] = content.getvalue()
    return tuple(images), files


def _say_memory(sizes: Mapping[str, int], target: Target, talk: Talk) -> None:
    """Say which components stay in memory together on the target; UsageError where one does not fit."""
    if target.memory_bytes is None:
        return
    shared = residency(sizes, Room(int(target.memory_bytes.value), target.name))
    talk.line(shared.words)
    for name in shared.too_large:
        raise UsageError(
            f"The {name} alone is estimated to take {sizes[name] / 1e9:.2f} GB, and {target.name} has "
            f"{target.memory_bytes.value / 1e9:.2f}.",
            "Build with a smaller budget.",
        )

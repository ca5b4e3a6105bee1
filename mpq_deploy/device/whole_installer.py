"""Install a whole pipeline's package: build each component in turn, then make the reference images.

In: the unpacked package. Out: the folder that ``mpq-deploy generate`` opens, a ``results.json`` per
component as for a model alone, and one of the whole. Engines have run on no GPU yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.device.archive import MANIFEST, ArchiveError
from mpq_deploy.device.cuda import why_no_gpu
from mpq_deploy.device.generate.generation_folder import COMPONENTS
from mpq_deploy.device.generate.generator import Generator
from mpq_deploy.device.generate.image_arrays import read_picture
from mpq_deploy.device.generate.residency import Residency, free_room, residency
from mpq_deploy.device.manifest import RESULTS, RESULTS_FORMAT
from mpq_deploy.device.whole_manifest import ReferenceImage, WholeManifest
from mpq_deploy.errors import EngineError, MissingDependencyError
from mpq_deploy.system.files import file_digest, write_text
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.release import __version__

Results = dict[str, Any]


def install_whole(
    folder: Path, install_part: Callable[..., Results], talk: Talk, force_memory: bool
) -> Results:
    """Install what was unpacked into ``folder``; return what its results.json holds.

    ``install_part`` installs one component's folder; with ``streams`` it keeps weights in host memory,
    as of those that are estimated not to fit. Components that an interrupted call finished are not
    built again. Raises ArchiveError for a part that is missing or altered, EngineError for too little
    memory (unless ``force_memory``), and what ``install_part`` raises.
    """
    manifest = WholeManifest.load(folder / MANIFEST)
    _check_unpacked(folder, manifest)
    shared = _shared(manifest, talk, force_memory)
    components, large = {}, shared.too_large if shared else ()
    for name in manifest.components if manifest.engines else ():
        place = folder / COMPONENTS / name
        talk.line(f"component {name}")
        components[name] = _finished(place) or install_part(place, streams=name in large)
    images = _images(folder, manifest, shared, talk)
    results = {
        "format": RESULTS_FORMAT,
        "made_by": __version__,
        "package": {"name": manifest.name, "manifest_sha256": file_digest(folder / MANIFEST)},
        "digests": manifest.digests,
        "target": manifest.target.name,
        "components": components,
        "images": images,
        "memory": shared.words if shared else "",
        "passed": images["passed"] is not False and all(c["passed"] for c in components.values()),
    }
    text = json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_text(folder / RESULTS, text)
    return results


def _check_unpacked(folder: Path, manifest: WholeManifest) -> None:
    for name, digest in manifest.parts.items():
        path, again = folder / name, "Unpack the package again."
        if not path.is_file():
            raise ArchiveError(f"The part '{name}' is missing in {folder}.", again)
        if file_digest(path) != digest:
            raise ArchiveError(f"The part '{name}' in {folder} is altered.", again)


def _shared(manifest: WholeManifest, talk: Talk, force: bool) -> Residency | None:
    """Say which components stay in memory together; None where nobody says how much there is."""
    room = free_room(manifest.engines)
    if room is None:
        return None
    shared = residency(manifest.components, room)
    talk.line(shared.words)
    for name in () if force else shared.too_large:
        what = f"The {name} alone is estimated to take {manifest.components[name] / 1e9:.2f} GB"
        if not manifest.engines:
            raise EngineError(
                f"{what}, and {room}.",
                "Close other programs, package with a smaller budget, or continue with --force-memory.",
            )
        talk.warn(f"{what}: its weights are streamed, where TensorRT's Python package is here")
    return shared


def _finished(place: Path) -> Results | None:
    """Return the results of a component that was installed before, from the same manifest, and passed."""
    if not (place / RESULTS).is_file():
        return None
    found = read_json_object(place / RESULTS, error=ArchiveError)
    try:
        engine = place / "engine" / str(found["engine"]["file"])
        same = found["package"]["manifest_sha256"] == file_digest(place / MANIFEST)
        built = engine.is_file() and file_digest(engine) == found["engine"]["sha256"]
    except (KeyError, TypeError):
        return None
    return found if same and built and found.get("passed") is True else None


def _images(
    folder: Path, manifest: WholeManifest, shared: Residency | None, talk: Talk
) -> dict[str, Any]:
    """Make the reference images; return the section ``images`` of results.json."""
    why = why_no_gpu() if manifest.engines else ""
    if not manifest.images:
        why = "the package has none"
    errors: dict[str, float] = {}
    if not why:
        try:
            turns = shared is not None and shared.take_turns
            generator = Generator(folder, one_at_a_time=turns, talk=talk)
            errors = {
                one.file: image_error(made(generator, one), folder / one.file)
                for one in manifest.images
            }
        except MissingDependencyError as error:
            why = str(error)
    return {
        "ran": not why,
        "why": why,
        "passed": None if why else all(one <= manifest.tolerance for one in errors.values()),
        "errors": {name: error if np.isfinite(error) else None for name, error in errors.items()},
        "tolerance": manifest.tolerance,
    }


def made(generator: Generator, asked: ReferenceImage) -> Any:
    """Return the Pillow image that is asked for."""
    wishes = {"steps": asked.steps, "guidance": asked.guidance, "seed": asked.seed}
    return generator(asked.prompt, **wishes)[0].image


def image_error(image: Any, reference: Path) -> float:
    """Return the mean squared difference over the reference's variance; infinite for another size."""
    expected = np.asarray(read_picture(reference, "reference image").convert("RGB"), np.float64)
    found = np.asarray(image.convert("RGB"), np.float64)
    if found.shape != expected.shape:
        return float("inf")
    # One level of 255 where all is of one colour.
    return float(np.mean((found - expected) ** 2) / max(np.var(expected), 1.0))


def whole_summary(results: Results, out: Path) -> str:
    """What is printed at the end."""
    rows = []
    for name, one in results["components"].items():
        engine = one["engine"]
        layers = "as planned" if engine["verified"] else "DIFFER from the plan"
        place = out / COMPONENTS / name / "engine" / str(engine["file"])
        rows.append((name, f"{place}, {engine['bytes']:,} bytes, layers {layers}"))
    images = results["images"]
    if not images["ran"]:
        shown = f"not made: {images['why']}"
    else:
        finite = [one for one in images["errors"].values() if one is not None]
        worst = f"{max(finite):.2e}" if len(finite) == len(images["errors"]) else "not finite"
        verdict = "agree" if images["passed"] else "DIFFER"
        shown = f"{verdict} (error {worst}, allowed {images['tolerance']:.2e})"
    rows += [("images", shown), ("results", str(out / RESULTS))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

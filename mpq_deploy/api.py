"""The package from Python: what the command line does, as functions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_deploy.system.given import check_whole, given_path, wrong_kind
from mpq_deploy.system.progress import PlainTalk, Talk, WarningTalk

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.runtime.drop_in import RuntimeUNet
    from mpq_deploy.system.parallel.work import Crew


@dataclass(frozen=True)
class BuildResult:
    """What ``build`` left behind: the run folder and the values of report.json.

    Of a whole pipeline ``report`` has the values of pipeline.json, ``engine`` and ``model`` are its
    denoiser's, and ``part`` gives the same of any part.
    """

    run: Path
    report: dict[str, Any]

    @property
    def engine(self) -> Path | None:
        """The engine file; None where the target has none here (``report["engine_note"]`` says why)."""
        if "denoiser" in self.report:
            return self.part(self.report["denoiser"]).engine
        built = self.report["engine"]
        return self.run / built["file"] if built else None

    @property
    def model(self) -> Path:
        """The quantized FP16 ONNX graph."""
        if "denoiser" in self.report:
            return self.part(self.report["denoiser"]).model
        return self.run / ("recover" if self.report["recovery"] else "quantize") / "model.onnx"

    def part(self, name: str) -> BuildResult:
        """Return the result of one part of a whole pipeline. Raises KeyError for one that was not built."""
        from mpq_deploy.system.inputs import read_json_object

        if name not in self.report["parts"]:
            raise KeyError(name)
        run = self.run / "components" / name
        return BuildResult(run, read_json_object(run / "report.json"))


def build(
    model: str | Path | None = None,
    *,
    budget: str | float | None = None,
    target: str | None = None,
    recipe: Path | str | None = None,
    out: Path | str | None = None,
    settings: dict[str, Any] | None = None,
    quiet: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    threads: int | None = None,
) -> BuildResult:
    """Build a quantized engine of the wanted size and its report, as ``mpq-deploy build`` does.

    ``model``, ``budget`` and ``target`` as on the command line; ``recipe``: a YAML file or the name
    of a bundled recipe; ``settings``: any other values of the recipe by dotted key, such as
    ``{"evaluate.samples": 32}``; ``out``: the run folder, whose own model and recipe are taken where
    none is given, as there. One target per call. ``workers``, ``ray``, ``threads``: who
    computes what can be spread, as ``--workers``, ``--ray``, ``--threads``. Raises the errors of
    ``mpq_deploy.errors``: UsageError for what the caller can fix (an argument of another kind, too),
    MpqError for the rest.
    """
    from mpq_deploy.run.chosen_recipe import recipe_to_build
    from mpq_deploy.run.pipeline import default_run
    from mpq_deploy.system.parallel.crew import crew_for

    _check_settings(settings)
    for name, count in (("workers", workers), ("threads", threads)):
        if count is not None:
            check_whole(count, name, 1)
    given = {
        "model": None if model is None else given_path(model, "model"),
        "budget": budget,
        "target": target,
        **(settings or {}),
    }
    place = Path(given_path(out, "out")) if out else None
    source = None if recipe is None else given_path(recipe, "recipe")
    chosen = recipe_to_build(place, source, given)
    run = place or default_run(chosen)
    _check_one_target(chosen, run)
    talk = WarningTalk() if quiet else PlainTalk()
    return _built(chosen, run, talk, crew_for(workers, ray, threads))


def _built(recipe: Recipe, run: Path, talk: Talk, crew: Crew | None) -> BuildResult:
    """Build a whole pipeline or a model in ``run``."""
    from mpq_deploy.run.chosen_recipe import parts_to_build
    from mpq_deploy.run.pipeline import open_pipeline

    parts = parts_to_build(recipe, run)
    if parts is not None:
        from mpq_deploy.report.parts_page import write_pipeline
        from mpq_deploy.run.several_parts import build_whole

        view = build_whole(recipe, run, parts, "report", talk, crew)
        write_pipeline(run, view)
        return BuildResult(run, view.model_dump(mode="json"))
    with open_pipeline(recipe, run, talk, crew) as pipeline:
        summary = pipeline.run_until("report")
    return BuildResult(run, summary.values["report"])


def _check_settings(settings: Any) -> None:
    """Raise UsageError for anything but values by dotted key."""
    if settings is None or (
        isinstance(settings, dict) and all(isinstance(k, str) for k in settings)
    ):
        return
    raise wrong_kind(settings, "settings", 'Give a dict such as {"evaluate.samples": 32}.')


def _check_one_target(recipe: Recipe, run: Path) -> None:
    """Raise UsageError where several targets would be built."""
    from mpq_deploy.errors import UsageError
    from mpq_deploy.run.several_targets import runs_of

    found = runs_of(recipe, run)
    if found != [(recipe, run)]:
        names = ", ".join(own.target for own, _ in found)
        raise UsageError(
            f"{run} would be built for the targets {names}; build() takes one at a time.",
            "Give one target and a run folder of its own, or build with the command line.",
        )


def record(model: Any, folder: str | Path) -> AbstractContextManager[None]:
    """Record what ``model`` is given inside a ``with`` block, for ``build MODEL.onnx --calls FOLDER``.

    ``model``: a torch module, a diffusers pipeline, or an ``onnxruntime.InferenceSession``; ``folder``
    is written anew. Raises UsageError for anything else, or where the model was never called.
    """
    from mpq_deploy.calls.script_calls import record as record_calls

    return record_calls(model, given_path(folder, "folder"))


def load(
    source: str | Path,
    *,
    backend: str = "auto",
    device: str | None = None,
    threads: int = 0,
    lora: str | Sequence[str] | None = None,
) -> RuntimeUNet:
    """Open a run folder, an engine or an ONNX file as a replacement of ``pipe.unet``.

    Of a whole pipeline's run its denoiser is opened.

    ``backend``: auto, onnxruntime, tensorrt_rtx or tensorrt; auto takes the engine where a GPU and
    its library are. ``lora``: ``FILE[:SCALE]``, one or several, for a run that was built with ``lora_slots``.
    Raises as ``runtime.drop_in.load`` does. Needs PyTorch.
    """
    import importlib.util

    from mpq_deploy.errors import MissingDependencyError

    path = Path(given_path(source, "source"))
    check_whole(threads, "threads", 0)
    if not isinstance(backend, str):
        raise wrong_kind(backend, "backend", "Give auto, onnxruntime, tensorrt_rtx or tensorrt.")
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError("torch", "torch", "Replacing a diffusers UNet")
    from mpq_deploy.run.pipeline_file import denoiser_run
    from mpq_deploy.runtime.drop_in import load as open_runtime

    options: dict[str, Any] = {"backend": backend, "device": device, "threads": threads}
    return open_runtime(denoiser_run(path), **options, lora=lora)

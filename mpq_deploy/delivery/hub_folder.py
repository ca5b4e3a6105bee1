"""Write a folder for a model hub: a model card made of the report, the graphs, how to load them.

In: a finished run of one model, or of a whole pipeline. Out: a folder that names nothing of this
machine. Nothing is uploaded, and no network is used.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mpq_deploy.delivery.generation import MADE_FROM, generation_of
from mpq_deploy.device.generate.generation_folder import COMPONENTS
from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.evaluation_result import Evaluation
from mpq_deploy.evaluate.grid import save_grid
from mpq_deploy.graph.load import external_files, read_proto
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED, SIMULATED, WEIGHTS
from mpq_deploy.models.export import SPEC
from mpq_deploy.models.locate import DEMOS, INDEX_FILE, bundled_demo, is_hub_id
from mpq_deploy.models.spec import DenoiserSpec
from mpq_deploy.report.collect import titles
from mpq_deploy.report.data import ReportData
from mpq_deploy.report.markdown import markdown_report, plain, table
from mpq_deploy.report.parts_page import COLUMNS, part_rows, pipeline_facts
from mpq_deploy.report.read import read_report
from mpq_deploy.run.folder import COMPONENTS as RUNS
from mpq_deploy.run.folder import PIPELINE, RECIPE, check_one_run, refuse_altered
from mpq_deploy.run.pipeline_file import PipelineFile
from mpq_deploy.run.view import Run
from mpq_deploy.system.files import canonical_json, new_folder, write_text
from mpq_deploy.system.inputs import read_json_object, read_text
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.release import __version__
from mpq_deploy.system.yaml_file import YAML_BYTES, parse_yaml

CARD, PICTURE = "README.md", "samples.png"
# Columns of the picture, and what it shows of the variants.
COLUMNS_SHOWN, VARIANTS = 4, ("float", "ours")
_PATH = re.compile(r"(?<![\w.:/\\])(?:/[^\s\"'`,;]+|[A-Za-z]:[\\/][^\s\"'`,;]+)")
_FRONT_MATTER = re.compile(r"---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
Values = TypeVar("Values")
LIMITS = """\
- The figures compare this model with the float one from the same noise, in ONNX Runtime on a CPU. They say that images
  stayed the same, not that they are good. Where no latency is said to be measured, none was.
- `model.fp32.onnx` holds the quantized integers and computes in FP32; `model.onnx` is the same plan for
  {target}, in FP16. No engine is in this folder: engines are built for a device.
- Biases and limits of use are those of the source model."""


def write_hub_folder(run: Path, out: Path, talk: Talk) -> dict[str, Any]:
    """Write ``run`` as a folder for a hub; return the folder, its card's metadata, bytes and notes.

    Raises UsageError for a run that is not finished, one whose report is of an earlier plan, and a
    folder that is not empty; RunFolderError for files that were altered.
    """
    with new_folder(out) as folder:
        if (run / PIPELINE).is_file():
            data, body = _write_pipeline(run, folder, talk)
        else:
            check_one_run(run)
            data, body = _write_model(run, folder, talk)
        front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        write_text(folder / CARD, f"---\n{front}---\n\n{body}")
        files = [one for one in folder.rglob("*") if one.is_file()]
        size = sum(one.stat().st_size for one in files)
        notes = [
            f"{one.name} holds a path of this machine: look at it before you upload it."
            for one in files
            if one.name != WEIGHTS and _names_places(one, run)
        ]
    if data.get("license_name") == "unknown":
        notes.append("The licence is not known: complete it in README.md.")
    return {"folder": str(out), "card": data, "bytes": size, "notes": notes}


def without_paths(values: Values) -> Values:
    """Return JSON values whose texts name files of this machine by their last name alone.

    A path counts where its first folder is here: names of layers look like paths, too.
    """
    if isinstance(values, str):
        return _PATH.sub(_last_name, values)  # type: ignore[return-value]
    if isinstance(values, dict):
        return {key: without_paths(value) for key, value in values.items()}  # type: ignore[return-value]
    if isinstance(values, (list, tuple)):
        return [without_paths(value) for value in values]  # type: ignore[return-value]
    return values


def _last_name(match: re.Match[str]) -> str:
    text = match[0]
    first = Path("/", text.split("/")[1]) if text.startswith("/") else None
    return text if first is not None and not first.exists() else re.split(r"[\\/]", text)[-1]


def _names_places(file: Path, run: Path) -> bool:
    """Whether a file holds the run's path or the home folder's: graphs of others may, in their comments."""
    content = file.read_bytes()
    places = [one for one in (run.absolute(), Path.home()) if len(one.parts) > 1]
    return any(f"{one.as_posix()}/".encode() in content for one in places)


def _finished(run: Path) -> ReportData:
    """Return the report of a run. UsageError where there is none of its plan, or nothing was compared."""
    report = read_report(run)
    if report.evaluation is None:
        what = f"{run} is not finished: its images were not compared."
        raise UsageError(what, f"mpq-deploy build -o {run}")
    # As the hub's readers see it: nothing of where it lay, and the recipe beside the card.
    values = without_paths(report.model_dump(mode="json", exclude={"label"}))
    return ReportData.model_validate(values, extra="ignore")


def _write_model(run: Path, folder: Path, talk: Talk) -> tuple[dict[str, Any], str]:
    """Write a run of one model; return the card's metadata and text."""
    report, view = _finished(run), Run.opened(run, talk)
    spec = view.exported.spec
    for name in (SIMULATED, DEPLOYED):
        _copy_graph(view.deployed / name, folder)
    pipeline = spec.pipeline and spec.pipeline.model_copy(update={"calls": ()})
    described = spec.model_copy(update={"pipeline": pipeline}).model_dump(mode="json")
    write_text(folder / SPEC, canonical_json(without_paths(described)))
    if spec.scheduler:
        write_text(folder / "scheduler_config.json", canonical_json(without_paths(spec.scheduler)))
    _write_recipe(view.recipe.model_dump(mode="json", exclude_unset=True), folder)
    data = card_data(view.recipe.model, folder) | _task(spec)
    parts = [f"# {plain(spec.name)}, quantized", _intro(data), *_pictures(view, folder)]
    load = [_ORT_LOAD] if spec.timestep is None else [_DROP_IN, _ORT_LOAD]
    return data, _card(parts, load, report, markdown_report(report))


def _write_pipeline(run: Path, folder: Path, talk: Talk) -> tuple[dict[str, Any], str]:
    """Write a run of a whole pipeline; return the card's metadata and text."""
    view = PipelineFile.load(run)
    if view.measured_image_error is None:
        what = f"{run} is not finished: its final images were not compared."
        raise UsageError(what, f"mpq-deploy build -o {run}")
    reports = {name: _finished(run / RUNS / name) for name in view.parts}
    ignored = shutil.ignore_patterns(MADE_FROM)
    shutil.copytree(generation_of(run, talk), folder, ignore=ignored, dirs_exist_ok=True)
    for name in view.parts:
        deployed = Run.opened(run / RUNS / name, talk).deployed / DEPLOYED
        _copy_graph(deployed, folder / COMPONENTS / name)
    _write_recipe(view.recipe, folder)
    data = card_data(view.source, folder) | {"pipeline_tag": "text-to-image"}
    denoiser = Run.opened(run / RUNS / view.denoiser, talk)
    name = plain(Path(view.source).name)
    parts = [f"# {name}, quantized", _intro(data), *_pictures(denoiser, folder)]
    report = reports[view.denoiser]
    joint = [
        f"## All parts ({plain(view.class_name)})",
        *(f"{plain(fact)}." for fact in pipeline_facts(view)),
        table(COLUMNS, part_rows(view)),
        *map(plain, without_paths(list(view.notes))),
        f"Below: the report of the {plain(view.denoiser)} alone.",
        markdown_report(report),
    ]
    return data, _card(parts, [_GENERATE], report, "\n\n".join(joint))


def _copy_graph(graph: Path, place: Path) -> None:
    """Copy a graph of a run and its weights, which several graphs share."""
    if not graph.is_file():
        raise UsageError(f"There is no {graph}.", "Finish the run: mpq-deploy build -o RUN.")
    files = [graph, *external_files(read_proto(graph), graph)]
    refuse_altered(files)
    for one in files:
        if not (place / one.name).exists():
            shutil.copyfile(one, place / one.name)


def _write_recipe(recipe: dict[str, Any], folder: Path) -> None:
    text = yaml.safe_dump(without_paths(recipe), sort_keys=False, allow_unicode=True)
    write_text(folder / RECIPE, text)


def card_data(model: str | None, folder: Path) -> dict[str, Any]:
    """Return the metadata that follow from the source ``model``; copy its licence files to ``folder``.

    The licence is that of the source folder's own card; of a model of the hub the card says where
    to look; else it is unknown.
    """
    data: dict[str, Any] = {"license": "other", "license_name": "unknown"}
    hub_id = model if model is not None and is_hub_id(model) and not Path(model).exists() else None
    demo = model is None or model in DEMOS
    source = bundled_demo(model) if demo else Path(str(model))
    if hub_id is not None:
        data |= {"license_name": "see-base-model"}
        data["license_link"] = f"https://huggingface.co/{hub_id}"
    elif source.is_dir():
        card = _front_matter(source / CARD)
        if card.get("license"):
            data = {k: card[k] for k in ("license", "license_name", "license_link") if k in card}
        for one in sorted(source.glob("LICENSE*")):
            shutil.copyfile(one, folder / one.name)
            if data.get("license_name") == "unknown":
                data |= {"license_name": "see-license-file", "license_link": one.name}
        index = source / INDEX_FILE
        named = read_json_object(index).get("_name_or_path") if index.is_file() else None
        hub_id = named if isinstance(named, str) and is_hub_id(named) else None
    if hub_id is not None:
        data |= {"base_model": hub_id, "base_model_relation": "quantized"}
    tags = ["mpq-deploy", "quantized", "mixed-precision", "diffusion"]
    return {**data, "library_name": "onnx", "tags": tags}


def _front_matter(card: Path) -> dict[str, Any]:
    """Return the texts of a card's front matter; nothing where there is no card or none in it."""
    if not card.is_file():
        return {}
    found = _FRONT_MATTER.match(read_text(card, limit=YAML_BYTES))
    values = parse_yaml(found[1], str(card)) if found else None
    known = values if isinstance(values, dict) else {}
    return {key: value for key, value in known.items() if isinstance(value, str)}


def _task(spec: DenoiserSpec) -> dict[str, Any]:
    """Return what the hub calls what a model does; nothing for a part that does not denoise."""
    if spec.timestep is None:
        return {}
    told = any(one.name == "encoder_hidden_states" for one in spec.conditions)
    return {"pipeline_tag": "text-to-image" if told else "unconditional-image-generation"}


def _pictures(view: Run, folder: Path) -> list[str]:
    """Write the float model's and the plan's images side by side; return where the card shows them."""
    images = Evaluation.load(view.stage("evaluate"))
    named = {
        name: images.images[name][:COLUMNS_SHOWN] for name in VARIANTS if name in images.images
    }
    if len(named) < len(VARIANTS):
        return []
    called = titles(view.plan)
    rows = {called.get(name, name): one for name, one in named.items()}
    save_grid(folder / PICTURE, rows, images.labels)
    return [f"![From the same noise: {', '.join(map(plain, rows))}]({PICTURE})"]


def _intro(data: dict[str, Any]) -> str:
    base = data.get("base_model")
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    text = f"A mixed-precision quantization{of} by mpq-deploy {__version__}; `{RECIPE}` holds every setting."
    if data.get("license_name") == "unknown":
        text += (
            " **Licence: unknown.** The source folder has no model card; complete it before upload."
        )
    return text


_ORT_LOAD = """In ONNX Runtime, without integer kernels in the place of what the graph says, as in the figures below:

```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
session = onnxruntime.InferenceSession("model.fp32.onnx", options)
```"""
_DROP_IN = """In a diffusers pipeline, in the place of its UNet or transformer:

```python
import mpq_deploy

unet = mpq_deploy.load("model.fp32.onnx")  # then pipe.unet = unet, or pipe.transformer
```"""
_GENERATE = """Images without PyTorch, with `mpq-deploy[generate]` installed (or `mpq-deploy generate . --prompt ...`):

```python
from mpq_deploy import Generator

[made] = Generator(".")("a red bicycle", steps=20)
made.image.save("image.png")
```"""


def _card(parts: list[str], load: list[str], report: ReportData, body: str) -> str:
    limits = LIMITS.format(target=plain(report.target.title))
    lines = [*parts, "## How to load it", *load, "## Limits", limits, body.rstrip()]
    return "\n\n".join(lines) + "\n"

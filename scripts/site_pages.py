"""Pages of the documentation site that are made from the code, so that they cannot go stale.

Out: Markdown by its place in the site: one page per command from the Typer application, every recipe key from the
pydantic model, every target from its YAML. Needs no mkdocs; ``site_hook.py`` hands the pages to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mpq_deploy.cli import app
from mpq_deploy.engine.target import Figure, Target, known_targets, load_target
from mpq_deploy.engine.target_text import describe_target
from mpq_deploy.graph.layers import LAYER_OPS
from mpq_deploy.recipe import Recipe, bundled_recipes
from mpq_deploy.system.quantities import Budget, ImageSizes, Latency

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RECIPE_PAGE, TARGETS_PAGE, COMMANDS_FOLDER = "recipe.md", "every-target.md", "commands"
# Files beside docs/ that are pages of the site too, by their place in the repository.
ROOT_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
    "calibration/README.md": "calibration.md",
}
WHOLE = "The whole build"
PLAIN_TYPES = {
    **{int: "integer", float: "number", str: "text", bool: "true or false"},
    **{Budget: "share, size or bits per weight", Latency: "time with its unit"},
}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def generated_pages() -> dict[str, str]:
    """Return Markdown by place in the site, for every page that has no file of its own in docs/."""
    pages = {f"{COMMANDS_FOLDER}/{name}.md": command_page(name) for name in commands()}
    pages[f"{COMMANDS_FOLDER}/index.md"] = commands_page()
    pages[RECIPE_PAGE] = recipe_page()
    pages[TARGETS_PAGE] = targets_page()
    return pages | {
        page: (ROOT / source).read_text(encoding="utf-8") for source, page in ROOT_PAGES.items()
    }


def commands() -> dict[str, Any]:
    """Return the commands by name, in the order of ``--help``."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def command_page(name: str) -> str:
    """One command: what it does, its example, arguments, and options by group."""
    command = commands()[name]
    context = command.make_context(f"mpq-deploy {name}", [], resilient_parsing=True)
    parts = [f"# mpq-deploy {name}", command.help or ""]
    usage = " ".join(("mpq-deploy", name, *command.collect_usage_pieces(context)))
    parts.append(f"```text\n{usage}\n```")
    example = _example(command)
    if example:
        parts.append(f"Example:\n\n```sh\n{example}\n```")
    for title, parameters in _panels(command).items():
        parts.append(f"## {title}\n\n{_parameters(parameters, context)}")
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """All commands, by the groups of ``--help``, and the options that stand before a command."""
    root = typer.main.get_command(app)
    context = root.make_context("mpq-deploy", [], resilient_parsing=True)
    parts = [
        "# Commands",
        "Made from the command line itself: `mpq-deploy COMMAND --help` prints the same.",
    ]
    groups: dict[str, list[str]] = {}
    for name, command in commands().items():
        first = (command.help or "").split("\n\n")[0].replace("\n", " ")
        panel = command.rich_help_panel if isinstance(command.rich_help_panel, str) else WHOLE
        groups.setdefault(panel, []).append(f"| [`{name}`]({name}.md) | {_cell(first)} |")
    for title, rows in groups.items():
        parts.append("\n".join((f"## {title}\n", "| command | what it does |", "|---|---|", *rows)))
    parts.append(f"## Options before the command\n\n{_parameters(root.params, context)}")
    parts.append("Results go to stdout, progress and warnings to stderr. " + EXIT_CODES)
    return "\n\n".join(parts) + "\n"


EXIT_CODES = (
    "Exit codes: 0 done, 1 failed (or a limit of `gate` not kept), 2 wrong command or input, "
    "130 stopped by Ctrl-C."
)


def recipe_page() -> str:
    """Every key of a recipe with type, default and description, and the bundled recipes."""
    parts = [RECIPE_HEAD]
    for path, model in _sections(Recipe):
        title = f"## {path}" if path else "## The run"
        rows = [
            _key_row(f"{path}.{name}" if path else name, field) for name, field in _own_keys(model)
        ]
        head = "| key | type | default | what it is |\n|---|---|---|---|"
        parts.append(
            "\n".join(
                (f"{title}\n", *([model.__doc__ + "\n"] if model.__doc__ else []), head, *rows)
            )
        )
    parts.append(
        "## Bundled recipes\n\nEach holds what differs from the defaults: `mpq-deploy build --recipe NAME`."
    )
    parts += [_shipped(name, path) for name, path in bundled_recipes().items()]
    return "\n\n".join(parts) + "\n"


RECIPE_HEAD = """# Recipe: every key

A recipe is a YAML file with any of these keys; what it leaves out has the default. `mpq-deploy recipe` lists those that
come with the package and prints one in full, with a comment per key. Options of the command line win over
it, and a run folder keeps the whole of it in `recipe.yaml`. An unknown key is an error that names the nearest one.

    mpq-deploy build ./my-pipeline --recipe mine.yaml

```yaml
budget: 0.3
target: rtx-ada
allocate:
  protect:
    - {layers: "conv_in", schemes: [fp16]}
```

This page is made from the model that validates recipes."""


def targets_page() -> str:
    """All targets side by side, then each in full as ``mpq-deploy targets NAME`` prints it."""
    targets = [load_target(name) for name in known_targets()]
    head = "| target | dialect | builder | memory | bandwidth | INT8, dense | FP16, dense |\n"
    head += "|---|---|---|---:|---:|---:|---:|"
    parts = [
        TARGETS_HEAD,
        "\n".join((head, *map(_target_row, targets))),
        "## Which layer may take what",
    ]
    rows = [
        f"| [`{t.name}`](#{t.name}) | "
        + " | ".join(", ".join(t.schemes[op]) for op in LAYER_OPS)
        + " |"
        for t in targets
    ]
    parts.append(
        "\n".join(
            (f"| target | {' | '.join(LAYER_OPS)} |", "|---" * (len(LAYER_OPS) + 1) + "|", *rows)
        )
    )
    parts.append("What a target leaves out has its reason below.")
    parts += [f"## {target.name}\n\n```text\n{describe_target(target)}\n```" for target in targets]
    return "\n\n".join(parts) + "\n"


TARGETS_HEAD = """# Every target

Made from the YAML files in `mpq_deploy/engine/targets/`. What a target is, how to write your own and what
differs between the dialects of TensorRT: [targets](targets.md). A figure with `?` was not looked up in
the source that it names."""


def recipe_keys() -> Iterator[str]:
    """Every dotted key of a recipe; keys of a list's entries as ``allocate.protect[].layers``."""
    for path, model in _sections(Recipe):
        for name, _ in _own_keys(model):
            yield f"{path}.{name}" if path else name


def _sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The model itself and every model inside it, with its dotted path."""
    yield path, model
    for name, field in model.model_fields.items():
        where = f"{path}.{name}" if path else name
        if _is_model(field.annotation):
            yield from _sections(field.annotation, where)
        for inner in get_args(field.annotation):
            if _is_model(inner):
                yield from _sections(inner, f"{where}[]")


def _own_keys(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    yield from (
        (name, field)
        for name, field in model.model_fields.items()
        if not _is_model(field.annotation)
    )


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _key_row(key: str, field: FieldInfo) -> str:
    limits = ", ".join(
        f"{words} {getattr(limit, name)}"
        for limit in field.metadata
        for name, words in LIMITS.items()
        if hasattr(limit, name)
    )
    kind = type_text(field.annotation) + (f", {limits}" if limits else "")
    default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
    return f'| <code id="{key}">{key}</code> | {_cell(kind)} | {_cell(default)} | {_cell(field.description or "")} |'


def type_text(annotation: Any) -> str:
    """Return an annotation in words: ``list of text``, ``one of `a`, `b```, ``number or null``."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(inner[0])
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join("null" if one is NoneType else type_text(one) for one in inner)
    if origin is tuple:
        return f"list of {type_text(inner[0])}"
    if origin is dict:
        return f"mapping of {type_text(inner[0])} to {type_text(inner[1])}"
    if _is_model(annotation):
        return "mappings (below)"
    # Budgets and latencies are written as text.
    return PLAIN_TYPES.get(annotation, "text")


def _shipped(name: str, path: Path) -> str:
    return f"### {name}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"


def _yaml(value: Any) -> str:
    """A value as a recipe writes it, on one line."""
    if isinstance(value, Budget | Latency):
        return str(value)
    value = value.text if isinstance(value, ImageSizes) else value
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def _target_row(target: Target) -> str:
    cells = (
        f"[`{target.name}`](#{target.name})",
        target.dialect,
        target.builder,
        _figure(target.memory_bytes, "GB", 1e9),
        _figure(target.bandwidth_bytes_per_s, "GB/s", 1e9),
        _figure(target.int8_ops_per_s, "TOPS", 1e12),
        _figure(target.fp16_ops_per_s, "TFLOPS", 1e12),
    )
    return f"| {' | '.join(cells)} |"


def _figure(figure: Figure | None, unit: str, scale: float) -> str:
    return (
        ""
        if figure is None
        else f"{figure.value / scale:,.1f} {unit}{'' if figure.confirmed else ' ?'}"
    )


def _example(command: Any) -> str:
    return (command.epilog or "").removeprefix("Example: ").strip()


def _panels(command: Any) -> dict[str, list[Any]]:
    """A command's parameters by the group that ``--help`` shows them in."""
    found: dict[str, list[Any]] = {}
    for parameter in command.params:
        usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panel = parameter.rich_help_panel if isinstance(parameter.rich_help_panel, str) else usual
        found.setdefault(panel, []).append(parameter)
    return found


def _parameters(parameters: list[Any], context: Any) -> str:
    rows = ["| name | meaning | default |", "|---|---|---|"]
    for parameter in parameters:
        name, text = parameter.get_help_record(context)
        text, default = _without_default(text)
        rows.append(f"| {_names(name)} | {_cell(text)} | {_cell(default)} |")
    return "\n".join(rows)


def _names(text: str) -> str:
    """``--objective <a|b>`` as code that does not break a table."""
    name, bracket, values = text.partition(" <")
    shown = f"`{_cell(name)}`"
    choices = values.removesuffix(">").split("|")
    if len(choices) > 1:
        shown += " " + ", ".join(f"`{choice}`" for choice in choices)
    elif bracket and choices[0] not in ("str", "path"):
        shown += f" {choices[0].removesuffix(' range')}"
    return shown


def _without_default(text: str) -> tuple[str, str]:
    """Split what the command line appends in brackets from the help: ``[default: (0.35)]``, ``[required]``."""
    found = re.search(r"\s*\[((?:default: |required|\S*x[<>]=?|x[<>]=?)[^\]]*)\]$", text)
    if found is None:
        return text, ""
    notes = [note.strip() for note in found.group(1).split(";")]
    shown = [re.sub(r"^default: \(?(.*?)\)?$", r"\1", note) for note in notes]
    return text[: found.start()], ", ".join(shown)


def _cell(text: str) -> str:
    """Text for a cell of a table: one line, bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")

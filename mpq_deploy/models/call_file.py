"""What a pipeline is called with, from a YAML file: ``build --call FILE``.

Example, a list of calls (or one), one per image, used in turn::

    - {prompt: a red fox, negative_prompt: blurred, image: fox.png, strength: 0.6}
    - {prompt: a lighthouse, image: sea.png, strength: 0.6}

A picture is named by its file, and a tensor (embeddings, depth) by a ``.npy``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.models.additions import LEFT_OUT
from mpq_deploy.system.names import printable
from mpq_deploy.system.yaml_file import read_yaml

# Before the path of a picture or array in a call that was read.
FILE = "file://"
ARRAY = ".npy"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ARRAY)
# What each run sets itself: the noise of an image, and what it returns.
OURS = ("generator", "return_dict", "callback", "callback_on_step_end")
# What a ControlNet's picture is called, where there is another one, and the part that reads it.
IMAGE, CONTROL, CONTROL_NET = "image", "control_image", "controlnet"
HINT = "Give the keyword arguments of the pipeline, such as: - {prompt: a red fox, image: fox.png}."


def read_calls(path: Path, pipeline: Any) -> tuple[dict[str, Any], ...]:
    """Return the calls of a file, pictures and arrays as ``file://`` with their whole path.

    Raises UsageError for an argument that the pipeline does not take, or a file that is not there.
    """
    calls = _calls_in(path)
    parameters = inspect.signature(type(pipeline).__call__).parameters.values()
    taken = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
    taken = [name for name in taken if name not in ("self", *OURS)]
    named = dict.fromkeys(str(name) for call in calls for name in call)
    for name in named:
        if name not in taken:
            wanted = () if name in OURS else ([*named], [name])
            other = next(filter(None, (_other_class(pipeline, some) for some in wanted)), "")
            raise UsageError(
                f"{path} names '{printable(name)}', which {type(pipeline).__name__} does not take"
                f"{' from a file' if name in OURS else ''}.",
                other or f"{nearest(name, taken)}It takes {', '.join(taken)}.",
            )
    return tuple(
        {str(name): _placed(value, path) for name, value in call.items()} for call in calls
    )


def _other_class(pipeline: Any, names: Sequence[str]) -> str:
    """Say which class of diffusers runs the same parts and takes all of ``names``; "" for none.

    diffusers' own tables of tasks (``AutoPipelineForInpainting``) say which classes belong together.
    The class that lacks the fewest parts is named, which may be a ControlNet alone.
    """
    from diffusers.pipelines.auto_pipeline import SUPPORTED_TASKS_MAPPINGS as TABLES

    own = type(pipeline)
    found = [key for table in TABLES for key, one in table.items() if one is own]
    held = [name for name, part in pipeline.components.items() if part is not None]
    fits = list[tuple[tuple[Any, ...], str]]()
    for key, one in ((key, one) for table in TABLES for key, one in table.items()):
        spared = (*held, *LEFT_OUT, *one._optional_components)
        lacking = [name for name in _required(one.__init__) if name not in spared]
        taken = inspect.signature(one.__call__).parameters
        # What a control picture is called where it is the only one.
        alone = CONTROL_NET in lacking and CONTROL in names and IMAGE not in names
        wanted = [IMAGE if alone and name == CONTROL else name for name in names]
        missing = not set(wanted) <= set(taken) or (CONTROL in taken and IMAGE in taken and alone)
        related = any(key == name or key.startswith(f"{name}-") for name in found)
        if one is own or missing or not related or lacking not in ([], [CONTROL_NET]):
            continue
        said = f"{one.__name__} takes {', '.join(names)}"
        said += f" (as '{IMAGE}')" if alone and CONTROL not in taken else ""
        way = "name it as _class_name in the folder's model_index.json."
        if lacking:
            way = (
                f"it needs a {CONTROL_NET}, too: save_pretrained one with it, and give that folder."
            )
        fits.append(((len(lacking), len(taken), len(key), one.__name__), f"{said}: {way}"))
    return min(fits)[1] if fits else ""


def _required(function: Any) -> list[str]:
    """Return the parameters without a default."""
    parameters = [*inspect.signature(function).parameters.values()][1:]
    return [one.name for one in parameters if one.default is inspect.Parameter.empty]


def pictures_of(path: Path) -> list[Path]:
    """Return the pictures and arrays that the calls of a file name. Raises UsageError as ``read_calls``."""
    found: list[Path] = []

    def look(value: Any) -> None:
        if isinstance(value, list):
            for one in value:
                look(one)
        elif isinstance(value, str) and Path(value).suffix.lower() in PICTURES:
            found.append(_picture(value, path))

    for call in _calls_in(path):
        for value in call.values():
            look(value)
    return found


def _calls_in(path: Path) -> list[dict[str, Any]]:
    content = read_yaml(path, error=UsageError)
    calls = content if isinstance(content, list) else [content]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise UsageError(f"{path} holds no calls.", HINT)
    return calls


def _placed(value: Any, path: Path) -> Any:
    if isinstance(value, list):
        return [_placed(one, path) for one in value]
    if isinstance(value, str) and Path(value).suffix.lower() in PICTURES:
        return f"{FILE}{_picture(value, path)}"
    return value


def _picture(value: str, path: Path) -> Path:
    picture = (path.parent / Path(value).expanduser()).resolve()
    if not picture.is_file():
        raise UsageError(f"{path} names the file {printable(value)}, which is not there.", HINT)
    return picture

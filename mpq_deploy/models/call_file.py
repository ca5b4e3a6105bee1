"""What a pipeline is called with, from a YAML file: ``build --call FILE``.

Example, a list of calls (or one), one per image, used in turn::

    - {prompt: a red fox, negative_prompt: blurred, image: fox.png, strength: 0.6}
    - {prompt: a lighthouse, image: sea.png, strength: 0.6}

A picture is named by its file, and a tensor (embeddings, depth) by a ``.npy``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.system.names import printable
from mpq_deploy.system.yaml_file import read_yaml

# Before the path of a picture or array in a call that was read.
FILE = "file://"
ARRAY = ".npy"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ARRAY)
# What each run sets itself: the noise of an image, and what it returns.
OURS = ("generator", "return_dict", "callback", "callback_on_step_end")
HINT = "Give the keyword arguments of the pipeline, such as: - {prompt: a red fox, image: fox.png}."


def read_calls(path: Path, pipeline: Any) -> tuple[dict[str, Any], ...]:
    """Return the calls of a file, pictures and arrays as ``file://`` with their whole path.

    Raises UsageError for an argument that the pipeline does not take, or a file that is not there.
    """
    calls = _calls_in(path)
    taken = [
        name for name in inspect.signature(type(pipeline).__call__).parameters if name != "self"
    ]
    for call in calls:
        for name in call:
            if name not in taken or name in OURS:
                raise UsageError(
                    f"{path} names '{printable(str(name))}', which {type(pipeline).__name__} does not take"
                    f"{' from a file' if name in OURS else ''}.",
                    f"{nearest(str(name), taken)}It takes {', '.join(n for n in taken if n not in OURS)}.",
                )
    return tuple(
        {str(name): _placed(value, path) for name, value in call.items()} for call in calls
    )


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

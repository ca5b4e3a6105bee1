"""JSON files from others as pydantic models: every value checked, or one line that names the field."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from mpq_deploy.errors import InputError, MpqError
from mpq_deploy.system.inputs import TEXT_BYTES, read_json
from mpq_deploy.system.names import printable

WORDS = {
    "tuple_type": "Input should be a list",
    "model_type": "Input should be keys with values",
    "dict_type": "Input should be keys with values",
}
M = TypeVar("M", bound=BaseModel)


def read_model(
    kind: type[M],
    path: Path,
    *,
    limit: int = TEXT_BYTES,
    infinite: bool = False,
    error: type[MpqError] = InputError,
    hint: str = "",
) -> M:
    """Return the JSON file at ``path`` as a ``kind``. Raises ``error`` as ``read_json`` and ``model_of``."""
    values = read_json(path, limit=limit, infinite=infinite, error=error, hint=hint)
    read: M = model_of(kind, values, str(path), error=error, hint=hint)
    return read


def model_of(
    kind: Any, values: Any, source: str, *, error: type[MpqError] = InputError, hint: str = ""
) -> Any:
    """Return ``values`` as ``kind`` (a model, or any type that pydantic knows).

    Raises ``error`` that names ``source`` and the first field that is wrong.
    """
    try:
        return _adapter(kind).validate_python(values)
    except (ValidationError, RecursionError) as problem:
        said = first_error(problem) if isinstance(problem, ValidationError) else "nested too deep"
        raise error(f"{printable(source)}: {said}.", hint) from problem


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    # To make one takes longer than to use it.
    return TypeAdapter(kind)


def error_text(problem: Any) -> str:
    """Return what pydantic says of a field, in the words of files instead of Python's."""
    message: str = problem["msg"]
    return WORDS.get(problem["type"], message).removeprefix("Value error, ")


def first_error(error: ValidationError) -> str:
    """Name the first field that is wrong, what is wrong with it and what was found; count the rest."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))[:200] or "its content"
    message = error_text(first)
    found = "" if first["type"] == "missing" else f" (found {repr(first['input'])[:60]})"
    more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return printable(f"{place}: {message}{found}{more}")

"""Values of JSON as frozen dataclasses, every field checked: where pydantic is not installed.

Standard library only: devices use it, too.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def typed(kind: type[T], values: Any, place: str = "") -> T:
    """Return ``values`` (as ``dataclasses.asdict`` and JSON leave them) as an instance of ``kind``.

    ``kind`` may be a dataclass, ``str``, ``int``, ``float``, ``bool``, a union with None, ``list``,
    ``tuple`` or ``dict`` of those; a float takes a whole number. Raises ValueError that names the
    field for another kind of value, an unknown field, and one that is missing without a default.
    """
    made: T = _made(kind, values, place)
    return made


def _made(kind: Any, value: Any, place: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, place)
    if origin is typing.Literal:
        if value not in arguments or isinstance(value, bool) != isinstance(arguments[0], bool):
            raise _wrong(place, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        return _tuple(arguments, value, place)
    if origin is list:
        return list(_items(arguments[0], value, place))
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _wrong(place, "an object", value)
        return {key: _made(arguments[1], one, _inner(place, key)) for key, one in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise _wrong(place, "a number", value) from error
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise _wrong(place, names.get(kind, getattr(kind, "__name__", str(kind))), value)
    return value


def _dataclass(kind: Any, values: Any, place: str) -> Any:
    if not isinstance(values, dict):
        raise _wrong(place, "an object", values)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for name in values:
        if name not in fields:
            raise ValueError(f"'{_inner(place, name)}' is not a field that is known")
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not optional:
            raise ValueError(f"'{_inner(place, name)}' is missing")
    return kind(
        **{name: _made(hints[name], one, _inner(place, name)) for name, one in values.items()}
    )


def _union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    for kind in others[:-1]:
        try:
            return _made(kind, value, place)
        except ValueError:
            continue
    return _made(others[-1], value, place)


def _tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:
        return tuple(_items(kinds[0], value, place))
    if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
        raise _wrong(place, f"a list of {len(kinds)}", value)
    return tuple(
        _made(kind, one, _inner(place, str(index)))
        for index, (kind, one) in enumerate(zip(kinds, value))
    )


def _items(kind: Any, value: Any, place: str) -> typing.Iterator[Any]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(place, "a list", value)
    return (_made(kind, one, _inner(place, str(index))) for index, one in enumerate(value))


def _inner(place: str, name: str) -> str:
    return f"{place}.{name}" if place else str(name)


def _wrong(place: str, wanted: str, value: Any) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ValueError(f"'{place or 'the content'}' must be {wanted}, and is {shown}")

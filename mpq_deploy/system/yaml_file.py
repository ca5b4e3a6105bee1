"""YAML files from others: plain values within limits, or one line that says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mpq_deploy.errors import InputError, MpqError
from mpq_deploy.system import inputs
from mpq_deploy.system.inputs import check_values, read_text
from mpq_deploy.system.names import printable

# PyYAML reads about 100 kB a second: what takes longer than some seconds is not a recipe (our choice).
YAML_BYTES = 512 << 10


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader (not libyaml's: that one's recursion is not bounded), with unique keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping; raise ConstructorError for a key that occurs twice."""
        if isinstance(node, yaml.MappingNode):
            seen: set[Any] = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
                if name in seen:
                    what = f"the key '{key.value}' occurs twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        """Return a number; ConstructorError for 010 and 1:30, which YAML reads to the base 8 and 60."""
        if re.fullmatch(r"[-+]?0[0-9_]+|.*:.*", node.value):
            what = (
                f"{node.value} would be {super().construct_yaml_int(node)}: quote it if it is text"
            )
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        return int(super().construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path, *, error: type[MpqError] = InputError, hint: str = "") -> Any:
    """Return the values of a YAML file. Raises ``error`` as ``parse_yaml``, or if it cannot be read."""
    text = read_text(path, limit=YAML_BYTES, error=error, hint=hint)
    return parse_yaml(text, str(path), error=error, hint=hint)


def parse_yaml(
    text: str, source: str, *, error: type[MpqError] = InputError, hint: str = ""
) -> Any:
    """Return the values of one YAML document; ``source`` names it in errors.

    Raises ``error`` for text that is not YAML, tags that make objects, keys that occur twice or are
    no text, numbers that are not finite, and values beyond the limits of ``system.inputs``, aliases
    counted each time.
    """
    try:
        values = yaml.load(text, _Loader)
    except RecursionError as problem:
        raise error(f"{printable(source)} is nested too deeply.", hint) from problem
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        text = ", ".join(part for part in (problem.context, problem.problem) if part)
        what = f"{printable(source)} is not usable YAML: {where}{printable(text)}."
        raise error(what, hint) from problem
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
    ) as problem:
        # PyYAML itself fails with ValueError on dates such as 2024-13-01 and on long numbers, with
        # the others on odd keys.
        text = printable(" ".join(str(problem).split()))
        raise error(f"{printable(source)} is not usable YAML: {text}.", hint) from problem
    if _count(values, {}) > inputs.VALUES:
        what = f"{printable(source)} holds more than {inputs.VALUES:,} values, the maximum"
        raise error(f"{what}; what an alias repeats counts each time.", hint)
    check_values(values, source, error=error, hint=hint)
    return values


def _count(values: Any, known: dict[int, int]) -> int:
    """Return how many values there are, shared parts each time they occur; these are walked once."""
    if not isinstance(values, (dict, list)):
        return 1
    if id(values) not in known:
        # A part of itself, which is refused as nested too deep.
        known[id(values)] = 1
        inner = values.values() if isinstance(values, dict) else values
        known[id(values)] = 1 + sum(_count(one, known) for one in inner)
    return known[id(values)]

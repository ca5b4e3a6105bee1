"""Targets: what a device's builder takes, as data. One YAML each, or the user's own file.

In: a target's name or a YAML's path. Out: a validated ``Target`` that says which layer may take
which scheme and why not (``refusal``), and what is known about the device.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from functools import cache
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpq_deploy.engine.build_target import BuildTarget
from mpq_deploy.engine.trtexec import find_trtexec
from mpq_deploy.errors import MpqError, UsageError, nearest
from mpq_deploy.formats.scheme import (
    BRANCH_KINDS,
    FAMILIES,
    SCHEMES,
    SIMULATED,
    Scheme,
    families,
    nearest_scheme,
    rate_of,
)
from mpq_deploy.graph.dialects import Dialect, dialect_named
from mpq_deploy.graph.layers import LAYER_OPS, Layer
from mpq_deploy.system.names import plain_name, printable
from mpq_deploy.system.yaml_file import parse_yaml, read_yaml

DialectName = Literal["trt-rtx", "trt-10.3", "trt-10.13", "trt-11", "onnxruntime"]
Builder = Literal["tensorrt_rtx", "tensorrt", "trtexec", "none"]
Proof = Literal["built here", "built on the device", "documented", "unproven"]
Condition = Literal[
    "always", "depthwise", "grouped", "conv1d", "conv3d", "odd elements", "odd last dimension"
]
SUFFIXES = (".yaml", ".yml")

# The builder of TensorRT-RTX, which runs here without a GPU.
RTX = "tensorrt_rtx"


class _InvalidNameError(MpqError, ValueError):
    """A ValueError, so that pydantic reports it together with all other problems."""


class Figure(BaseModel):
    """A figure of the hardware, its source, and whether that source was looked up."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float = Field(gt=0)
    source: str = Field(min_length=1)
    confirmed: bool = False


class Rule(BaseModel):
    """Schemes that some layers may not take, and why; ``when`` says which layers of ``ops``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ops: tuple[str, ...] = LAYER_OPS
    families: tuple[str, ...]
    when: Condition = "always"
    reason: str

    @model_validator(mode="after")
    def _known(self) -> Rule:
        _check_known("op", self.ops, LAYER_OPS)
        _check_known("scheme family", self.families, families())
        return self

    def concerns(self, op: str, layer: Layer, scheme: Scheme) -> bool:
        """Tell whether the rule forbids ``scheme`` for ``layer``, written as an ``op``."""
        return (
            op in self.ops and scheme.family in self.families and _holds(self.when, layer, scheme)
        )


class Evidence(BaseModel):
    """How far a claim about the target is proven, and by what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    proof: Proof
    by: str


class Target(BaseModel):
    """A device or a family of devices, its builder, and what that builder takes.

    ``schemes``: op -> families that its layers may take; every family left out has a rule with the
    reason. ``branches``: op -> kinds of branches that may stand beside a body. ``versions``: the
    builder's versions that the dialect holds for, as far as they are given (``10.3`` is 10.3.x);
    empty accepts any. ``jetpack``: the JetPack releases that bring them. Rates are peak and dense;
    ``figures_of`` is the device that they belong to, where the target is a family.
    ``conv_products``: convolutions may become matrix products where their weights alone are
    quantized, and then take what a MatMul takes (``latency.conv_products``). ``shown``: forms
    that its dialect does not vouch for, and a device has shown (``mpq-deploy probe``). ``protected``:
    shell patterns of layer names that stay FP16 unless the recipe says otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    dialect: DialectName
    builder: Builder
    versions: tuple[str, ...] = ()
    jetpack: str = ""
    compute_capabilities: tuple[str, ...] = ()
    figures_of: str = ""
    memory_bytes: Figure | None = None
    bandwidth_bytes_per_s: Figure | None = None
    int8_ops_per_s: Figure | None = None
    fp16_ops_per_s: Figure | None = None
    fp8_ops_per_s: Figure | None = None
    fp4_ops_per_s: Figure | None = None
    schemes: dict[str, tuple[str, ...]]
    branches: dict[str, tuple[str, ...]] = {}
    conv_products: bool = True
    shown: tuple[Literal["int4_conv", "requantized", "int8_weights_only"], ...] = ()
    rules: tuple[Rule, ...] = ()
    protected: tuple[str, ...] = ()
    proven: tuple[Evidence, ...] = ()

    @model_validator(mode="after")
    def _well_formed(self) -> Target:
        plain_name(self.name, "name", _InvalidNameError)
        for text in (self.title, self.jetpack, self.figures_of):
            if printable(text) != text:
                raise ValueError(f"'{printable(text)}' holds control characters")
        for name in self.compute_capabilities:
            if not re.fullmatch(r"SM\d{2,3}", name):
                raise ValueError(f"compute_capabilities: '{name}' is not of the form SM87")
        for version in self.versions:
            if not re.fullmatch(r"\d+(\.\d+)*\.?", version):
                raise ValueError(f"versions: '{version}' is not of the form '10.3' (in quotes)")
        return self

    @model_validator(mode="after")
    def _complete(self) -> Target:
        _check_known("op", (*self.schemes, *self.branches), LAYER_OPS)
        for op in LAYER_OPS:
            _check_known("branch", self.branches.get(op, ()), tuple(BRANCH_KINDS))
            allowed = self.schemes.get(op, ())
            _check_known("scheme family", allowed, families())
            if "fp16" not in allowed:
                raise ValueError(f"schemes.{op} must list fp16, which every layer may fall back to")
            explained = {
                f for r in self.rules if op in r.ops and r.when == "always" for f in r.families
            }
            silent = [
                family for family in FAMILIES if family not in allowed and family not in explained
            ]
            if silent:
                raise ValueError(
                    f"schemes.{op} leaves out {', '.join(silent)}, and no rule gives the reason"
                )
        for family in dict.fromkeys(f for listed in self.schemes.values() for f in listed):
            rate = rate_of(family)
            if rate and self.int8_ops_per_s is not None and getattr(self, rate) is None:
                raise ValueError(f"schemes list {family}, and {rate} is not given")
        if self.simulated and self.builder != "none":
            raise ValueError(
                f"simulated schemes never reach a builder, and this target has '{self.builder}'"
            )
        return self

    @property
    def build_target(self) -> BuildTarget:
        """What a builder needs to know about it."""
        return BuildTarget(
            **{name: getattr(self, name) for name in BuildTarget.__dataclass_fields__}
        )

    @property
    def forms(self) -> Dialect:
        """Its dialect, with the forms that devices have proven."""
        shown: dict[str, Any] = dict.fromkeys(self.shown, True)
        return replace(dialect_named(self.dialect), **shown)

    @property
    def simulated(self) -> bool:
        """Whether it takes schemes that no engine can hold, so that its bytes are nominal."""
        return any(SIMULATED in families for families in self.schemes.values())

    def nearest(self, op: str, scheme: Scheme) -> str:
        """Name the family or simulated scheme nearest to ``scheme`` that layers of ``op`` take."""
        return _nearest(scheme, tuple(self.schemes[op]))

    def refusal(self, layer: Layer, scheme: Scheme) -> str:
        """Return why ``layer`` may not take ``scheme`` on this target; empty when it may."""
        if not scheme.quantized:
            return ""
        product = self.conv_products and scheme.multiplies(layer)
        op = "MatMul" if product else layer.op
        # A rule without condition explains what `schemes` leaves out; a file that extends this one
        # may allow it.
        left_out = scheme.family not in self.schemes[op]
        if left_out and scheme.simulated:
            return f"{_not_in_tensorrt(scheme)}; nearest: {self.nearest(op, scheme)}"
        for rule in self.rules:
            if (rule.when == "always") == left_out and rule.concerns(op, layer, scheme):
                more = f"; nearest: {self.nearest(op, scheme)}" if left_out else ""
                if left_out and layer.no_product and scheme.activation is None:
                    more = f"; as a matrix product: {layer.no_product}{more}"
                return f"{rule.reason}{more}"
        if left_out:
            more = f" ({scheme.weight.generation})" if scheme.weight.generation else ""
            nearest = self.nearest(op, scheme)
            return f"{self.name} does not list {scheme.family}{more}; nearest: {nearest}"
        if scheme.branch and scheme.branch.kind not in self.branches.get(op, ()):
            return f"a {scheme.branch.kind} branch beside a {op} is unproven on {self.name}"
        return ""


@cache
def _nearest(scheme: Scheme, families: tuple[str, ...]) -> str:
    plain = (s for s in SCHEMES.values() if s.quantized and not s.branch)
    offered = tuple(s for s in plain if s.family in families)
    return nearest_scheme(scheme, offered).series if offered else "fp16"


def _not_in_tensorrt(scheme: Scheme) -> str:
    """Say why no engine could hold a simulated scheme."""
    weight, activation = scheme.bits
    if weight not in (4, 8):
        return f"{weight}-bit weights do not exist in TensorRT"
    if activation not in (8, 16):
        return f"{activation}-bit activations do not exist in TensorRT"
    if scheme.branch:
        return (
            f"{scheme.branch.kind} gives channels different bits, which does not exist in TensorRT"
        )
    return "it is simulated, with zero points and nominal bytes, for the target simulate alone"


def known_targets() -> tuple[str, ...]:
    """Return the names of the targets that are shipped, sorted."""
    names = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(Path(name).stem for name in names if name.endswith(SUFFIXES)))


def _known() -> str:
    return f"Known targets: {', '.join(known_targets())}."


def load_target(name_or_path: str | Path) -> Target:
    """Return the shipped target of that name, or the one in the user's own YAML.

    A name that ends in .yaml or holds a slash is a path. Such a file may say ``extends: NAME`` and
    give only what differs. Raises UsageError for an unknown name, an unreadable file, or a file
    that does not validate.
    """
    text = str(name_or_path)
    if text.endswith(SUFFIXES) or "/" in text:
        path = Path(text).expanduser()
        return _validated(_extended(_read(path), (), str(path)), str(path))
    if "," in text:
        raise UsageError(
            f"One target is wanted here, not '{text}'.", "Only 'mpq-deploy build' takes several."
        )
    if text not in known_targets():
        raise UsageError(
            f"Unknown target '{text}'.",
            f"{nearest(text, known_targets())}{_known()[:-1]}; or give a YAML file.",
        )
    return _shipped(text)


@cache
def _shipped(name: str) -> Target:
    return _validated(_extended(_shipped_fields(name), (name,), name), name)


def _folder() -> Any:
    return resources.files("mpq_deploy.engine") / "targets"


def _shipped_fields(name: str) -> dict[str, Any]:
    text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    fields: dict[str, Any] = parse_yaml(text, name)
    return fields


def _read(path: Path) -> dict[str, Any]:
    fields = read_yaml(path, error=UsageError, hint=_known())
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise UsageError(f"The target file {path} holds {kind}, not fields such as 'extends: rtx'.")
    return fields


def _extended(fields: dict[str, Any], seen: tuple[str, ...], where: str) -> dict[str, Any]:
    """Fill ``fields`` from the shipped target that it extends; its rules precede inherited ones."""
    base = fields.get("extends")
    if base is None:
        return fields
    if not isinstance(base, str) or base not in known_targets() or base in seen:
        raise UsageError(
            f"Target {where} extends '{base}', which is not a shipped target that it can extend.",
            f"{nearest(str(base), known_targets())}{_known()}",
        )
    inherited = _extended(_shipped_fields(base), (*seen, base), base)
    merged = {**inherited, **{key: value for key, value in fields.items() if key != "extends"}}
    if (
        isinstance(fields.get("name"), str)
        and "title" not in fields
        and where not in known_targets()
    ):
        merged["title"] = f"{inherited['title']} (as {fields['name']})"
    for key in ("rules", "proven"):
        if isinstance(fields.get(key, []), list):
            merged[key] = [*fields.get(key, []), *inherited.get(key, [])]
    if isinstance(fields.get("schemes"), dict):
        merged["schemes"] = {**inherited["schemes"], **fields["schemes"]}
    return merged


def _validated(fields: dict[str, Any], where: str) -> Target:
    try:
        return Target.model_validate(fields)
    except ValidationError as error:
        raise UsageError(
            f"Target {where} is not valid: {'; '.join(_one_line(e) for e in error.errors())}.",
            f"Fields: extends, {', '.join(Target.model_fields)}. Start from 'extends: rtx' and give what differs.",
        ) from error


def _one_line(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = Target.model_fields if len(error["loc"]) == 1 else ()
        return f"{place}: there is no such field. {nearest(str(error['loc'][-1]), known)}".strip()
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error["input"]
    shown = f" (found {value!r})" if isinstance(value, (str, int, float, bool)) else ""
    return f"{place}: {message}{shown}" if place else message


def _check_known(what: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown {what} '{name}'. {nearest(name, known)}Known: {', '.join(known)}"
            )


def _holds(condition: Condition, layer: Layer, scheme: Scheme) -> bool:
    dimensions = len(layer.kernel)
    if condition == "odd last dimension":
        return scheme.stored_shape(layer)[-1] % 2 == 1
    return {
        "always": True,
        "depthwise": layer.depthwise,
        "grouped": layer.group > 1,
        "conv1d": layer.op == "Conv" and dimensions == 1,
        "conv3d": layer.op == "Conv" and dimensions == 3,
        "odd elements": prod(scheme.stored_shape(layer)) % 2 == 1,
    }[condition]


def builder_present(target: Target) -> bool:
    """Whether this machine has what builds engines for ``target``."""
    if target.builder == "trtexec":
        return find_trtexec() is not None
    return importlib.util.find_spec(target.builder) is not None

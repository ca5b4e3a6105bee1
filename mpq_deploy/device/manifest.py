"""The manifest of a package: its target, what its engine must look like, how it is checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from mpq_deploy.device.archive import MANIFEST, PARTS, PROGRAMS, REQUIRED_PARTS, ArchiveError
from mpq_deploy.device.lora_inputs import is_slot
from mpq_deploy.engine.build_target import BUILDERS, BuildTarget
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.errors import InputError, MpqError
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.names import checked_name, plain_name, printable
from mpq_deploy.system.typed import typed

FORMAT = 1
# What an installer leaves: its file's name, and its format.
RESULTS, RESULTS_FORMAT = "results.json", 1
AGAIN = "Package the run again."
# A device whose output differs by more than a tenth of its energy (-10 dB) runs another model, in
# whatever arithmetic (our choice; usual tolerances are 1e-4 to 1e-2).
LARGEST_TOLERANCE = 0.1
# Larger batches than any GPU of the targets holds (our choice).
LARGEST_BATCH = 4096
# A factor of rank 1024 beside 64 thousand channels, in FP16 (our choice).
SLOT_BYTES = 1 << 27
DIGEST, VERSION = re.compile(r"[0-9a-f]{64}"), re.compile(r"\d+(\.\d+)*\.?")
TENSOR = re.compile(r"[\w./:-]+", re.ASCII)
PRODUCTS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Reference:
    """Inputs with the outputs that they must give.

    ``file`` holds ``<case>/<tensor>`` for each of ``cases``; outputs come from ``made_by`` in FP32
    arithmetic with the same integers and scales. ``fp16_nmse``: error of the FP16 graph in ONNX
    Runtime (None: it cannot run it); ``tolerance_nmse``: what a device may differ by. ``empty``:
    inputs that are zero in all cases, the second factors of slots for LoRAs, by their bytes.
    """

    file: str
    cases: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    made_by: str
    fp16_nmse: float | None
    tolerance_nmse: float
    empty: dict[str, int] = field(default_factory=dict)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError where nothing would be compared, or anything would pass."""
        if not self.cases or not self.inputs or set(self.inputs) != set(shapes):
            raise ValueError("its references have no cases, or other inputs than the model")
        if len(set(self.cases)) < len(self.cases):
            raise ValueError("two cases of its references have one name")
        if any(not is_slot(name) or not 0 < n <= SLOT_BYTES for name, n in self.empty.items()):
            raise ValueError("inputs that are no slots for LoRAs are to be zero")
        if not 0 < self.tolerance_nmse <= LARGEST_TOLERANCE:
            raise ValueError(
                f"its references' tolerance is {self.tolerance_nmse}, not above 0 and at most "
                f"{LARGEST_TOLERANCE}"
            )


@dataclass(frozen=True)
class Manifest:
    """``parts``: name -> SHA-256 of every other part. ``shapes``: input -> shape without its batch.

    ``batches``: smallest, usual, largest. ``alternatives``: target -> versions of TensorRT on the
    same device. ``digests``: of plan and graph, for the report on the build machine. ``needed_bytes``: the
    running engine's estimated memory at the largest batch (0: not estimated). ``least``, ``usual``: of
    inputs of several sizes the other shapes of the engine's profile; ``shapes`` has the largest.
    """

    name: str
    made_by: str
    target: BuildTarget
    model: str
    parts: dict[str, str]
    expected: ExpectedLayers
    fp16_bytes: int
    batches: tuple[int, int, int]
    shapes: dict[str, tuple[int, ...]]
    reference: Reference
    digests: dict[str, str]
    alternatives: dict[str, tuple[str, ...]]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    needed_bytes: int = 0
    least: dict[str, tuple[int, ...]] = field(default_factory=dict)
    usual: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return JSON with sorted keys."""
        values = {"format": FORMAT, **asdict(self)}
        values = {k: v for k, v in values.items() if v or k not in ("least", "usual")}
        return json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what ``to_json`` gave.

        Raises ArchiveError for another format, a field of another kind, and checks that are left
        out or switched off (``check``).
        """
        return read_manifest(cls, path)

    def check(self) -> None:
        """Raise ValueError or InputError where a value is impossible, or a check is switched off.

        Whoever can write the manifest can write the references too: this catches damage, and keeps
        forged packages from looking checked (docs/security.md).
        """
        self._check_names()
        needed = REQUIRED_PARTS - PROGRAMS
        if not needed <= set(self.parts) <= PARTS:
            odd = sorted(set(self.parts) - PARTS) + sorted(needed - set(self.parts))
            raise ValueError(f"its parts are not those of a package: {', '.join(odd[:5])}")
        for name, digest in self.parts.items():
            if not DIGEST.fullmatch(digest):
                raise ValueError(f"'parts.{name}' is not a SHA-256")
        if self.model not in self.parts or self.reference.file not in self.parts:
            raise ValueError("its model or its references are not among its parts")
        if not self.expected.layers or self.expected.total_bytes <= 0:
            raise ValueError("it expects no layers, so no engine could differ from it")
        for layer in self.expected.layers:
            checked_name(layer.name, "A layer's name")
            if not layer.nodes or layer.scheme not in SCHEMES or layer.op not in PRODUCTS:
                raise ValueError(
                    f"the layer '{layer.name}' has no nodes, or an unknown scheme or op"
                )
            if min(layer.bytes, layer.out_channels, layer.reduction, layer.blocks) < 1:
                raise ValueError(f"the layer '{layer.name}' has no size")
        if not 1 <= self.batches[0] <= self.batches[1] <= self.batches[2] <= LARGEST_BATCH:
            raise ValueError(f"its batches are {self.batches}")
        if not self.shapes or any(size < 1 for shape in self.shapes.values() for size in shape):
            raise ValueError("its inputs have no shapes, or sizes below 1")
        if not {*self.least, *self.usual} <= set(self.shapes):
            raise ValueError("it has sizes of an input that it does not take")
        for name, shape in self.shapes.items():
            least, usual = self.least.get(name, shape), self.usual.get(name, shape)
            ranks = {len(shape), len(least), len(usual)}
            if len(ranks) > 1 or not all(1 <= a <= b <= c for a, b, c in zip(least, usual, shape)):
                raise ValueError(f"the sizes of '{name}' are not ascending")
        if min(self.fp16_bytes, self.needed_bytes) < 0:
            raise ValueError("it has negative sizes")
        self.reference.check(self.shapes)

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the input ``name`` may have a ``shape`` without its batch."""
        most = self.shapes[name]
        ends = zip(self.least.get(name, most), shape, most)
        return len(shape) == len(most) and all(low <= size <= high for low, size, high in ends)

    def check_plan(self, schemes: Mapping[str, str]) -> None:
        """Raise ValueError where the layers expected are not those of a plan's ``schemes``.

        ``schemes``: layer -> scheme. A branch's parts are expected as layers below their layer's name.
        """
        expected = {layer.name: layer.scheme for layer in self.expected.layers}
        if len(expected) < len(self.expected.layers):
            raise ValueError("two of its layers have one name")
        for name, scheme in schemes.items():
            body = SCHEMES[scheme].body.name if scheme in SCHEMES else f"unknown ({scheme})"
            if expected.get(name) != body:
                raise ValueError(
                    f"it expects the layer '{name}' as {expected.get(name, 'no layer')}, and the plan "
                    f"says {body}"
                )
        for name in expected:
            above = name.rpartition("/")[0]
            if name not in schemes and not SCHEMES[schemes.get(above, "fp16")].branch:
                raise ValueError(f"it expects the layer '{name}', which the plan does not have")

    def _check_names(self) -> None:
        check_target(self.target, self.alternatives)
        for name, what in (
            *((one, "A part's name") for one in (*self.parts, self.model, self.reference.file)),
            *((one, "A case's name") for one in self.reference.cases),
        ):
            plain_name(name, what)
        reference = self.reference
        for name in (*self.shapes, *reference.inputs, reference.output, *reference.empty):
            tensor_name(name)


class Checked(Protocol):
    """What a manifest is read into."""

    def check(self) -> None:
        """Raise ValueError or InputError where a value is impossible."""


Kind = TypeVar("Kind", bound=Checked)


def read_manifest(kind: type[Kind], path: Path, mark: str = "") -> Kind:
    """Read a manifest of ``kind`` and check it; ``mark``: an entry beside its fields. Raises ArchiveError."""
    values = read_json_object(path, error=ArchiveError, hint=AGAIN)
    version = values.pop("format", None)
    if version != FORMAT:
        made_by = printable(str(values.get("made_by"))[:60])
        raise ArchiveError(
            f"{path} has format {printable(repr(version)[:20])}; this mpq-deploy reads format {FORMAT}.",
            f"Install the mpq-deploy that made it ({made_by}) on the device.",
        )
    values.pop(mark, None)
    try:
        manifest = typed(kind, values)
        manifest.check()
    except (ValueError, MpqError) as error:
        what = f"The part '{MANIFEST}' cannot be used: {printable(str(error))}."
        raise ArchiveError(what.replace("..", "."), AGAIN) from error
    return manifest


def check_target(
    target: BuildTarget, alternatives: Mapping[str, tuple[str, ...]], more: tuple[str, ...] = ()
) -> None:
    """Raise ValueError or InputError where a package's target has impossible names, versions or builder.

    ``more``: builders beside ``BUILDERS``.
    """
    for name, what in (
        (target.name, "The target's name"),
        (target.dialect, "The dialect"),
        *((one, "A target's name") for one in alternatives),
        *((one, "A compute capability") for one in target.compute_capabilities),
    ):
        plain_name(name, what)
    for version in (*target.versions, *(v for one in alternatives.values() for v in one)):
        if not VERSION.fullmatch(version):
            raise ValueError(f"'{version}' is not a version")
    if target.builder not in (*BUILDERS, *more):
        raise ValueError(f"its builder '{target.builder}' is not one of {', '.join(BUILDERS)}")


def tensor_name(name: str) -> str:
    """Return the name of an input or output as trtexec takes it. Raises InputError for another."""
    if TENSOR.fullmatch(checked_name(name, "An input's or output's name")):
        return name
    raise InputError(
        f"trtexec cannot take the name of the input or output '{name}'.",
        "Rename it: letters, digits and . _ / : - only.",
    )

"""The manifest of a package: its target, what its engine must look like, how it is checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpq_deploy.device.archive import MANIFEST, ArchiveError
from mpq_deploy.engine.build_target import BuildTarget
from mpq_deploy.engine.expected import ExpectedLayer, ExpectedLayers

FORMAT = 1


@dataclass(frozen=True)
class Reference:
    """Inputs with the outputs that they must give.

    ``file`` holds ``<case>/<tensor>`` for each of ``cases``; outputs come from ``made_by`` in FP32
    arithmetic with the same integers and scales. ``fp16_nmse``: error of the FP16 graph in ONNX
    Runtime (None: it cannot run it); ``tolerance_nmse``: what a device may differ by.
    """

    file: str
    cases: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    made_by: str
    fp16_nmse: float | None
    tolerance_nmse: float


@dataclass(frozen=True)
class Manifest:
    """``parts``: name -> SHA-256 of every other part. ``shapes``: input -> shape without its batch.

    ``batches``: smallest, usual, largest. ``alternatives``: target -> versions of TensorRT on the
    same device. ``digests``: of plan and graph, for the report at home. ``needed_bytes``: the
    running engine's estimated memory at the largest batch (0: not estimated).
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

    def to_json(self) -> str:
        """Return JSON with sorted keys."""
        values = {"format": FORMAT, **asdict(self)}
        return json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what ``to_json`` gave; ArchiveError for another format or a missing field."""
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("format")
            if version != FORMAT:
                raise ArchiveError(
                    f"{path} has format {version}; this mpq-deploy reads format {FORMAT}.",
                    f"Install the mpq-deploy that made it ({values.get('made_by')}) on the device.",
                )
            target = _tuples(values["target"], "versions", "compute_capabilities")
            values["target"] = BuildTarget(**target)
            values["reference"] = Reference(**_tuples(values["reference"], "cases", "inputs"))
            layers = [
                ExpectedLayer(**_tuples(one, "nodes", "kernel"))
                for one in values["expected"]["layers"]
            ]
            expected = values["expected"]
            values["expected"] = ExpectedLayers(
                tuple(layers), expected["total_bytes"], expected.get("repeated_bytes", 0)
            )
            for key in ("shapes", "alternatives"):
                values[key] = {name: tuple(one) for name, one in values[key].items()}
            return cls(**_tuples(values, "batches", "notes"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"The part '{MANIFEST}' cannot be read: {error!r}."
            raise ArchiveError(what, "Package the run again.") from error


def _tuples(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**values, **{name: tuple(values[name]) for name in names}}

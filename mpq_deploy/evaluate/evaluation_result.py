"""What evaluation leaves behind: error and images of every variant, and their origin.

``evaluation.json`` holds numbers, ``images.npz`` the pixels; both are the same for the same inputs.
What this machine's clock said is kept apart in ``latency.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mpq_deploy.evaluate.cache import npz_bytes, write_aside
from mpq_deploy.evaluate.interval import Difference
from mpq_deploy.models.spec import Array
from mpq_deploy.recipe import EvaluateSettings
from mpq_deploy.system.array_file import read_arrays
from mpq_deploy.system.files import read_sealed, sealed_json
from mpq_deploy.system.inputs import read_json_object, whole
from mpq_deploy.system.validated import model_of

IDENTICAL = "identical to the float model's, so the PSNR is infinite"

# How the compared images came about: samples that are pixels, latents through the decoder, or
# latents as such.
ImageKind = Literal["pixels", "decoded", "latents", "features"]


@dataclass(frozen=True)
class VariantResult:
    """One quantized graph against the float one. ``psnr_db`` is the mean over images,
    ``pooled_psnr_db`` that of the squared error of all together; both are ``inf`` for identical
    images.

    ``nmse_by_timestep`` is the output's error at each of the evaluation's timesteps, on the float
    model's inputs; ``measured_nmse`` their mean, which the predicted loss estimates.
    ``psnr_db_each`` and ``ssim_each`` are those of each image, in the order of the evaluation's
    rows: what an interval or a paired difference needs. An image equal to its reference has
    ``EQUAL_IMAGE_DB`` there. ``layers``: a control's, counted by family; ``behind_db``: of a control,
    the plan's PSNR minus its own by image (mean, low, high: ``evaluate.sequential``). A control may
    have fewer images than the plan: the first, and ``calls`` of each timestep. ``nmse_interval``:
    95 %, of ``measured_nmse`` over images; None where a timestep has one alone.
    """

    digest: str
    size_bytes: int | None
    nmse_by_timestep: tuple[float, ...]
    measured_nmse: float
    psnr_db: float
    pooled_psnr_db: float
    ssim: float
    psnr_db_each: tuple[float, ...]
    ssim_each: tuple[float, ...]
    calls: int
    layers: dict[str, int] = field(default_factory=dict)
    behind_db: Difference | None = None
    nmse_interval: tuple[float, float] | None = None

    @property
    def settled(self) -> bool:
        """Whether the interval of a control's difference from the plan settles which is better."""
        return self.behind_db is not None and self.behind_db.settled


@dataclass(frozen=True)
class SizeFigures:
    """A variant at one size: error of the output, means over ``samples`` images."""

    measured_nmse: float
    psnr_db: float | None
    ssim: float
    samples: int


@dataclass(frozen=True)
class CpuLatency:
    """Median time of a call of batch 1 in ONNX Runtime on this CPU, not the target device.

    The quantized graph computes in float what the device would compute in integers, so ``variant``
    over ``float`` says what fake quantization costs here, nothing about the engine.
    """

    float_ms: float
    variant_ms: dict[str, float]
    calls: int
    threads: int
    source: str = "ONNX Runtime on this CPU, fake-quantized, batch 1; not the target device"


@dataclass(frozen=True)
class Evaluation:
    """Every variant, sampled from the same noise as the float model.

    ``timesteps`` are scheduler values in sampling order; ``rows`` and ``labels`` tell each sample's
    condition; ``sampler`` names the sampler and its steps; ``float_digest``: SHA-256 of the float
    graph and its weights; ``images`` uint8 [N, H, W, C] by variant, with ``float`` first, of which
    a control may have the first alone.
    """

    settings: EvaluateSettings
    timesteps: tuple[float, ...]
    rows: tuple[int, ...]
    labels: tuple[str, ...]
    sampler: str
    image_kind: ImageKind
    variants: dict[str, VariantResult]
    images: dict[str, Array]
    float_digest: str
    latency: CpuLatency | None = None
    notes: tuple[str, ...] = field(default=())
    # Of a model of several sizes: size -> variant -> its figures there.
    by_size: dict[str, dict[str, SizeFigures]] = field(default_factory=dict)

    def with_sizes(
        self, names: Sequence[str], found: Sequence[Evaluation], between: str = ""
    ) -> Evaluation:
        """Return the evaluation at the first of several sizes with the figures at each of them.

        ``between``: a further size of a range, with which nothing was calibrated; its evaluation, where it
        could be compared, is the last one.
        """
        if not names:
            return self
        note = f"Pictures and the main figures are of {names[0]}; other sizes have their own table."
        notes = [note]
        if between and len(found) > len(names):
            notes.append(
                f"{between} lies within the range: it is compared, and was not calibrated."
            )
        elif between:
            notes.append(
                f"{between}, within the range, was not compared: its inputs' shapes are unknown."
            )
        names = [*names, between][: len(found)]
        by_size = {
            name: {
                variant: SizeFigures(v.measured_nmse, v.psnr_db, v.ssim, len(v.psnr_db_each))
                for variant, v in one.variants.items()
            }
            for name, one in zip(names, found, strict=True)
        }
        return replace(self, by_size=by_size, notes=(*self.notes, *notes))

    def save(self, folder: Path) -> None:
        """Write evaluation.json, images.npz and, where measured, latency.json into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(
            folder / "images.npz", npz_bytes({f"image.{k}": v for k, v in self.images.items()})
        )
        if self.latency is not None:
            write_aside(folder / "latency.json", sealed_json(asdict(self.latency)).encode())
        write_aside(folder / "evaluation.json", _json(self.as_json()))

    def as_json(self) -> dict[str, Any]:
        """Return the numbers as plain values; a PSNR of ``inf`` becomes None, with a note."""
        sizes = [
            {
                "size": size,
                "variants": {
                    name: {**asdict(of), "psnr_db": of.psnr_db if of.psnr_db != math.inf else None}
                    for name, of in variants.items()
                },
            }
            for size, variants in self.by_size.items()
        ]
        return {
            **({"by_size": sizes} if sizes else {}),
            "settings": self.settings.model_dump(mode="json"),
            "timesteps": list(self.timesteps),
            "rows": list(self.rows),
            "labels": list(self.labels),
            "sampler": self.sampler,
            "image_kind": self.image_kind,
            "variants": {name: _variant_json(result) for name, result in self.variants.items()},
            "order": list(self.images),
            "float_digest": self.float_digest,
            "notes": list(self.notes),
        }

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read what ``save`` wrote."""
        path = folder / "evaluation.json"
        with whole(path):
            return cls._made(folder, read_json_object(path))

    @classmethod
    def _made(cls, folder: Path, text: dict[str, Any]) -> Evaluation:
        data = read_arrays(folder / "images.npz")
        images = {name: data[f"image.{name}"] for name in text["order"]}
        latency = folder / "latency.json"
        return cls(
            settings=EvaluateSettings(**text["settings"]),
            timesteps=tuple(text["timesteps"]),
            rows=tuple(text["rows"]),
            labels=tuple(text["labels"]),
            sampler=text["sampler"],
            image_kind=text["image_kind"],
            variants={
                name: _variant_from_json(text["variants"][name])
                for name in text["order"]
                if name in text["variants"]
            },
            images=images,
            float_digest=text["float_digest"],
            latency=CpuLatency(**read_sealed(latency)) if latency.exists() else None,
            notes=tuple(text["notes"]),
            by_size={
                of["size"]: {
                    name: SizeFigures(**figures) for name, figures in of["variants"].items()
                }
                for of in text.get("by_size", ())
            },
        )


_LISTS = ("nmse_by_timestep", "psnr_db_each", "ssim_each")


def _variant_json(result: VariantResult) -> dict[str, Any]:
    text = asdict(result)
    for name in _LISTS:
        text[name] = list(text[name])
    if math.isinf(result.psnr_db):
        text["psnr_db"], text["pooled_psnr_db"], text["psnr_note"] = None, None, IDENTICAL
    return text


def _variant_from_json(text: dict[str, Any]) -> VariantResult:
    fields = {name: value for name, value in text.items() if name != "psnr_note"}
    for name in _LISTS:
        fields[name] = tuple(fields[name])
    for name in ("psnr_db", "pooled_psnr_db"):
        fields[name] = math.inf if fields[name] is None else fields[name]
    result: VariantResult = model_of(VariantResult, fields, "evaluation.json: a variant")
    return result


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

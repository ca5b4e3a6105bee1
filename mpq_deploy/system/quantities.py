"""Budgets, latencies and durations as users write them, parsed once, where they come in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator

from mpq_deploy.errors import UsageError

SIZE_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
TIME_UNITS_NS = {"us": 1e3, "µs": 1e3, "μs": 1e3, "ms": 1e6, "s": 1e9}
TIME_UNITS_S = {"s": 1, "sec": 1, "min": 60, "h": 3600}
_NUMBER_AND_UNIT = re.compile(r"([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?|[0-9]+\.)([a-zµμ%]*)")


def _in_units(text: str, units: Mapping[str, float], wrong: str, examples: str) -> float:
    """Return a positive quantity in the unit that is 1 in ``units``. Raises UsageError for anything else."""
    number, unit = _number_and_unit(text)
    if not number > 0 or unit not in units:
        raise UsageError(wrong, f"Give a number with its unit: {examples}.")
    return float(number * units[unit])


def _number_and_unit(text: str) -> tuple[float, str]:
    """Split ``600 MB`` into 600.0 and ``mb``; NaN for all but positive finite numbers."""
    match = _NUMBER_AND_UNIT.fullmatch(text.lower().replace(" ", ""))
    if match is None:
        return math.nan, ""
    number = float(match.group(1))
    return (number if 0 < number < math.inf else math.nan), match.group(2)


@dataclass(frozen=True)
class Budget:
    """How many bytes all constants may take, as ``text`` says it: a share of their size in FP16
    (``0.35``, ``35%``), a size (``600MB``), or mean bits per quantizable weight (``4.5bits``).
    """

    text: str
    amount: float
    unit: Literal["share", "bytes", "bits"]

    @classmethod
    def parse(cls, value: str | float | Budget) -> Budget:
        """Read a budget. Raises UsageError for anything else."""
        if isinstance(value, Budget):
            return value
        text = str(value).strip()
        number, unit = _number_and_unit(text)
        if unit in ("", "%"):
            share = number / 100 if unit else number
            if share <= 1:
                return cls(text, share, "share")
            if unit and number > 0:
                raise UsageError(
                    f"The budget '{text}' is more than the FP16 size.", "Give at most 100%."
                )
        elif unit == "bits" and number > 0:
            return cls(text, number, "bits")
        elif unit in SIZE_UNITS and number > 0:
            return cls(text, number * SIZE_UNITS[unit], "bytes")
        raise UsageError(
            f"Invalid budget '{str(text)[:80]}'.",
            'Give a share of the FP16 size up to 1 (0.35), a size ("600MB"), or bits per weight ("4.5bits").',
        )

    def bytes(self, fp16_bytes: int, weights: int) -> int:
        """Return the bytes for a model of ``fp16_bytes`` with ``weights`` quantizable weights."""
        if self.unit == "share":
            return int(self.amount * fp16_bytes)
        return int(self.amount * weights / 8) if self.unit == "bits" else int(self.amount)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Latency:
    """A time per call, as ``text`` says it: ``120ms``, ``0.12s``, ``850us``."""

    text: str
    nanoseconds: int

    @classmethod
    def parse(cls, value: str | Latency) -> Latency:
        """Read a latency with its unit. Raises UsageError for anything else."""
        if isinstance(value, Latency):
            return value
        text = str(value).strip()
        found = _in_units(
            text, TIME_UNITS_NS, f"Invalid latency '{text[:80]}'.", "120ms, 0.12s or 850us"
        )
        # Rounded first: 0.12 s are 120,000,000 ns, not one less.
        return cls(text, int(round(found, 3)))

    @property
    def milliseconds(self) -> float:
        """The same in milliseconds."""
        return self.nanoseconds / 1e6

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Duration:
    """How long something may take, as ``text`` says it: ``90s``, ``30min``, ``2h``."""

    text: str
    seconds: float

    @classmethod
    def parse(cls, value: str | Duration) -> Duration:
        """Read a duration with its unit. Raises UsageError for anything else."""
        if isinstance(value, Duration):
            return value
        text = str(value).strip()
        return cls(
            text,
            _in_units(text, TIME_UNITS_S, f"Invalid duration '{text[:80]}'.", "90s, 30min or 2h"),
        )

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ImageSize:
    """Width and height of an image in pixels; of a denoiser without a decoder its sample's own."""

    width: int
    height: int

    @classmethod
    def parse(cls, value: str | ImageSize) -> ImageSize:
        """Read ``768x512``. Raises UsageError for anything else."""
        if isinstance(value, ImageSize):
            return value
        match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", str(value).strip())
        if match is None:
            raise UsageError(
                f"Invalid size '{str(value)[:80]}'.", "Give WIDTHxHEIGHT, such as 512x512."
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class ImageSizes:
    """Sizes as ``text`` names them, the usual one first; of a range ``FROM:TO[:STEP]`` its corners.

    ``step``: None for a list; of a range its step in pixels, 0 for the model's own.
    """

    listed: tuple[ImageSize, ...] = ()
    text: tuple[str, ...] = ()
    step: int | None = None

    @classmethod
    def parse(cls, value: Any) -> ImageSizes:
        """Read ``512x512,768x512``, ``512x512:768x768:64`` or a list of these.

        Raises UsageError, also for a size named twice, a second range, and a size outside the range.
        """
        if isinstance(value, ImageSizes):
            return value
        listed = value.split(",") if isinstance(value, str) else value
        if not isinstance(listed, (list, tuple)):
            raise UsageError(
                f"Invalid sizes '{str(value)[:80]}'.", "Give 512x512,768x512 or 512x512:768x768."
            )
        text = tuple(str(one).strip() for one in listed)
        named = tuple(ImageSize.parse(one) for one in text if ":" not in one)
        twice = next((one for one in named if named.count(one) > 1), None)
        if twice is not None:
            raise UsageError(f"The size {twice} is named twice.", "Name each size once.")
        ranges = [one for one in text if ":" in one]
        if not ranges:
            return cls(named, text)
        low, high, step = cls._range(ranges[0])
        corners = (low, high, ImageSize(high.width, low.height), ImageSize(low.width, high.height))
        for one in named:
            if not (
                low.width <= one.width <= high.width and low.height <= one.height <= high.height
            ):
                raise UsageError(f"The size {one} is outside {ranges[0]}.", "Widen the range.")
        if len(ranges) > 1:
            raise UsageError(f"Two ranges of sizes: {', '.join(ranges)}.", "Give one.")
        return cls(tuple(dict.fromkeys((*named, *corners))), text, step)

    @staticmethod
    def _range(text: str) -> tuple[ImageSize, ImageSize, int]:
        """Return the smallest and the largest size of a range, and its step (0: none is named)."""
        low, high, *more = text.split(":")
        if len(more) > 1 or not re.fullmatch(r"[1-9][0-9]{0,3}", more[0] if more else "1"):
            what = f"Invalid range of sizes '{text[:80]}'."
            raise UsageError(what, "Give FROM:TO or FROM:TO:STEP, such as 512x512:768x768:64.")
        least, most = ImageSize.parse(low), ImageSize.parse(high)
        if least == most or least.width > most.width or least.height > most.height:
            raise UsageError(
                f"The range {text} holds no sizes: {most} is not above {least}.",
                "Name the smallest width and height first: 512x512:768x768.",
            )
        return least, most, int(more[0]) if more else 0

    def __len__(self) -> int:
        return len(self.listed)

    def __iter__(self) -> Iterator[ImageSize]:
        return iter(self.listed)


NO_SIZES = ImageSizes()


def duration_text(seconds: float) -> str:
    """Return a time as people say it, in two digits: 8 s, 2.5 min, 31 min, 1.2 h."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"{count:.1f} {unit}" if count < 9.95 else f"{count:.0f} {unit}"
    return f"{seconds:.0f} s"


# Entries of a recipe: parsed when it is read, written as the user wrote them.
BudgetEntry = Annotated[Budget, PlainValidator(Budget.parse), PlainSerializer(str, return_type=str)]
LatencyEntry = Annotated[
    Latency, PlainValidator(Latency.parse), PlainSerializer(str, return_type=str)
]
DurationEntry = Annotated[
    Duration, PlainValidator(Duration.parse), PlainSerializer(str, return_type=str)
]
SizesEntry = Annotated[
    ImageSizes,
    PlainValidator(ImageSizes.parse),
    PlainSerializer(lambda sizes: list(sizes.text), return_type=list[str]),
]

"""What a build leaves behind: the engine's record (build.json), and the time taken."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mpq_deploy.engine.product_kernels import ProductKernel
from mpq_deploy.engine.verify import Problem
from mpq_deploy.errors import EngineError, InputError
from mpq_deploy.system.files import unsealed
from mpq_deploy.system.inputs import read_json_object, read_text
from mpq_deploy.system.names import printable
from mpq_deploy.system.typed import typed

# Its file beside the engine.
RECORD = "build.json"
# How many layers an error names before it only counts them.
NAMED = 5


@dataclass(frozen=True)
class BuildTiming:
    """What the build took, kept apart from the record, which must repeat exactly."""

    build_seconds: float
    peak_rss_bytes: int

    @classmethod
    def load(cls, path: Path) -> BuildTiming | None:
        """Read what was written beside a build; None where it was altered."""
        try:
            return typed(cls, unsealed(read_text(path)))
        except (ValueError, InputError):
            return None


@dataclass(frozen=True)
class EngineRecord:
    """An engine that was built: what it is, what it holds, and how it differs from the plan.

    ``kernels`` counts the engine's kernels by type. ``verified`` means that no problem is
    ``wrong``. ``compute_capabilities``: the GPUs that it is for; empty: the one that it was built
    on. ``products``: which products of the plan are one kernel.
    """

    target: str
    backend: str
    version: str
    file: str
    sha256: str
    bytes: int
    weights_bytes: int | None
    activation_bytes: int | None
    planned_bytes: int
    kernels: dict[str, int]
    verified: bool
    problems: tuple[Problem, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    products: tuple[ProductKernel, ...] = ()
    timing: BuildTiming | None = field(default=None, compare=False)

    def require_verified(self) -> EngineRecord:
        """Return self. Raises EngineError naming the layers that are not as planned."""
        wrong = [str(problem) for problem in self.problems if problem.severity == "wrong"]
        if wrong:
            more = f" (and {len(wrong) - NAMED} more)" if len(wrong) > NAMED else ""
            raise EngineError(
                f"The engine is not what was planned: {'; '.join(wrong[:NAMED])}{more}.",
                "The builder fell back silently; leave these layers in FP16 (recipe: protect), or report it.",
            )
        return self

    def save(self, path: Path) -> None:
        """Write as JSON with sorted keys, without the timing."""
        values = asdict(self)
        del values["timing"]
        path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def beside(cls, engine: Path) -> EngineRecord | None:
        """Read the record in the folder of ``engine``; None for another tool's engine."""
        path = engine.with_name(RECORD)
        return cls.load(path) if path.is_file() else None

    @classmethod
    def load(cls, path: Path, timing: Path | None = None) -> EngineRecord:
        """Read what ``save`` wrote, with the timing where there is one."""
        try:
            record = typed(cls, read_json_object(path))
        except ValueError as error:
            raise InputError(
                f"{path}: {printable(str(error))}.", "Build the engine again."
            ) from error
        if timing is not None and timing.is_file():
            record = replace(record, timing=BuildTiming.load(timing))
        return record

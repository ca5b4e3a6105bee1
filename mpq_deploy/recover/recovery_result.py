"""The result of recovery: held-out error before and after, and whether the new weights are kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from mpq_deploy.system.files import canonical_json
from mpq_deploy.system.inputs import read_json
from mpq_deploy.system.validated import model_of

FILE = "recovery.json"


@dataclass(frozen=True)
class CurvePoint:
    """The held-out NMSE after ``step`` updates; ``losses``: those of the last batch, by name."""

    step: int
    held_out_nmse: float
    losses: dict[str, float]


@dataclass(frozen=True)
class Recovery:
    """The result of training, saved as recovery.json.

    ``before``, ``after``: NMSE of the output of the plan and of the best state on held-out
    trajectories, mean over timesteps; ``..._by_timestep``: the NMSE at each of ``timesteps``.
    ``best_step`` 0: no state was better than the plan, whose weights stay. ``stopped``: why
    training ended early, or "". ``starts``: gain (as text) -> number of adapters that started with
    it; None where adapters start at zero.
    """

    steps: int
    best_step: int
    before: float
    after: float
    timesteps: tuple[float, ...]
    before_by_timestep: tuple[float, ...]
    after_by_timestep: tuple[float, ...]
    curve: tuple[CurvePoint, ...]
    stopped: str = ""
    starts: dict[str, int] | None = None

    @property
    def improved(self) -> bool:
        """Whether the recovered weights replace the plan's."""
        return self.best_step > 0

    @property
    def removed(self) -> float:
        """Share of the plan's NMSE that was removed."""
        return 1 - self.after / self.before if self.before else 0.0

    def summary(self) -> str:
        """Return a few words for the log."""
        early = f"stopped early: {self.stopped}; " if self.stopped else ""
        if not self.improved:
            return f"{early}no state was better than the plan's weights on held-out calls, so those stay"
        return (
            f"{early}held-out NMSE {self.before:.2e} -> {self.after:.2e} ({100 * self.removed:.0f} % removed, "
            f"step {self.best_step} of {self.steps})"
        )

    def save(self, folder: Path) -> None:
        """Write recovery.json into ``folder``."""
        (folder / FILE).write_text(canonical_json(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Recovery:
        """Read what ``save`` wrote."""
        values = read_json(folder / FILE)
        read: Recovery = model_of(cls, values, str(folder / FILE), hint="Create it again.")
        return read

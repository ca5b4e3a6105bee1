"""What a metric judges, and on which calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq_deploy.calibrate.stats import CalibrationSet, CalibrationStats
from mpq_deploy.denoisers.spec import Array, DenoiserSpec
from mpq_deploy.graph.layers import Layer, LayerGraph
from mpq_deploy.sensitivity.feeds import Calls, MeasureOptions
from mpq_deploy.sensitivity.weights import CandidateWeights, measured_layers
from mpq_deploy.talk import Talk


@dataclass(frozen=True)
class Subject:
    """The model and the calls that every metric takes.

    ``candidates``: layer name -> the weights it may be deployed with; ``stats``: of its activations; ``calibration``:
    the calls to measure on; ``conditions``: all rows of each condition input (call n uses row ``calibration.rows[n]``).
    """

    graph: LayerGraph
    candidates: Mapping[str, CandidateWeights]
    stats: CalibrationStats
    calibration: CalibrationSet
    conditions: dict[str, Array]
    spec: DenoiserSpec
    options: MeasureOptions
    talk: Talk

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that have candidates, in graph order."""
        return measured_layers(self.graph, self.candidates)

    def calls(self, samples: int | None = None) -> Calls:
        """Return the calls that are measured: ``samples`` of them at each timestep (None: as the options say)."""
        count = self.options.samples if samples is None else samples
        return Calls(self.graph, self.spec, self.calibration, self.conditions, count, self.options.rotate)

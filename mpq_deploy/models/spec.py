"""What a denoiser takes and gives: inputs, prediction, scheduler. Saved as denoiser.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from mpq_deploy.errors import ModelError
from mpq_deploy.system.validated import read_model

Array = np.ndarray[Any, np.dtype[Any]]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction", "trigflow"]
SPEC_HINT = "Export the model again, or correct the file."


class InputSpec(BaseModel):
    """One input of the ONNX graph; ``shape`` without batch axis, () for one number per sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: tuple[int, ...] = ()
    dtype: Literal["float32", "float16", "int64", "int32", "bool"] = "float32"
    # An input such as a scalar timestep that ONNX declares without a batch axis.
    batched: bool = True


class PipelineSpec(BaseModel):
    """A diffusers pipeline that calls the model: its class, the part that the model is, its calls.

    ``calls``: keyword arguments of the pipeline's ``__call__``, one mapping per image, used in turn.
    ``scheduler``: a configuration in place of the pipeline's own.
    ``fixed``: what the pipeline gives the model beside the graph's inputs, which the graph has as
    constants: name -> digest of a tensor (``sha256:...``) or the value as text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    class_name: str
    component: str
    calls: tuple[dict[str, Any], ...]
    scheduler: dict[str, Any] | None = None
    fixed: dict[str, str] = {}


class LoraUse(BaseModel):
    """A LoRA that was fused: its file, and how many layers of each part it changed.

    ``left_out``: layers of parts that were not opened, such as text encoders of a lone UNet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    sha256: str
    scale: float
    layers: dict[str, int]
    left_out: dict[str, int] = {}

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return Path(self.file).name


class DenoiserSpec(BaseModel):
    """How to call a denoiser and how to sample with it.

    ``scheduler`` is a diffusers scheduler configuration (with ``_class_name``). ``labels`` name the
    rows of conditions.npz, and ``uncond_row`` is the row for classifier-free guidance (used when
    ``guidance_scale`` is not 1). ``pixel_range`` is given when samples are images; latents have a
    decoder file or are compared as such. ``config`` is the diffusers model's own configuration;
    empty for an ONNX file.

    ``timestep`` None: a component that is called once (a VAE's decoder, a text encoder). Its
    samples are rows of conditions.npz by their input's name: the first ``calibration_rows`` to
    calibrate with, the others to compare with. ``first_tokens``: by condition, the first token of every text, for which
    alone the graph holds (``graph.passes.first_token``). ``pooled_factor``: of a text encoder of which
    its pipeline takes two outputs; ``output`` is then the states in a row and behind them the pooled
    vector times this factor, so that both weigh alike (``models.component``). ``pipeline``: the model's calls are those
    of a diffusers pipeline; then ``conditions.npz`` holds those of one call alone. ``recorded``: its calls
    were recorded by somebody's script, and there is nothing to sample with. ``loras``: fused into the
    graph and, where a pipeline calls the model, into its text encoders whenever it is run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: str
    sample: InputSpec
    timestep: InputSpec | None
    calibration_rows: int | None = None
    conditions: tuple[InputSpec, ...] = ()
    output: str = "out_sample"
    prediction_type: PredictionType = "epsilon"
    scheduler: dict[str, Any]
    guidance_scale: float = 1.0
    uncond_row: int | None = None
    labels: tuple[str, ...] = ()
    pixel_range: tuple[float, float] | None = None
    decoder: str | None = None
    synthetic: str = ""
    first_tokens: dict[str, tuple[float, ...]] = {}
    pooled_factor: float | None = None
    recorded: bool = False
    pipeline: PipelineSpec | None = None
    loras: tuple[LoraUse, ...] = ()
    config: dict[str, Any] = {}

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """All inputs of the graph: the sample, the timestep where there is one, the conditions."""
        return (self.sample, *(() if self.timestep is None else (self.timestep,)), *self.conditions)

    @property
    def sampled(self) -> bool:
        """Whether our own sampler makes the model's calls."""
        return self.timestep is not None and self.pipeline is None and not self.recorded

    def input_shapes(self, calls: int = 1) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input for so many calls, by name."""
        return {
            item.name: (calls, *item.shape) if item.batched else item.shape for item in self.inputs
        }

    @property
    def timestep_name(self) -> str:
        """The timestep's input; empty where there is none."""
        return "" if self.timestep is None else self.timestep.name

    def save(self, path: Path) -> None:
        """Write the specification as JSON with sorted keys."""
        import json

        path.write_text(
            json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n",
            encoding="utf-8",
        )

    @classmethod
    def load(cls, path: Path) -> DenoiserSpec:
        """Read what ``save`` wrote. Raises ModelError naming the first field that is wrong."""
        return read_model(cls, path, infinite=True, error=ModelError, hint=SPEC_HINT)


@dataclass(frozen=True)
class FloatModel:
    """A float ONNX file and how to call it: ``conditions`` by input name, one row per condition.

    ``pipeline``: the folder of the diffusers pipeline that calls it, where ``spec`` names one;
    ``calls``: the folder of its calls where somebody's script recorded them.
    """

    path: Path
    spec: DenoiserSpec
    conditions: dict[str, Array]
    pipeline: Path | None = None
    calls: Path | None = None

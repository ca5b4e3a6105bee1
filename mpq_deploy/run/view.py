"""A read view of a run: its recipe, its folder of finished stages, and what is opened from them.

Nothing here makes a stage. The pipeline hands a view to each stage that it makes; workers open one
on a run folder, or on a copy of some of its stages. Everything is opened once per view.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import PositiveInt

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.calibrate.fp16_range import read_beyond
from mpq_deploy.calibrate.shifted_inputs import shifted_layers
from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.calls.recorded import CallSet
from mpq_deploy.engine.record import RECORD, EngineRecord
from mpq_deploy.engine.target import Target, load_target
from mpq_deploy.errors import InputError, MpqError, RunFolderError, UsageError
from mpq_deploy.evaluate.cache import SampleCache
from mpq_deploy.graph.layers import LayerGraph, layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.graph.shapes import known_shapes
from mpq_deploy.graph.writers.deployed_graphs import DEPLOYED
from mpq_deploy.graph.writers.lora_slots import SLOTTED
from mpq_deploy.latency.conv_products import wants_products, with_products
from mpq_deploy.latency.joins import Shown
from mpq_deploy.models.export import load_exported
from mpq_deploy.models.locate import locate
from mpq_deploy.models.open import model_folder
from mpq_deploy.models.spec import Array, FloatModel
from mpq_deploy.run.effort import with_counts_of
from mpq_deploy.run.folder import COMPONENTS, RECIPE, SHARED, RunFolder, sharing_with, target_place
from mpq_deploy.sensitivity.chosen_method import ChosenMethod, chosen_method
from mpq_deploy.system.files import Fields
from mpq_deploy.system.inputs import read_json_object
from mpq_deploy.system.parallel.work import Alone, Crew
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.validated import model_of

if TYPE_CHECKING:
    from mpq_deploy.recipe import Recipe
    from mpq_deploy.run.memory_model import ModelSize

Opened = TypeVar("Opened")
# In the run folder: the recipe that its stages are made by, the finished shards of unfinished
# stages, and sampled images by what they were made from.
SHARDS, SAMPLES = ".shards", ".samples"
# And the folder that a checkpoint in one file is written as.
CHECKPOINT = ".checkpoint"
# In the folder of the stage calibrate: the recorded calls.
CALLS = "calls"


@dataclass(frozen=True)
class StageResult:
    """How a stage became current: made in ``seconds``, or ``cached`` with its last figures."""

    name: str
    seconds: float
    peak_rss_bytes: int
    cached: bool


class Exported:
    """The export stage, opened: graph, specification, conditions."""

    def __init__(self, folder: Path, recipe: Recipe, unpacked: Path) -> None:
        exported = load_exported(folder)
        self._recipe, self._unpacked = recipe, unpacked
        self.path = exported.model
        self.spec = exported.spec
        self.conditions: dict[str, Array] = dict(exported.conditions.arrays)
        facts = folder / "facts.json"
        self.facts: dict[str, Any] = read_json_object(facts)
        for name, kind in (("fp16_size_bytes", PositiveInt), ("notes", list[str])):
            model_of(kind, self.facts.get(name), f"{facts}: {name}")
        self.graph: LayerGraph = layer_graph(load_model(self.path))

    @cached_property
    def size(self) -> ModelSize:
        """What memory depends on."""
        from mpq_deploy.run.memory_model import model_size

        return model_size(self.path, self.graph, self.spec.input_shapes())

    @property
    def model(self) -> FloatModel:
        """The float model, as rooms that call it take it."""
        recipe, pipeline = self._recipe, None
        if self.spec.pipeline is not None:
            config = Path(recipe.config) if recipe.config else None
            given = bool(recipe.conditions)
            pipeline, _ = model_folder(locate(recipe.model), config, self._unpacked, Talk(), given)
        calls = Path(recipe.calls) if self.spec.recorded and recipe.calls else None
        return FloatModel(self.path, self.spec, self.conditions, pipeline, calls)


class Calibration(NamedTuple):
    """The calibrate stage, opened: recorded inputs, statistics of the activations.

    ``beyond_fp16``: names of the nodes whose values FP16 does not hold.
    """

    inputs: CallSet
    stats: CalibrationStats
    beyond_fp16: tuple[str, ...] = ()


def _open_below(
    place: Path, opener: Callable[[Path, Talk], Opened], root: Path, talk: Talk
) -> Opened:
    """Call a worker's ``opener`` on a folder below the job's root."""
    return opener(root / place, talk)


@dataclass(frozen=True)
class Run:
    """A view of a run: ``folder`` of finished stages, ``talk`` for progress, ``crew`` for shards.

    ``results``: the stages made current in this call, and how; empty in a worker. ``coming``: recipes
    and folders of the targets that are built after this one in the same call.
    """

    recipe: Recipe
    folder: RunFolder
    talk: Talk
    crew: Crew = field(default_factory=Alone)
    results: Mapping[str, StageResult] = field(default_factory=dict)
    coming: tuple[tuple[Recipe, Path], ...] = ()

    @classmethod
    def opened(cls, root: Path, talk: Talk) -> Run:
        """Return the run in ``root``, or in a copy of some of its stages, without its lock."""
        from mpq_deploy.recipe import load_recipe

        return cls(load_recipe(root / RECIPE), RunFolder(root), talk)

    def after(self, stage: str) -> Run:
        """Return a new view, once ``stage`` is made: nothing that was opened of its former files stays."""
        view = replace(self)
        if stage not in SHARED and "exported" in vars(self):
            vars(view)["exported"] = self.exported
        return view

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def root(self) -> Path:
        """The run of all targets, in which each of them lies: the run folder unless it is a target's."""
        place = target_place(self.path)
        return self.path if place is None else place.root

    @property
    def base(self) -> Path:
        """The folder of what several targets share: the run folder unless it is a target's."""
        return self.folder.base

    def for_workers(
        self, opener: Callable[[Path, Talk], Opened], *files: str
    ) -> tuple[Callable[[Path, Talk], Opened], Path, tuple[str, ...]]:
        """Return opener, root and files of a job that reads ``files`` of the run (see ``Job``)."""
        place = target_place(self.path)
        if place is None:
            return opener, self.path, files
        within = (
            ((place.part if name in (*SHARED, SAMPLES) else place.below) / name).as_posix()
            for name in files
        )
        return partial(_open_below, place.below, opener), place.root, tuple(within)

    def others(self, stage: str, now: Fields, aside: Set[str]) -> list[tuple[Path, Fields]]:
        """Return the folders of ``stage`` of the base's other targets, and what they were made from.

        Those that are whole, and whose inputs are ``now`` but for the names in ``aside``; in the
        order in which the targets were added. What they hold need not be made again.
        """
        found = []
        for path in (self.base, *sharing_with(self.path)) if self.base != self.path else ():
            folder = RunFolder(path)
            record = folder.made_before(stage, now, aside)
            if record is not None:
                found.append((folder.stage(stage), record.inputs))
        return found

    def later(self) -> list[Run]:
        """Return the targets after this one, which share its passes through the model; none over workers."""
        coming = self.coming if isinstance(self.crew, Alone) else ()
        return [
            replace(
                self, recipe=with_counts_of(recipe, self.recipe), folder=RunFolder(path), coming=()
            )
            for recipe, path in coming
        ]

    def stage(self, name: str) -> Path:
        """Folder of a finished stage."""
        return self.folder.stage(name)

    def digest(self, name: str) -> str:
        """Digest of a finished stage's outputs. Raises UsageError when there is none."""
        record = self.folder.record(name)
        if record is None:
            raise UsageError(
                f"The stage '{name}' is missing in {self.path}.", "Run 'mpq-deploy build' first."
            )
        return record.digest

    @property
    def is_part(self) -> bool:
        """Whether the run is of one part of a whole pipeline."""
        return self.path.absolute().parent.name == COMPONENTS

    @property
    def shared_by(self) -> str:
        """Who shares the measurement with this run, in words; empty for one target and one part."""
        if self.is_part:
            return "the parts of a pipeline"
        return "several targets" if self.base != self.path else ""

    @property
    def method(self) -> ChosenMethod:
        """The metric that the recipe asks for, or that its ``auto`` stands for."""
        return chosen_method(self.recipe, self.exported.spec, self.shared_by)

    def scratch(self) -> Path:
        """A folder for files of a stage that is being made."""
        return self.folder.scratch()

    def shard_cache(self, stage: str) -> SampleCache:
        """Return where the finished shards of ``stage`` are kept until all are."""
        return SampleCache(self.path / SHARDS / stage, self.talk)

    def remove_shards(self, stage: str) -> None:
        """Remove the kept shards of ``stage``, which is finished."""
        shards = self.path / SHARDS
        shutil.rmtree(shards / stage, ignore_errors=True)
        if shards.is_dir() and not any(shards.iterdir()):
            shards.rmdir()

    @property
    def deployed_stage(self) -> str:
        """The stage whose graphs are deployed: recover where the recipe has steps, else quantize."""
        return "recover" if self.recipe.recover.steps else "quantize"

    @property
    def deployed(self) -> Path:
        """Folder of the graphs that are deployed and compared."""
        return self.stage(self.deployed_stage)

    @property
    def built(self) -> Path:
        """The graph that engines are built from: with slots for LoRAs where the recipe has them."""
        return self.deployed / (SLOTTED if self.recipe.lora_slots else DEPLOYED)

    @cached_property
    def target(self) -> Target:
        """The recipe's target."""
        return load_target(self.recipe.target)

    @cached_property
    def exported(self) -> Exported:
        """What the stage export left; layers as the target's engine will have them."""
        found = Exported(self.stage("export"), self.recipe, self.base / CHECKPOINT)
        if wants_products(found.graph, self.target):
            engine = self.recipe.engine
            usual, largest = (
                known_shapes(found.path, found.spec.input_shapes(batch))[1]
                for batch in (engine.batch_opt, engine.batch_max)
            )
            found.graph = with_products(found.graph, self.target, usual, largest)
        try:
            found.graph = shifted_layers(found.graph, self.stage("calibrate"))
        except MpqError:
            # Damaged: until its stage is checked it is not needed, and then made again.
            if not self.results or "calibrate" in self.results:
                raise
        return found

    @cached_property
    def calibration(self) -> Calibration:
        """What the stage calibrate left."""
        folder = self.stage("calibrate")
        inputs = CallSet.load(folder / CALLS)
        for item in self.exported.spec.inputs:
            given = inputs.inputs.get(item.name)
            shape = None if given is None else given.values.shape[1:]
            if shape is None or prod(shape) != prod(item.shape):
                raise RunFolderError(
                    f"The calls in {folder / CALLS} do not fit the exported model: '{item.name}' has the shape "
                    f"{shape}, not {item.shape}.",
                    "Calibrate again.",
                )
        stats = CalibrationStats.load(folder / "stats.npz")
        inputs = inputs.used(self.recipe.calibrate.timesteps)
        return Calibration(inputs, stats, read_beyond(folder))

    @property
    def shown_products(self) -> Shown | None:
        """Which products are one kernel in the engine that lies here, if it is of the recipe's target.

        None for parts of a whole pipeline: their shares of its time are counted without any engine.
        """
        if self.path.parent.name == COMPONENTS:
            return None
        try:
            record = EngineRecord.beside(self.stage("engine") / RECORD)
        except InputError:
            return None  # damaged: its stage makes it again
        ours = self.target.name, self.target.builder
        if record is None or (record.target, record.backend) != ours or not record.products:
            return None
        by = f"the engine for {record.target} ({record.backend} {record.version})"
        return Shown(record.products, by)

    @cached_property
    def plan(self) -> PrecisionPlan:
        """What the stage allocate left."""
        return PrecisionPlan.load(self.stage("allocate") / "plan.json")

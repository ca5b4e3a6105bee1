"""Fuse LoRAs into the modules of a pipeline: W + scale * B @ A, layer by layer, in float32.

In: the user's LoRA files, the class of pipeline that they are for, modules. Out: the modules with
other weights, and for the run's record which file changed how many layers of which part.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.models.lora_file import (
    LoraFile,
    LowRank,
    check_known,
    denoiser_part,
    made_for,
    read_lora,
)
from mpq_deploy.models.lora_option import LoraOption
from mpq_deploy.models.spec import DenoiserSpec, LoraUse
from mpq_deploy.models.weight_kinds import named_tensors
from mpq_deploy.system.names import printable
from mpq_deploy.system.progress import Talk

FOR_ANOTHER = "It was trained for another model: give one for this model."


@dataclass
class Loras:
    """LoRA files opened for one pipeline, and which layers of which part each has changed so far."""

    files: tuple[LoraFile, ...] = ()
    denoiser: str = ""
    changed: list[dict[str, int]] = field(default_factory=list)

    @classmethod
    def opened(cls, options: Sequence[LoraOption], found: Any, config: Mapping[str, Any]) -> Loras:
        """Read the files for pipelines of the class ``found`` (None: not named) and their denoiser's config.

        Raises as ``lora_loader`` and ``read_lora``, and ModelError for parts that they do not have.
        """
        if not options:
            return cls()
        loader = lora_loader(found, config)
        files = tuple(read_lora(option, loader, config) for option in options)
        for file in files:
            check_known(file, loader._lora_loadable_modules, loader)
        return cls(files, denoiser_part(loader), [{} for _ in files])

    @classmethod
    def of_text(cls, spec: DenoiserSpec, found: Any) -> Loras:
        """Read again the files of an export that its pipeline's other parts take.

        Raises ModelError for a file that has changed since.
        """
        if not any(set(use.layers) - {"unet", "transformer"} for use in spec.loras):
            return cls()
        options = [LoraOption(Path(use.file), use.scale) for use in spec.loras]
        loras = cls.opened(options, found, spec.config)
        for file, use in zip(loras.files, spec.loras):
            if file.sha256 != use.sha256:
                raise ModelError(
                    f"The LoRA {file.name} is not the one that was fused at the export.",
                    "Export again, or put the file back.",
                )
        return loras

    def fuse(self, part: str, module: Any) -> None:
        """Add the updates of ``part`` to the weights of ``module``. Raises ModelError as ``_targets``."""
        for file, changed in zip(self.files, self.changed):
            updates = file.parts.get(part)
            if updates:
                changed[part] = _fuse(file, part, updates, module)

    def fuse_alone(self, module: Any) -> tuple[LoraUse, ...]:
        """Fuse into a denoiser without its pipeline; return what was fused.

        Raises ModelError as ``fuse`` and ``uses``.
        """
        self.fuse(self.denoiser, module)
        return self.uses()

    def fuse_others(self, pipeline: Any, given: Mapping[str, Any]) -> None:
        """Fuse into the parts of ``pipeline`` but those ``given``, one of which is its denoiser.

        Raises ModelError for updates of parts that the pipeline does not have.
        """
        done = {*given, *([self.denoiser] if given else [])}
        for part in sorted({name for file in self.files for name in file.parts} - done):
            module = getattr(pipeline, part, None)
            if not isinstance(module, torch.nn.Module):
                known = [n for n, value in pipeline.components.items() if value is not None]
                for file in self.files:
                    check_known(file, known, type(pipeline))
            self.fuse(part, module)

    def uses(self) -> tuple[LoraUse, ...]:
        """Return what was fused, for the run's record. Raises ModelError for a file that changed nothing."""
        uses = []
        for file, changed in zip(self.files, self.changed):
            if not any(changed.values()):
                held = ", ".join(f"{len(layers)} of {part}" for part, layers in file.parts.items())
                raise ModelError(
                    f"{file.name} changes no weight of this model: its layers are {held}.",
                    "Its matrices are zero, as before training, or it is for other parts.",
                )
            left = {part: len(layers) for part, layers in file.parts.items() if part not in changed}
            uses.append(
                LoraUse(
                    file=str(file.option.file),
                    sha256=file.sha256,
                    scale=file.option.scale,
                    layers={part: count for part, count in changed.items() if count},
                    left_out=left,
                )
            )
        return tuple(uses)


def _fuse(file: LoraFile, part: str, updates: Mapping[str, LowRank], module: Any) -> int:
    """Add the updates to the weights of ``module``; return the number of layers that they change."""
    targets = _targets(file, part, updates, module)
    count = 0
    with torch.no_grad():
        for layer, weight in targets.items():
            delta = updates[layer].delta(weight.shape).mul_(file.option.scale)
            weight.add_(delta.to(weight.dtype))
            if not bool(torch.isfinite(weight).all()):
                raise ModelError(
                    f"With {file.name} the weight of '{layer}' in {part} is not finite.",
                    "Give a smaller scale, or another LoRA.",
                )
            count += bool(delta.any())
    return count


def _targets(
    file: LoraFile, part: str, updates: Mapping[str, LowRank], module: Any
) -> dict[str, torch.Tensor]:
    """Return the weight of each layer. Raises ModelError for layers that are not there or of another shape."""
    name, modules = type(module).__name__, dict(module.named_modules())
    # CLIPTextModel has lost a level of its names, which files still have.
    wrapped = hasattr(module, "text_model")
    places = {layer: layer if wrapped else layer.removeprefix("text_model.") for layer in updates}
    weights = {
        layer: getattr(modules.get(place), "weight", None) for layer, place in places.items()
    }
    absent = [
        layer
        for layer, weight in weights.items()
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2
    ]
    if absent:
        raise ModelError(
            f"{len(absent)} of {len(updates)} layers that {file.name} updates in the {part} are not in {name}: "
            f"{named_tensors(absent)}{made_for(file)}.",
            FOR_ANOTHER,
        )
    for layer, weight in weights.items():
        assert weight is not None
        if not updates[layer].fits(weight):
            raise ModelError(
                f"'{printable(layer)}' in {file.name} updates a weight of the shape {updates[layer].shape}; "
                f"in this {name} it has {list(weight.shape)}{made_for(file)}.",
                FOR_ANOTHER,
            )
    return {layer: weight for layer, weight in weights.items() if weight is not None}


def lora_loader(found: Any, config: Mapping[str, Any]) -> Any:
    """Return the class of pipelines whose LoRAs fit: ``found`` itself, or one by the denoiser's class.

    ``found``: the pipeline's class, None where no pipeline is named; ``config``: the denoiser's.
    Raises UsageError where diffusers reads no LoRA for such a model.
    """
    if found is not None and hasattr(found, "lora_state_dict"):
        return found
    denoiser = str(config.get("_class_name"))
    if found is None and denoiser == "UNet2DConditionModel":
        import diffusers

        # UNets of SDXL are known by their pooled text.
        xl = "XL" if config.get("addition_embed_type") == "text_time" else ""
        return getattr(diffusers, f"StableDiffusion{xl}Pipeline")
    if found is None:
        fitting = [one for one in _pipelines() if _takes(one, denoiser)]
        if fitting:
            return fitting[0]
    of = getattr(found, "__name__", denoiser)
    raise UsageError(
        f"diffusers does not load LoRAs for {of}.",
        "Leave out --lora; or fuse it with the tool that made it, and give the folder of the result.",
    )


def _pipelines() -> list[Any]:
    from diffusers.pipelines import auto_pipeline

    tables = ("TEXT2IMAGE", "TEXT2VIDEO", "IMAGE2VIDEO", "IMAGE2IMAGE")
    mappings = [getattr(auto_pipeline, f"AUTO_{name}_PIPELINES_MAPPING", {}) for name in tables]
    return [one for table in mappings for one in table.values() if hasattr(one, "lora_state_dict")]


def _takes(pipeline: Any, denoiser: str) -> bool:
    given = inspect.signature(pipeline.__init__).parameters
    return any(
        denoiser in str(getattr(given.get(name), "annotation", ""))
        for name in ("unet", "transformer")
    )


def told(uses: Sequence[LoraUse], talk: Talk) -> tuple[str, ...]:
    """Say what was fused, and warn of what was left out; return a sentence per LoRA for the report."""
    said = tuple(_told(use) for use in uses)
    for use, line in zip(uses, said):
        if use.left_out:
            talk.warn(line)
        else:
            talk.line(f"  {line}")
    return said


def _told(use: LoraUse) -> str:
    fused = " and ".join(f"{count} layers of the {part}" for part, count in use.layers.items())
    said = f"The LoRA {printable(use.name)}, scale {use.scale:g}, is fused into {fused}"
    if use.left_out:
        left = " and ".join(f"{count} of the {part}" for part, count in use.left_out.items())
        said += f"; its layers of parts that are not opened here ({left}) are left out"
    return said

"""LoRA files: what the user names, and the low-rank updates in one, by part of the pipeline and layer.

In: ``FILE[:SCALE]``, a safetensors file of kohya, A1111, diffusers or peft. Out: for each layer the
matrices A and B of its update ``scale * B @ A``. Names are converted by diffusers; what it would
drop, or what is no such update, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mpq_deploy.errors import ModelError
from mpq_deploy.models.lora_names import (
    BASES,
    DOWN,
    check_names,
    peft_scale,
    peft_settings,
    plain_shape,
    up_of,
)
from mpq_deploy.models.lora_option import LoraOption, check_lora
from mpq_deploy.models.weight_files import DAMAGED, read_headers
from mpq_deploy.models.weight_kinds import named_tensors
from mpq_deploy.system.files import file_digest
from mpq_deploy.system.libraries import gist, silenced
from mpq_deploy.system.names import printable

_LAYER = re.compile(r"(.+)\.lora_([AB])(\.default(_\d+)?)?\.weight")


@dataclass(frozen=True)
class LowRank:
    """The update of one layer: ``a`` [r, in, ...] and ``b`` [out, r, ...] in float32, its ``scale``."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def delta(self, shape: torch.Size) -> torch.Tensor:
        """Return ``scale * B @ A`` as a weight of ``shape``: Linear [out, in] or Conv [out, in, k...]."""
        return (self.b.flatten(1) @ self.a.flatten(1)).mul_(self.scale).reshape(shape)

    @property
    def shape(self) -> list[int]:
        """The shape of the weight that it updates, without trailing ones."""
        return plain_shape([self.b.shape[0], *self.a.shape[1:]])

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether it updates a weight of that shape; a Linear layer is a 1 x 1 convolution."""
        return self.shape == plain_shape(list(weight.shape))


@dataclass(frozen=True)
class LoraFile:
    """An opened file: its updates by part of the pipeline and by layer, and what it was trained on."""

    option: LoraOption
    sha256: str
    parts: dict[str, dict[str, LowRank]]
    base: str = ""

    @property
    def name(self) -> str:
        """The file's path, for messages."""
        return printable(str(self.option.file))


def read_lora(option: LoraOption, loader: Any, config: Mapping[str, Any]) -> LoraFile:
    """Read a LoRA for pipelines of the class ``loader``; ``config``: of their denoiser.

    Raises UsageError for a file that is not there or a pickle, ModelError for one that is damaged,
    holds NaN or infinity, is quantized, or holds anything but updates of layers.
    """
    path = option.file
    check_lora(path)
    types, metadata = read_headers([path], DAMAGED).types, _metadata(path)
    check_names(types, path)
    tensors = _tensors(path)
    sha256 = file_digest(path)
    pairs = sum(1 for name in tensors if DOWN.search(name))
    try:
        with silenced():
            converted = _converted(_with_alphas(tensors, path), loader, config)
    except ModelError:
        raise
    except Exception as error:
        # Converters of diffusers raise anything at all for names that they do not know.
        raise ModelError(
            f"diffusers cannot read the names in {path} as a LoRA of {_models(loader)}: {gist(error)}",
            "It may be for another model, or from a trainer that diffusers does not know: give one that "
            "the pipeline's load_lora_weights takes.",
        ) from error
    parts = _parts(converted, peft_settings(metadata, path), loader, path)
    layers = sum(map(len, parts.values()))
    if layers < pairs:
        raise ModelError(
            f"{path} holds updates of {pairs} layers; diffusers' conversion to {_models(loader)} keeps "
            f"{layers} of them.",
            "It mixes two naming schemes, or is for another model: give another file.",
        )
    base = next((str(metadata[name]) for name in BASES if metadata.get(name)), "")
    return LoraFile(option, sha256, parts, printable(base[:80]))


def denoiser_part(loader: Any) -> str:
    """Return the name that LoRA files of these pipelines give to the denoiser."""
    return str(getattr(loader, "transformer_name", None) or getattr(loader, "unet_name", "unet"))


def _models(loader: Any) -> str:
    return str(loader.__name__)


def _metadata(path: Path) -> dict[str, str]:
    """Return what the header says beside the tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load the tensors in float32. Raises ModelError for NaN or infinity."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = {name: value.float() for name, value in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The LoRA {path} cannot be read: {printable(gist(error))}.") from error
    for name, value in tensors.items():
        wrong = int((~torch.isfinite(value)).sum())
        if wrong:
            raise ModelError(
                f"'{printable(name)}' in {path} holds {wrong:,} values that are NaN or infinite.",
                "The file is damaged, or its training diverged: use another.",
            )
    return tensors


def _with_alphas(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors with every alpha multiplied in: B by alpha / rank, and alpha set to the rank.

    Converters of diffusers keep alphas in several ways, and some drop them; at the rank they scale
    by 1 in all of them.
    """
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(".alpha")]:
        stem = f"{name.removesuffix('.alpha')}."
        downs = [n for n in tensors if n.startswith(stem) and DOWN.search(n)]
        if len(downs) != 1 or tensors[name].numel() != 1:
            raise ModelError(
                f"'{printable(name)}' in {path} is the alpha of {len(downs)} layers, with "
                f"{tensors[name].numel()} values.",
                "An alpha is one number for one layer: the file is damaged or of another kind.",
            )
        rank, up = tensors[downs[0]].shape[0] if tensors[downs[0]].ndim else 0, up_of(downs[0])
        if rank and up in found:
            found[up] = tensors[up] * (float(tensors[name]) / rank)
            found[name] = torch.tensor(float(rank))
    return found


def _converted(
    tensors: dict[str, torch.Tensor], loader: Any, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the tensors by diffusers' names: part, layer, ``lora_A`` or ``lora_B``."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    # Blocks that are numbered through are mapped by the UNet's configuration.
    blocks = SimpleNamespace(layers_per_block=config.get("layers_per_block", 2))
    options = {"unet_config": blocks} if hasattr(loader, "unet_name") else {}
    answer = loader.lora_state_dict(tensors, **options)
    state = answer[0] if isinstance(answer, tuple) else answer
    known = (*loader._lora_loadable_modules, *_TEXT_PARTS)
    if not any(name.split(".")[0] in known for name in state):
        # What a module's own save_lora_adapter wrote.
        state = {f"{denoiser_part(loader)}.{name}": value for name, value in state.items()}
    found: dict[str, Any] = {}
    for part in {name.split(".")[0] for name in state}:
        of_part = {name: value for name, value in state.items() if name.split(".")[0] == part}
        if all(_LAYER.fullmatch(name) for name in of_part):
            found |= of_part
        elif part in _TEXT_PARTS:
            # Left to guess, it takes a file without to_out for the newer names, and skips the rest.
            for kind in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
                of_part = convert_state_dict_to_peft(of_part, original_type=kind)
            found |= of_part
        else:
            found |= convert_unet_state_dict_to_peft(of_part)
    return found


_TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def _parts(
    state: Mapping[str, torch.Tensor], settings: Mapping[str, Any], loader: Any, path: Path
) -> dict[str, dict[str, LowRank]]:
    """Return the updates by part and layer. Raises ModelError for tensors that make none."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    others = []
    for name, value in state.items():
        match = _LAYER.fullmatch(name)
        if match:
            halves.setdefault(match[1], {})[match[2]] = value
        elif not name.endswith(".alpha"):
            others.append(name)
    others += [name for name, pair in halves.items() if len(pair) < 2 or not _fit(**pair)]
    if others:
        raise ModelError(
            f"{len(others)} tensors in {path} are not pairs of LoRA matrices: {named_tensors(others)}.",
            "The file is damaged, or of another kind of adapter: give another.",
        )
    parts: dict[str, dict[str, LowRank]] = {}
    for name, pair in halves.items():
        part, _, layer = name.partition(".")
        scale = peft_scale(settings, part, layer, pair["A"].shape[0], path)
        parts.setdefault(part, {})[layer] = LowRank(pair["A"], pair["B"], scale)
    return parts


def _fit(A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether B @ A exists: A [r, in, k...], B [out, r, 1...]."""
    whole = A.ndim > 1 and B.ndim > 1 and A.numel() > 0
    return whole and len(A) == B.shape[1] and int(B.numel()) == len(B) * len(A)


def made_for(file: LoraFile) -> str:
    """Say what model a file was trained on, where it says so."""
    return f" (its header names {file.base})" if file.base else ""


def check_known(file: LoraFile, known: Collection[str], loader: Any) -> None:
    """Raise ModelError where the file updates parts that pipelines of ``loader`` do not have."""
    others = {part: layers for part, layers in file.parts.items() if part not in known}
    if others:
        said = ", ".join(f"{len(layers)} of {printable(part)}" for part, layers in others.items())
        raise ModelError(
            f"{file.name} updates layers of other parts than {_models(loader)} has here "
            f"({', '.join(known)}): {said}{made_for(file)}.",
            "It was trained for another model: give one for this model.",
        )

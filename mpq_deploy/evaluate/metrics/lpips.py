"""LPIPS on AlexNet (Zhang et al. 2018, "The unreasonable effectiveness of deep features").

The distance and its linear heads are torchmetrics'; AlexNet's weights are the user's: torchvision's
file, from a path or PyTorch's cache. torchvision itself is not needed. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.errors import MissingDependencyError, ModelError, UsageError
from mpq_deploy.evaluate.metrics.networks import BATCH, LPIPS, as_rgb, digest_of
from mpq_deploy.evaluate.metrics.scores import ScoreKind
from mpq_deploy.models.spec import Array
from mpq_deploy.system.compute import computing_on
from mpq_deploy.system.files import file_digest

# torchvision's ImageNet weights; the name ends with the start of their SHA-256.
FILE = "alexnet-owt-7be5be79.pth"
STANDARD = "7be5be79"
# Below this AlexNet's third pooling has nothing left to pool.
MIN_SIDE = 31
# AlexNet as torchvision has it: of each convolution the outputs, kernel, stride and padding, and
# whether a pooling of 3 x 3 and stride 2 comes before it. LPIPS compares what each leaves behind
# its ReLU.
CONVOLUTIONS = (
    (64, 11, 4, 2, False),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, True),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, False),
)


def cached_weights() -> Path:
    """Return where torchvision keeps its AlexNet."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / FILE


def check_lpips(path: Path | None, offline: str) -> None:
    """Say what is missing: a package, or the weights. Raises MissingDependencyError, UsageError."""
    for package, extra in (("torch", "torch"), ("torchmetrics", "metrics")):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, extra, "LPIPS")
    weights = path or cached_weights()
    if not weights.is_file():
        raise UsageError(
            f"AlexNet's weights for LPIPS are not at {weights}.",
            f"Get {FILE} (where torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url points to), put it there or give "
            f"it with --weights {LPIPS}=FILE. {offline}",
        )


class Lpips:
    """LPIPS between each image and the float model's from the same noise; images are not resized."""

    name: ScoreKind = "lpips"
    min_side = MIN_SIDE

    def __init__(self, path: Path | None) -> None:
        weights = path or cached_weights()
        found = file_digest(weights)
        self.title = (
            "LPIPS (AlexNet)" if found.startswith(STANDARD) else "LPIPS (AlexNet, other weights)"
        )
        self.digest = digest_of(found, file_digest(_heads()), "lpips alex")
        self._device = computing_on().torch_device()
        self._network = _network(weights).to(self._device)

    def scores(self, images: Array, reference: Array, prompts: Sequence[str] = ()) -> Array:
        """Return float64 [N]: 0 for equal images, more for ones that look less alike."""
        import torch

        found = []
        for start in range(0, len(images), BATCH):
            pair = (
                _unit(one[start : start + BATCH]).to(self._device) for one in (images, reference)
            )
            with torch.inference_mode():
                scores = self._network(*pair, normalize=True).reshape(-1)
            found.append(scores.double().cpu().numpy())
        return np.concatenate(found)


def _unit(images: Array) -> Any:
    import torch

    return torch.from_numpy(as_rgb(images).astype(np.float32) / 255).permute(0, 3, 1, 2)


def _heads() -> Path:
    """Return the linear heads, which come with torchmetrics."""
    from torchmetrics.functional.image import lpips

    path = Path(lpips.__file__).parent / "lpips_models" / "alex.pth"
    if not path.is_file():
        raise ModelError(
            f"torchmetrics holds no {path.name} of LPIPS.", "Install torchmetrics again."
        )
    return path


def _network(weights: Path) -> Any:
    """Return torchmetrics' LPIPS around an AlexNet of ``weights``."""
    import torch
    from torchmetrics.functional.image import lpips

    class AlexNetLpips(lpips._LPIPS):  # type: ignore[misc]  # torchmetrics is not typed for us
        """torchmetrics' own constructor asks torchvision for AlexNet, which downloads it."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.L, self.resize, self.spatial = len(CONVOLUTIONS), None, False
            self.scaling_layer = lpips.ScalingLayer()
            self.net = _alexnet(weights)
            heads = [lpips.NetLinLayer(outputs, use_dropout=True) for outputs, *_ in CONVOLUTIONS]
            self.lins = torch.nn.ModuleList(heads)

    network = AlexNetLpips().eval()
    state = torch.load(_heads(), weights_only=True, map_location="cpu")
    network.lins.load_state_dict({name.removeprefix("lin"): value for name, value in state.items()})
    return network.requires_grad_(False)


def _alexnet(weights: Path) -> Any:
    """Return a module that gives AlexNet's five activations; ``weights`` as torchvision keeps them."""
    import torch

    class Slices(torch.nn.Module):  # type: ignore[misc]  # torch is not typed for us
        """AlexNet's convolutions; returns what each leaves behind its ReLU."""

        def __init__(self) -> None:
            super().__init__()
            parts, inputs = [], 3
            for outputs, kernel, stride, padding, pooled in CONVOLUTIONS:
                pooling = [torch.nn.MaxPool2d(3, 2)] if pooled else []
                convolution = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding)
                parts.append(torch.nn.Sequential(*pooling, convolution, torch.nn.ReLU()))
                inputs = outputs
            self.parts = torch.nn.ModuleList(parts)

        def forward(self, pixels: Any) -> list[Any]:
            found = []
            for part in self.parts:
                pixels = part(pixels)
                found.append(pixels)
            return found

    slices = Slices()
    with torch.no_grad():
        for convolution, (weight, bias) in zip(
            (one for one in slices.modules() if isinstance(one, torch.nn.Conv2d)),
            _stored(weights),
            strict=True,
        ):
            if weight.shape != convolution.weight.shape or bias.shape != convolution.bias.shape:
                raise _wrong(
                    weights,
                    f"a convolution of {list(weight.shape)}, not {list(convolution.weight.shape)}",
                )
            convolution.weight.copy_(weight)
            convolution.bias.copy_(bias)
    return slices


def _stored(weights: Path) -> list[tuple[Any, Any]]:
    """Read weight and bias of each convolution, in order."""
    import pickle

    import torch

    try:
        # weights_only: tensors alone are read, nothing in the file can run.
        state = torch.load(weights, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UsageError(
            f"{weights} cannot be read as plain tensors: {str(error).splitlines()[0]}",
            f"Get {FILE} again.",
        ) from error
    names = [f"features.{place}" for place in (0, 3, 6, 8, 10)]
    if not isinstance(state, dict):
        raise _wrong(weights, f"a {type(state).__name__}")
    missing = [
        key for name in names for key in (f"{name}.weight", f"{name}.bias") if key not in state
    ]
    if missing:
        raise _wrong(weights, f"no {missing[0]}")
    return [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]


def _wrong(weights: Path, found: str) -> UsageError:
    return UsageError(f"{weights} does not hold torchvision's AlexNet: {found}.", f"Get {FILE}.")

"""Five small denoisers in torch, of the kinds that people export, and both exporters of torch.

Each takes a sample [N, ...] and timesteps [N], and gives something like the sample. None takes a
second to export by TorchScript; the exporter of torch.export needs some seconds whatever the size.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

WIDTH = 16
KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def sinusoids(timestep: Any, like: Any) -> Any:
    """Return the timesteps [N] as [N, WIDTH], in the type of the parameter ``like``."""
    steps = torch.arange(WIDTH // 2, dtype=torch.float32)
    angles = timestep.float()[:, None] * torch.exp(steps * -(math.log(1e4) / (WIDTH // 2)))[None]
    return torch.cat((angles.sin(), angles.cos()), -1).to(like.dtype)


class Block(nn.Module):
    """Two convolutions with group norms; the timestep is added between them."""

    def __init__(self, conv: Any, into: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, into), conv(into, WIDTH, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, WIDTH), conv(WIDTH, WIDTH, 3, padding=1)
        self.time, self.skip = nn.Linear(WIDTH, WIDTH), conv(into, WIDTH, 1)

    def forward(self, x: Any, time: Any) -> Any:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = h + self.time(time).reshape(*h.shape[:2], *(1,) * (x.ndim - 2))
        return self.conv2(functional.silu(self.norm2(h))) + self.skip(x)


class Unet(nn.Module):
    """A level down and up again, to the size that the skip connection has; of any rank."""

    def __init__(self, conv: Any, channels: int = 4) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.first, self.last = (
            conv(channels, WIDTH, 3, padding=1),
            conv(WIDTH, channels, 3, padding=1),
        )
        self.down = conv(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.before, self.after = Block(conv, WIDTH), Block(conv, 2 * WIDTH)

    def forward(self, sample: Any, timestep: Any) -> Any:
        time = self.time(sinusoids(timestep, self.first.weight))
        skip = self.before(self.first(sample), time)
        low = functional.silu(self.down(skip))
        up = functional.interpolate(low, size=skip.shape[2:], mode="nearest")
        return self.last(functional.silu(self.after(torch.cat((up, skip), 1), time)))


class Transformer(nn.Module):
    """A block of attention over patches, with normed queries, modulation and a gelu."""

    def __init__(self, width: int = 32, channels: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.channels = heads, channels
        self.first, self.modulate = nn.Conv2d(channels, width, 2, 2), nn.Linear(WIDTH, 3 * width)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(width, elementwise_affine=False), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.query_scale = nn.Parameter(torch.rand(width // heads) + 0.5)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU("tanh"), nn.Linear(64, width))
        self.last = nn.Linear(width, 4 * channels)

    def forward(self, sample: Any, timestep: Any) -> Any:
        n, channels, rows, columns = sample.shape
        h = self.first(sample).flatten(2).transpose(1, 2) + self.position
        time = functional.silu(sinusoids(timestep, self.position))
        shift, scale, gate = self.modulate(time)[:, None].chunk(3, -1)
        h = h + gate * self._attended(self.norm1(h) * (1 + scale) + shift)
        h = self.last(h + self.mlp(self.norm2(h)))
        h = h.reshape(n, rows // 2, columns // 2, 2, 2, channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(n, channels, rows, columns)

    def _attended(self, h: Any) -> Any:
        n, tokens, width = h.shape
        parts = (
            layer(h).view(n, tokens, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k, v = parts
        root = (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        attended = functional.scaled_dot_product_attention(q * root * self.query_scale, k, v)
        return self.to_out(attended.transpose(1, 2).reshape(n, tokens, width))


class Standardized(nn.Conv2d):
    """A convolution whose weight is standardized at every call."""

    def forward(self, x: Any) -> Any:
        weight = self.weight
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = weight.var(dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (weight - mean) * (variance + 1e-5).rsqrt() * 0.1
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class LowRank(nn.Linear):
    """A linear layer with the low-rank product of an adapter that was never merged."""

    def __init__(self, into: int, out: int, rank: int = 2) -> None:
        super().__init__(into, out)
        self.down = nn.Parameter(torch.randn(rank, into) * 0.3)
        self.up = nn.Parameter(torch.randn(out, rank) * 0.3)

    def forward(self, x: Any) -> Any:
        return functional.linear(x, self.weight + self.up @ self.down * 0.5, self.bias)


class Spectral(nn.Linear):
    """A linear layer whose weight is divided by an estimate of its largest singular value."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.register_buffer("u", functional.normalize(torch.randn(out), dim=0))
        self.register_buffer("v", functional.normalize(torch.randn(into), dim=0))

    def forward(self, x: Any) -> Any:
        sigma = torch.sum(self.u * torch.mv(self.weight, self.v)).abs() + 0.3
        return functional.linear(x, self.weight / sigma, self.bias)


def computed() -> Unet:
    """The UNet with weights that are computed: standardized, normed, divided, and sums."""

    def conv(into: int, out: int, kernel: int, **options: Any) -> nn.Module:
        if kernel == 3:
            return Standardized(into, out, kernel, **options)
        return nn.utils.parametrizations.weight_norm(nn.Conv2d(into, out, kernel, **options))

    made = Unet(conv)
    made.time[0], made.time[2] = LowRank(WIDTH, WIDTH), Spectral(WIDTH, WIDTH)
    return made


class Squeezed(nn.Module):
    """Squeezes an axis whose size follows from that of the sample: TorchScript writes an If."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(*pair, 3, padding=1) for pair in ((4, 16), (16, 4)))
        self.time = nn.Linear(WIDTH, WIDTH)

    def forward(self, sample: Any, timestep: Any) -> Any:
        time = self.time(sinusoids(timestep, self.first.weight))
        time = time[:, None, :].expand(-1, sample.shape[1] // 4, -1).squeeze(1)
        return self.last(functional.silu(self.first(sample) + time[:, :, None, None]))


@dataclass(frozen=True)
class Network:
    """How a network is made, and the shape of its sample without the batch axis."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


NETWORKS = {
    "unet": Network(lambda: Unet(nn.Conv2d), (4, 8, 8)),
    "transformer": Network(Transformer, (4, 8, 8)),
    "conv1d": Network(lambda: Unet(nn.Conv1d), (4, 16)),
    "conv3d": Network(lambda: Unet(nn.Conv3d), (4, 4, 4, 4)),
    "computed": Network(computed, (4, 8, 8)),
    "squeezed": Network(Squeezed, (4, 8, 8)),
}


@dataclass(frozen=True)
class Form:
    """A network, the exporter, its opset, and the type of weights, sample and output.

    ``open_sizes``: TorchScript leaves all axes of the sample open, as optimum does, and folds no
    constants; ``torch.export`` leaves its height and width open.
    """

    network: str
    exporter: str
    opset: int
    kind: str = "fp32"
    open_sizes: bool = False

    @property
    def name(self) -> str:
        """What tests call it."""
        ending = "-open" if self.open_sizes else ""
        return f"{self.network}-{self.exporter}{self.opset}-{self.kind}{ending}"

    def module(self) -> nn.Module:
        """Return the network in its type; the same for every exporter."""
        torch.manual_seed(0)
        return NETWORKS[self.network].make().eval().requires_grad_(False).to(KINDS[self.kind])

    def export(self, path: Path) -> nn.Module:
        """Write ``path``; return the network with the same weights in FP32."""
        module, network = self.module(), NETWORKS[self.network]
        sample = torch.randn(2, *network.shape).to(KINDS[self.kind])
        names: dict[str, Any] = {
            "input_names": ["sample", "timestep"],
            "output_names": ["out_sample"],
            "opset_version": self.opset,
        }
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            arguments = (module, (sample, torch.tensor([5, 900])), str(path))
            torch.onnx.export(*arguments, **names, **self._options(sample.ndim))
        return module.float()

    def _options(self, rank: int) -> dict[str, Any]:
        if self.exporter == "dynamo":
            dynamic = torch.export.Dim.DYNAMIC
            sizes = dict.fromkeys(range(2, rank), dynamic) if self.open_sizes else {}
            axes = ({0: dynamic, **sizes}, {0: dynamic})
            return {"dynamo": True, "dynamic_shapes": axes, "verbose": False}
        axes = {name: {0: "batch"} for name in ("sample", "timestep", "out_sample")}
        if self.open_sizes:
            axes["sample"] |= {axis: f"size_{axis}" for axis in range(1, rank)}
        return {
            "dynamo": False,
            "dynamic_axes": axes,
            "do_constant_folding": not self.open_sizes,
        }

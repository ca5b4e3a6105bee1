"""Make the feature network of a demo: `python scripts/demo_features.py emoji --data DIR --out FOLDER`.

In: the real images that the demo's diffusion model was trained on (`--data` as for train_emoji.py; the digits
need none). Out, in `--out`:

- `features.onnx`: `images` float32 [N, C, H, W] in [-1, 1] -> `features` [N, 64] and `logits` [N, classes].
  A small convolutional classifier; the features are what its last linear layer sees.
- `features_stats.npz`: `mean` float64 [64], `cov` float64 [64, 64] and `count` of all real images, and the
  same with `_a` and `_b` for two random halves, whose distance is the real-against-real floor. Every class has
  the same weight, however many images it has: compare with samples that have equally many of each class.

Prints the accuracy on a fifth of the images, which the classifier never sees.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from train_digits import digits
from train_emoji import CLASSES, load_emoji

FEATURES = 64
OPSET = 20
SEED = 0
HELD_OUT_SHARE = 0.2
UNMIRRORED = ("flag", "clock")  # a mirrored one is not a valid one

Float64 = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Recipe:
    """How to train and augment for one data set."""

    widths: tuple[
        int, ...
    ]  # channels of the convolutions; every one but the first halves the resolution
    epochs: int
    shift: int  # largest shift, pixels
    jitter: float  # standard deviation of a gain and an offset per colour channel
    mirrored: tuple[bool, ...]  # per class: may it be mirrored?


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W] in [-1, 1] and labels int64 [N]."""

    images: Tensor
    labels: Tensor


class Classifier(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy here
    """Convolutions with batch norm and ReLU, mean over positions (the features), one linear layer."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for index, (before, after) in enumerate(zip((channels, *widths), (*widths, FEATURES))):
            stride = 1 if index == 0 else 2
            blocks += [
                nn.Conv2d(before, after, 3, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, 64] and logits [N, classes]."""
        features = self.body(images).mean(dim=(2, 3))
        return features, self.head(features)


def stratified_halves(
    labels: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices of a random `share` of every class, and of the rest."""
    first, second = [], []
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(share * len(members))
        first.append(members[:cut])
        second.append(members[cut:])
    return torch.cat(first), torch.cat(second)


def augment(images: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Small shifts (edges repeated), colour jitter per image and channel, mirrored where that is legal."""
    count, channels, height, width = images.shape
    mirrored = torch.tensor(recipe.mirrored)[labels] & (
        torch.rand(count, generator=generator) < 0.5
    )
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = nn.functional.pad(images, (recipe.shift,) * 4, mode="replicate")
    offsets = torch.randint(2 * recipe.shift + 1, (count, 2), generator=generator)
    rows = offsets[:, :1] + torch.arange(height)  # [N, H]
    columns = offsets[:, 1:] + torch.arange(width)  # [N, W]
    batch = torch.arange(count)[:, None, None]
    shifted = padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    gain = 1 + recipe.jitter * torch.randn((count, channels, 1, 1), generator=generator)
    offset = recipe.jitter * torch.randn((count, channels, 1, 1), generator=generator)
    return (shifted * gain + offset).clamp(-1, 1)


def train_classifier(train: Split, recipe: Recipe, batch: int = 64) -> Classifier:
    """Train with AdamW on a one-cycle schedule; class-weighted cross-entropy, a little label smoothing."""
    generator = torch.Generator().manual_seed(SEED)
    counts = torch.bincount(train.labels).float()
    model = Classifier(train.images.shape[1], len(counts), recipe.widths)
    steps = recipe.epochs * math.ceil(len(train.labels) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    criterion = nn.CrossEntropyLoss(
        weight=counts.rsqrt() / counts.rsqrt().mean(), label_smoothing=0.05
    )
    for _ in range(recipe.epochs):
        for picked in torch.randperm(len(train.labels), generator=generator).split(batch):
            labels = train.labels[picked]
            _, logits = model(augment(train.images[picked], labels, recipe, generator))
            optimizer.zero_grad()
            criterion(logits, labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return model


def class_weights(labels: Tensor) -> Float64:
    """Weights float64 [N] that sum to 1 and give every class the same total."""
    counts = torch.bincount(labels).double()
    weights: Float64 = (1 / (counts[labels] * len(counts))).numpy()
    return weights


def feature_stats(features: Float64, labels: Tensor) -> tuple[Float64, Float64]:
    """Class-balanced mean [D] and unbiased covariance [D, D] of features [N, D]."""
    weights = class_weights(labels)
    mean: Float64 = weights @ features
    centred = features - mean
    covariance: Float64 = (centred * weights[:, None]).T @ centred / (1 - np.square(weights).sum())
    return mean, covariance


def export_onnx(model: Classifier, example: Tensor, path: Path) -> None:
    """Write the classifier with a free batch size, without the metadata that names files of this machine."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["features", "logits"],
        dynamic_shapes={"images": {0: batch}},
        verbose=False,
    )
    proto = program.model_proto
    graph = proto.graph
    for item in (
        proto,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.ClearField("value_info")
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def write_stats(features: Float64, labels: Tensor, path: Path) -> None:
    """Statistics of all images and of two random halves with equal shares of every class."""
    halves = stratified_halves(labels, 0.5, torch.Generator().manual_seed(SEED))
    arrays: dict[str, Any] = {}
    parts = {"": torch.arange(len(labels)), "_a": halves[0], "_b": halves[1]}
    for suffix, indices in parts.items():
        mean, covariance = feature_stats(features[indices.numpy()], labels[indices])
        arrays |= {
            f"mean{suffix}": mean,
            f"cov{suffix}": covariance,
            f"count{suffix}": np.int64(len(indices)),
        }
    np.savez(path, **arrays)


def data_and_recipe(name: str, data: Path | None) -> tuple[Split, Recipe]:
    """The real images of a demo, and how to train on them."""
    if name == "digits":
        images, labels = digits()
        return Split(images, labels), Recipe((24, 48), 60, 1, 0.05, (False,) * 10)
    if data is None:
        raise SystemExit(
            "emoji needs --data: the folder with the two unpacked npm packages, see train_emoji.py"
        )
    mirrored = tuple(emoji_class.name not in UNMIRRORED for emoji_class in CLASSES)
    images, labels = load_emoji(data)
    return Split(images, labels), Recipe((16, 32, 64), 300, 2, 0.15, mirrored)


def main() -> None:
    """Train, measure on the held-out fifth, export, and write the statistics of the real images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("emoji", "digits"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    real, recipe = data_and_recipe(options.name, options.data)
    held_out, kept = stratified_halves(
        real.labels, HELD_OUT_SHARE, torch.Generator().manual_seed(SEED)
    )
    model = train_classifier(Split(real.images[kept], real.labels[kept]), recipe)
    with torch.no_grad():
        features, logits = model(real.images)
    correct = logits.argmax(1) == real.labels
    options.out.mkdir(parents=True, exist_ok=True)
    export_onnx(model, real.images[:2], options.out / "features.onnx")
    write_stats(features.double().numpy(), real.labels, options.out / "features_stats.npz")
    per_class = [
        float(correct[held_out][real.labels[held_out] == c].float().mean())
        for c in range(logits.shape[1])
    ]
    report = {
        "held_out_images": len(held_out),
        "held_out_accuracy": round(float(correct[held_out].float().mean()), 4),
        "held_out_accuracy_per_class": [round(value, 3) for value in per_class],
        "train_accuracy": round(float(correct[kept].float().mean()), 4),
        "onnx_bytes": (options.out / "features.onnx").stat().st_size,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

"""Train the bundled 8x8 digits model: `python scripts/train_digits.py --minutes 6 --out DIR`.

Data: scikit-learn's `load_digits` (1,797 grey images of 8x8 pixels, 10 classes), part of that package.
The result, `DIR/pipeline`, is what lies in mpq_deploy/models/demo/digits. With `--network transformer` a small DiT is
trained instead, for benchmarks on a trained model of another kind.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from demo_training import DemoCard, Network, Trainer, TrainSettings
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor

DATA = "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, test part), 1,797 images"
MAX_GREY = 16.0  # load_digits counts ink in 4x4 cells: 0 to 16


def digits() -> tuple[Tensor, Tensor]:
    """Images float32 [1797, 1, 8, 8] in [-1, 1] and labels int64 [1797]."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return images / MAX_GREY * 2 - 1, torch.tensor(labels, dtype=torch.int64)


def digits_unet() -> UNet2DModel:
    """Three levels (8, 4 and 2 pixels), attention on the lower two."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=10,
    )


def digits_transformer() -> DiTTransformer2DModel:
    """Six blocks of four heads over patches of 2x2 pixels."""
    return DiTTransformer2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        patch_size=2,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )


NETWORKS: dict[str, Callable[[], Network]] = {
    "unet": digits_unet,
    "transformer": digits_transformer,
}


def digits_scheduler() -> DDIMScheduler:
    """Cosine noise schedule, velocity prediction, 20 steps that begin at the last timestep."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0, help="wall-clock minutes to train")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and the pipeline"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    options = parser.parse_args()
    settings = TrainSettings(
        minutes=options.minutes,
        batch=64,
        seed=options.seed,
        ema_decay=0.998,
        checkpoint_minutes=1.0,
    )
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    arguments = f"--minutes {options.minutes:g} --seed {options.seed}"
    if options.network != "unet":
        arguments = f"--network {options.network} {arguments}"
    card = DemoCard(
        name="digits" if options.network == "unet" else f"digits-{options.network}",
        classes=tuple(str(digit) for digit in range(10)),
        licence="CC-BY-4.0",
        data=DATA,
        command=f"python scripts/train_digits.py {arguments} --out DIR",
    )
    trainer = Trainer(NETWORKS[options.network](), digits_scheduler(), settings, card, options.out)
    trainer.resume()
    images, labels = digits()
    trainer.run(images, labels)


if __name__ == "__main__":
    main()

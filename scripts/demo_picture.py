"""Draw samples of a demo: `python scripts/demo_picture.py --demo FOLDER --out docs/images/demo_samples.png`.

In: a demo folder (a diffusers pipeline folder with demo.json). Out: a PNG with one row per class, its name at the
left, every sample enlarged without smoothing; all samples are consecutive draws from one seed, none is picked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from demo_training import SAMPLE_STEPS, sample
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LABEL_WIDTH = 120  # pixels
GAP = 4  # pixels between tiles
FONT_SIZE = 16


def load_demo(folder: Path) -> tuple[UNet2DModel, DDIMScheduler, list[str]]:
    """The UNet in float32, its scheduler and the names of its classes."""
    unet = UNet2DModel.from_pretrained(
        folder / "unet", use_safetensors=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    classes = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["classes"]
    return unet, scheduler, list(classes)


def tile(image: Tensor, zoom: int) -> Image.Image:
    """One image [C, H, W] in [-1, 1], enlarged `zoom` times."""
    pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).convert("RGB")
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def labelled_rows(images: Tensor, names: list[str], zoom: int) -> Image.Image:
    """Images [len(names) * columns, C, H, W], one row per name."""
    columns = len(images) // len(names)
    step = images.shape[-1] * zoom + GAP
    canvas = Image.new(
        "RGB", (LABEL_WIDTH + columns * step + GAP, len(names) * step + GAP), "white"
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for row, name in enumerate(names):
        draw.text(
            (LABEL_WIDTH - 12, GAP + row * step + step // 2),
            name,
            fill="black",
            font=font,
            anchor="rm",
        )
        for column in range(columns):
            picture = tile(images[row * columns + column], zoom)
            canvas.paste(picture, (LABEL_WIDTH + GAP + column * step, GAP + row * step))
    return canvas


def main() -> None:
    """Sample and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, required=True, help="demo folder")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--zoom", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=SAMPLE_STEPS)
    options = parser.parse_args()
    unet, scheduler, names = load_demo(options.demo)
    labels = torch.arange(len(names)).repeat_interleave(options.columns)
    images = sample(unet, scheduler, labels, options.seed, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    labelled_rows(images, names, options.zoom).save(options.out, optimize=True)


if __name__ == "__main__":
    main()

"""Train the bundled 32x32 emoji model: `python scripts/train_emoji.py --data DIR --minutes 90 --out OUT`.

Data: two npm packages, unpacked side by side (`npm pack NAME@16.0.0`, then unpack into a folder NAME-16.0.0):

    DIR/emoji-datasource-google-16.0.0/package    Noto Emoji images, Apache-2.0
    DIR/emoji-datasource-twitter-16.0.0/package   Twemoji images, CC BY 4.0

From the 64x64 PNGs, eight visually homogeneous classes are chosen by subcategory and short name, put on white
and reduced to 32x32. The result, `OUT/pipeline`, is what lies in mpq_deploy/models/demo/emoji. Run again
with the same `--out` to go on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_training import DemoCard, Trainer, TrainSettings
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

VENDORS = ("google", "twitter")
DATA_VERSION = "16.0.0"
IMAGE_SIZE = 32
DATA = "npm emoji-datasource-google 16.0.0 (Noto Emoji), emoji-datasource-twitter 16.0.0 (Twemoji), at 32x32"

Entry = dict[str, Any]  # one entry of emoji.json
Image32 = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class EmojiClass:
    """A class of the demo: which entries of emoji.json belong to it, and from which vendors."""

    name: str
    contains: Callable[[Entry], bool]
    vendors: tuple[str, ...] = VENDORS


def of(*subcategories: str) -> Callable[[Entry], bool]:
    """Entries of any of these subcategories."""
    return lambda entry: entry["subcategory"] in subcategories


def named(names: str) -> Callable[[Entry], bool]:
    """Entries with one of these short names (separated by blanks)."""
    wanted = set(names.split())
    return lambda entry: entry["short_name"] in wanted


ANIMAL_FACES = """mouse cow tiger rabbit cat horse monkey_face dog pig hamster wolf polar_bear bear
panda_face koala lion_face unicorn_face fox_face raccoon frog hatching_chick baby_chick owl see_no_evil
hear_no_evil speak_no_evil"""
FRUIT = """tomato grapes melon watermelon tangerine lime lemon banana pineapple apple green_apple pear peach
cherries strawberry kiwifruit coconut mango blueberries olive"""
CLOCKS = " ".join(f"clock{hour} clock{hour}30" for hour in range(1, 13))
MOONS = """new_moon waxing_crescent_moon first_quarter_moon moon full_moon waning_gibbous_moon
last_quarter_moon waning_crescent_moon crescent_moon new_moon_with_face full_moon_with_face sun_with_face"""
HEARTS = """blue_heart green_heart yellow_heart purple_heart black_heart white_heart brown_heart
orange_heart light_blue_heart grey_heart pink_heart heart broken_heart two_hearts sparkling_heart heartpulse
cupid gift_heart revolving_hearts heart_on_fire mending_heart"""

CLASSES = (
    EmojiClass(
        "flag", of("country-flag"), vendors=("twitter",)
    ),  # Google's wave; flat ones are homogeneous
    EmojiClass("happy face", of("face-smiling", "face-affection", "face-tongue", "face-glasses")),
    EmojiClass("sad face", of("face-concerned", "face-neutral-skeptical", "face-sleepy")),
    EmojiClass("heart", named(HEARTS)),
    EmojiClass("animal", named(ANIMAL_FACES)),
    EmojiClass("clock", named(CLOCKS)),
    EmojiClass("moon", named(MOONS)),
    EmojiClass("fruit", named(FRUIT)),
)


def read_image(path: Path) -> Image32:
    """A PNG with alpha on white, reduced with antialiasing: float32 [3, 32, 32] in [-1, 1]."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    small = white.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels: Image32 = np.asarray(small, np.float32).transpose(2, 0, 1) / np.float32(
        127.5
    ) - np.float32(1)
    return pixels


def load_emoji(data: Path) -> tuple[Tensor, Tensor]:
    """Images float32 [N, 3, 32, 32] in [-1, 1] and labels int64 [N]: Google's classes, then Twitter's."""
    pixels, labels = [], []
    for vendor in VENDORS:
        package = data / f"emoji-datasource-{vendor}-{DATA_VERSION}" / "package"
        entries: list[Entry] = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
        for label, emoji_class in enumerate(CLASSES):
            if vendor not in emoji_class.vendors:
                continue
            for entry in entries:
                if entry[f"has_img_{vendor}"] and emoji_class.contains(entry):
                    pixels.append(read_image(package / "img" / vendor / "64" / entry["image"]))
                    labels.append(label)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels, dtype=torch.int64)


def emoji_unet() -> UNet2DModel:
    """Four levels (32 to 4 pixels), attention on the lower two with heads of 32 channels, 3.8 M weights."""
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=len(CLASSES),
    )


def emoji_scheduler() -> DDIMScheduler:
    """Linear betas, velocity prediction, 20 steps that begin at the last timestep."""
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with the two unpacked packages"
    )
    parser.add_argument("--minutes", type=float, default=90.0, help="wall-clock minutes to train")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and the pipeline"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = TrainSettings(minutes=options.minutes, batch=options.batch, seed=options.seed)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    arguments = f"--minutes {options.minutes:g} --batch {options.batch} --seed {options.seed}"
    card = DemoCard(
        name="emoji",
        classes=tuple(emoji_class.name for emoji_class in CLASSES),
        licence="Apache-2.0 AND CC-BY-4.0",
        data=DATA,
        command=f"python scripts/train_emoji.py --data DIR {arguments} --out DIR",
    )
    trainer = Trainer(emoji_unet(), emoji_scheduler(), settings, card, options.out)
    trainer.resume()
    images, labels = load_emoji(options.data)
    trainer.run(images, labels)


if __name__ == "__main__":
    main()

"""Train, sample and export the small class-conditional diffusion models that are bundled as demos.

In: images float32 [N, C, H, W] in [-1, 1] with labels int64 [N], a UNet2DModel or a DiTTransformer2DModel, a
DDIMScheduler and `TrainSettings`. Out: in the output folder `state.pt` (resumable; stays with whoever trains),
`losses.csv`, `grid_<minutes>.png` and `pipeline/`, a diffusers pipeline folder with the averaged weights in FP16.

The learning rate follows the clock, not a step count: it has decayed to its floor when the time budget ends,
however loaded the machine is.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from PIL import Image
from torch import Tensor

SAMPLE_STEPS = 20  # the number of DDIM steps the demo is meant for
WARM_UP_STEPS = 200
LOSS_WINDOW = 200  # steps over which the reported loss is averaged
Network = UNet2DModel | DiTTransformer2DModel


@dataclass(frozen=True)
class TrainSettings:
    """How long and how to train; recorded in demo.json."""

    minutes: float
    batch: int = 64
    lr: float = 1e-3
    lr_floor: float = 1e-5
    ema_decay: float = 0.999
    seed: int = 0
    bf16: bool = True
    threads: int = 1
    checkpoint_minutes: float = 3.0


@dataclass(frozen=True)
class DemoCard:
    """What demo.json says besides the training record."""

    name: str
    classes: tuple[str, ...]
    licence: str
    data: str
    command: str


class Ema:
    """Exponential moving average of a module's parameters, with a short memory at the start."""

    def __init__(self, model: Network, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {
            k: v.detach().clone() for k, v in model.state_dict().items()
        }

    def update(self, model: Network, step: int) -> None:
        """Move the average towards the model's weights after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                self.shadow[name].lerp_(value, 1 - decay)


def learning_rate(settings: TrainSettings, step: int, progress: float) -> float:
    """Linear warm-up in steps, cosine decay in `progress` (share of the time budget used, 0 to 1)."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    lr = settings.lr_floor + (settings.lr - settings.lr_floor) * cosine
    return lr * min(1.0, (step + 1) / WARM_UP_STEPS)


def stratified_timesteps(batch: int, train_timesteps: int, generator: torch.Generator) -> Tensor:
    """One timestep per equal slice of the range, in random order: int64 [batch]. Less noisy losses."""
    positions = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    timesteps = (positions * train_timesteps).long().clamp(max=train_timesteps - 1)
    return timesteps[torch.randperm(batch, generator=generator)]


def balanced_batch(by_class: list[Tensor], batch: int, generator: torch.Generator) -> Tensor:
    """Indices int64 [batch]: half uniform over images, half over classes, so that small classes count."""
    everything = torch.cat(by_class)
    uniform = everything[torch.randint(len(everything), (batch - batch // 2,), generator=generator)]
    classes = torch.randint(len(by_class), (batch // 2,), generator=generator)
    picked = [
        by_class[c][torch.randint(len(by_class[c]), (), generator=generator)]
        for c in classes.tolist()
    ]
    return torch.cat([uniform, torch.stack(picked)]) if picked else uniform


def sample(
    unet: Network,
    scheduler: DDIMScheduler,
    labels: Tensor,
    seed: int,
    steps: int = SAMPLE_STEPS,
) -> Tensor:
    """Deterministic DDIM samples, float32 [len(labels), C, H, W] in [-1, 1]."""
    unet.eval()
    size, channels = int(unet.config["sample_size"]), int(unet.config["in_channels"])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((len(labels), channels, size, size), generator=generator)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            output = unet(x, timestep.expand(len(x)), class_labels=labels).sample
        x = scheduler.step(output, timestep, x).prev_sample
    return x.clamp(-1, 1)


def grid_image(images: Tensor, columns: int, zoom: int, gap: int = 1) -> Image.Image:
    """Images [N, C, H, W] in [-1, 1], `columns` a row, enlarged `zoom` times without smoothing."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 128, np.uint8
    )
    for index, tile in enumerate(pixels):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    picture = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def export_pipeline(
    unet: Network,
    weights: dict[str, Tensor],
    scheduler: DDIMScheduler,
    card: dict[str, Any],
    out: Path,
) -> Network:
    """Write a pipeline folder with FP16 weights and demo.json; returns the FP16-rounded network in float32.

    No pipeline of diffusers takes a transformer without a VAE: its folder has the parts alone.
    """
    rounded = type(unet).from_config(dict(unet.config))
    rounded.load_state_dict(weights)
    if isinstance(rounded, UNet2DModel):
        DDIMPipeline(rounded.half(), scheduler).save_pretrained(out, safe_serialization=True)
    else:
        rounded.half().save_pretrained(out / "transformer", safe_serialization=True)
        scheduler.save_pretrained(out / "scheduler")
        parts = {
            "_class_name": "DiffusionPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
        }
        (out / "model_index.json").write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    (out / "demo.json").write_text(
        json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    result: Network = rounded.float()
    return result


class Trainer:
    """The training loop and its state; `run` trains until the time budget is used."""

    def __init__(
        self,
        unet: Network,
        scheduler: DDIMScheduler,
        settings: TrainSettings,
        card: DemoCard,
        out: Path,
    ) -> None:
        self.unet, self.scheduler, self.settings, self.card, self.out = (
            unet,
            scheduler,
            settings,
            card,
            out,
        )
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.99)
        )
        self.ema = Ema(unet, settings.ema_decay)
        self.step = 0
        self.wall_s = 0.0
        self.cpu_s = 0.0
        self.losses: list[float] = []
        self.generator = torch.Generator().manual_seed(settings.seed)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of the predicted noise or velocity, whichever the scheduler says."""
        train_timesteps = int(self.scheduler.config["num_train_timesteps"])
        timesteps = stratified_timesteps(len(images), train_timesteps, self.generator)
        noise = torch.randn(images.shape, generator=self.generator)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        velocity = self.scheduler.config["prediction_type"] == "v_prediction"
        target = self.scheduler.get_velocity(images, noise, timesteps) if velocity else noise
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            output = self.unet(noisy, timesteps, class_labels=labels).sample
        return torch.nn.functional.mse_loss(output.float(), target)

    def train_step(self, images: Tensor, labels: Tensor, progress: float) -> float:
        """One optimizer step on a batch; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step, progress)
        loss = self.loss(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.unet, self.step)
        return float(loss.detach())

    def run(self, images: Tensor, labels: Tensor) -> None:
        """Train on images [N, C, H, W] with labels [N] for `settings.minutes` of wall-clock time."""
        by_class = [torch.nonzero(labels == c).flatten() for c in range(len(self.card.classes))]
        budget_s, saved_at = self.settings.minutes * 60, self.wall_s
        self.unet.train()
        while self.wall_s < budget_s:
            started, started_cpu = time.monotonic(), time.process_time()
            picked = balanced_batch(by_class, self.settings.batch, self.generator)
            loss = self.train_step(images[picked], labels[picked], self.wall_s / budget_s)
            self.losses.append(loss)
            if self.wall_s - saved_at >= self.settings.checkpoint_minutes * 60:
                self.checkpoint()
                saved_at = self.wall_s
            self.wall_s += time.monotonic() - started
            self.cpu_s += time.process_time() - started_cpu
        self.checkpoint()

    def record(self) -> dict[str, Any]:
        """What demo.json says: identity, classes, and how far the training has come."""
        card = asdict(self.card)
        command = card.pop("command")
        trained = {
            **asdict(self.settings),
            "minutes_planned": self.settings.minutes,
            "minutes": round(self.wall_s / 60, 1),
            "cpu_minutes": round(self.cpu_s / 60, 1),
            "steps": self.step,
            "final_loss": round(float(np.mean(self.losses[-LOSS_WINDOW:])), 5),
            "command": command,
        }
        return {
            **card,
            "image_size": int(self.unet.config["sample_size"]),
            "channels": int(self.unet.config["in_channels"]),
            "pixel_range": [-1, 1],
            "guidance": 1.0,
            "sample_steps": SAMPLE_STEPS,
            "trained": trained,
        }

    def checkpoint(self, per_class: int = 6) -> None:
        """Save the state, the pipeline folder and a grid of samples from the FP16-rounded average."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "unet": self.unet.state_dict(),
            "ema": self.ema.shadow,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "progress": {
                "step": self.step,
                "wall_s": self.wall_s,
                "cpu_s": self.cpu_s,
                "losses": self.losses,
            },
        }
        torch.save(state, self.out / "state.tmp")
        (self.out / "state.tmp").replace(self.out / "state.pt")
        unet = export_pipeline(
            self.unet, self.ema.shadow, self.scheduler, self.record(), self.out / "pipeline"
        )
        labels = torch.arange(len(self.card.classes)).repeat_interleave(per_class)
        grid = grid_image(sample(unet, self.scheduler, labels, seed=0), per_class, zoom=2)
        grid.save(self.out / f"grid_{self.wall_s / 60:05.1f}.png")
        rows = [f"{i},{value:.5f}" for i, value in enumerate(self.losses)]
        (self.out / "losses.csv").write_text(
            "step,loss\n" + "\n".join(rows) + "\n", encoding="utf-8"
        )

    def resume(self) -> bool:
        """Continue from `state.pt` in the output folder; False where there is none."""
        path = self.out / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.ema.shadow = state["ema"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        progress = state["progress"]
        self.step, self.wall_s, self.cpu_s = progress["step"], progress["wall_s"], progress["cpu_s"]
        self.losses = progress["losses"]
        return True

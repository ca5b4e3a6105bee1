"""Make what all tools are given: the UNet with random weights, one ONNX file, and the calibration and held-out inputs.

    python prepare.py unet FOLDER          a diffusers folder (needs the torch extra)
    python prepare.py inputs RUN FOLDER    model.onnx and inputs.npz, from a run folder calibrated by mpq-deploy

In inputs.npz every entry is one input of one call of batch 1, named SPLIT/NUMBER/INPUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

CHANNELS = (64, 128, 192, 256)
HELD_OUT, HELD_OUT_SEED = 8, 4321


def save_unet(folder: Path) -> None:
    """Save a UNet2DModel of 21 M parameters, 32x32, attention on two levels, weights as torch draws them at seed 0."""
    import torch
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    unet.save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters", file=sys.stderr)


def save_inputs(run: Path, folder: Path) -> None:
    """Write the exported model as one file, the calls it was calibrated on, and calls of fresh trajectories."""
    import onnx

    from mpq_deploy.calls.loop import GuidedDenoiser
    from mpq_deploy.calls.recorded import CallSet, RecordedCalls
    from mpq_deploy.calls.sampler import make_sampler
    from mpq_deploy.calls.trajectories import record_trajectories
    from mpq_deploy.models.export import load_exported
    from mpq_deploy.recipe import CalibrateSettings, load_recipe
    from mpq_deploy.run.view import CALLS
    from mpq_deploy.runtime.ort import OrtDenoiser
    from mpq_deploy.system.progress import Talk

    exported = load_exported(run / "export")
    spec, conditions = exported.spec, dict(exported.conditions.arrays)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.load(exported.model), folder / "model.onnx")
    section = load_recipe(run / "recipe.yaml").calibrate
    options = CalibrateSettings(
        timesteps=section.steps,
        samples=HELD_OUT,
        steps=section.steps,
        seed=HELD_OUT_SEED,
        batch_size=8,
    )
    sampler = make_sampler(spec.scheduler, section.steps, HELD_OUT_SEED)
    fresh = record_trajectories(
        GuidedDenoiser(OrtDenoiser(exported.model, spec), spec, conditions),
        sampler,
        options,
        Talk(),
    )
    recorded = CallSet.load(run / "calibrate" / CALLS)
    every = [
        (step, call) for step in range(len(recorded.timesteps)) for call in range(recorded.count)
    ]
    # A step of its own, drawn at random, for each held-out sample.
    drawn = np.random.default_rng(HELD_OUT_SEED).integers(0, len(fresh.timesteps), HELD_OUT)
    picked = {
        "calibration": (recorded, every),
        "heldout": (fresh, [(int(s), n) for n, s in enumerate(drawn)]),
    }
    arrays = {}
    for split, (calls, places) in picked.items():
        for number, (step, call) in enumerate(places):
            feed = RecordedCalls(calls, spec).feed(step, slice(call, call + 1))
            arrays |= {f"{split}/{number}/{name}": value for name, value in feed.items()}
    np.savez(folder / "inputs.npz", **arrays)
    print(f"{len(every)} calibration inputs, {HELD_OUT} held out", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1] == "unet":
        save_unet(Path(sys.argv[2]))
    else:
        save_inputs(Path(sys.argv[2]), Path(sys.argv[3]))

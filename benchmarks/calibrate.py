"""What observers cost: the same forward passes with and without them, and memory at 1x and 8x the samples.

    python benchmarks/calibrate.py [EXPORT ...]     folders that `mpq-deploy export` wrote

Without folders, two UNet2DModels with random weights (about 4 and 22 M parameters, 32x32) are exported first, which
needs torch and diffusers. Every measurement has a process of its own; times are CPU seconds on one thread, the least
of three, session start included (bare: one session; observed: one for shapes and one that observes).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mpq_deploy.calibrate.observers import observe
from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.graph.layers import layer_graph
from mpq_deploy.graph.load import load_model
from mpq_deploy.models.export import export_denoiser, load_exported
from mpq_deploy.recipe import CalibrateSettings
from mpq_deploy.system.progress import Talk
from mpq_deploy.system.sessions import open_session
from mpq_deploy.system.threads import RUNTIME_THREADS

WIDTHS = {"4 M": (32, 64, 96, 128), "22 M": (64, 128, 192, 256)}
TIMESTEPS, SAMPLES, REPEATS = 10, 16, 3
LIMIT = 1.4


def export_unet(channels: tuple[int, ...], folder: Path) -> None:
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    from mpq_deploy.models.open import open_denoiser

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    unet.save_pretrained(folder / "source" / "unet")
    DDPMScheduler().save_pretrained(folder / "source" / "scheduler")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (folder / "source" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "export").mkdir()
    export_denoiser(open_denoiser(str(folder / "source")), folder / "export", Talk())


def measure(folder: Path, mode: str, samples: int) -> dict[str, float]:
    exported = load_exported(folder)
    graph, conditions = layer_graph(load_model(exported.model)), dict(exported.conditions.arrays)
    rng = np.random.default_rng(0)
    shape = (TIMESTEPS, samples, *exported.spec.sample.shape)
    rows = np.arange(samples) % min((len(v) for v in conditions.values()), default=1)
    steps = np.linspace(950, 50, TIMESTEPS, dtype=np.float32)
    samples = rng.standard_normal(shape, np.float32)
    recorded = CallSet.of_samples(exported.spec, samples, steps, rows, conditions)
    calls = RecordedCalls(recorded, exported.spec)
    settings = CalibrateSettings(batch_size=8, reservoir=4096)
    started = time.process_time()
    if mode == "bare":
        with open_session(graph.model.clone(), Talk(), scratch=folder) as session:
            for batch in calls.batches(settings.batch_size):
                session.run(None, batch.feed)
    else:
        observe(graph, calls, settings, Talk(), scratch=folder)
    seconds = time.process_time() - started
    return {"seconds": seconds, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def child(folder: Path, mode: str, samples: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", mode, "--samples", str(samples), str(folder)]
    one_thread = {**os.environ, RUNTIME_THREADS: "1"}
    result = subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", env=one_thread
    )
    return dict(json.loads(result.stdout))


def report(label: str, folder: Path) -> bool:
    # Taken in turns, so that a busier machine slows both alike.
    rounds = [
        {mode: child(folder, mode, SAMPLES) for mode in ("bare", "observed")}
        for _ in range(REPEATS)
    ]
    runs = {mode: [one[mode] for one in rounds] for mode in ("bare", "observed")}
    bare, observed = (min(run["seconds"] for run in runs[mode]) for mode in ("bare", "observed"))
    once, eight = runs["observed"][0]["rss"], child(folder, "observed", 8 * SAMPLES)["rss"]
    # The recorded inputs themselves are handed in, and do grow.
    inputs = 7 * SAMPLES * TIMESTEPS * 4 * np.prod(load_exported(folder).spec.sample.shape) / 2**20
    print(
        f"{label:>12} {bare:8.2f} {observed:10.2f} {observed / bare:7.2f} {once:9.0f} {eight:9.0f} {inputs:14.0f}"
    )
    return bool(observed / bare <= LIMIT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("exports", nargs="*", type=Path)
    parser.add_argument("--measure", choices=("bare", "observed"), help=argparse.SUPPRESS)
    parser.add_argument("--export", choices=WIDTHS, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.exports[0], chosen.measure, chosen.samples)))
        return
    if chosen.export:
        export_unet(WIDTHS[chosen.export], chosen.exports[0])
        return
    with tempfile.TemporaryDirectory() as scratch:
        cases = {folder.name: folder for folder in chosen.exports}
        for label in [] if cases else WIDTHS:
            place = Path(scratch) / label.replace(" ", "")
            place.mkdir()
            # In a process of its own: a child's peak memory counts from that of its parent.
            command = [sys.executable, __file__, "--export", label, str(place)]
            subprocess.run(command, check=True, capture_output=True)
            cases[label] = place / "export"
        print(
            f"{'model':>12} {'bare s':>8} {'observed s':>10} {'ratio':>7} {'MiB 1x':>9} {'MiB 8x':>9} "
            f"{'of it inputs':>14}"
        )
        within = [report(label, folder) for label, folder in cases.items()]
    if not all(within):
        sys.exit(f"the observers cost more than {LIMIT} times the bare passes")


if __name__ == "__main__":
    main()

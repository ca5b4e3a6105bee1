"""A k-diffusion model that others trained, from calls recorded around its own generator to a verified engine.

    python benchmarks/recorded.py --page docs/results/recorded.md

The model is the UNet of the package adaptive-terrain-diffusion (10.46 M parameters, ONNX, opset 18): D(x, sigma) with
its preconditioning inside, 128 x 128 height maps, a difficulty as a condition. The wheel is fetched by pip into the
working folder and only its generator is imported. The generator makes the calls: new terrains in one step at sigma 80,
and variations of them at three lower noise levels; ``mpq_deploy.record`` listens to its ONNX Runtime session.
Compared by the generator itself and by ONNX Runtime: terrains from other seeds, of the float file and of the quantized
graph in FP32 arithmetic (the engine computes in FP16 and has not run on a GPU).
Checked: the engine is verified, and at each budget the terrains are closer to float than everything-INT8's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from table import Page, bench_parser, markdown, verdict

import mpq_deploy
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED

PACKAGE = "adaptive-terrain-diffusion==0.4.2"
# Strengths of variations: noise levels of about 24, 5.8 and 0.66.
STRENGTHS, SIGMAS = (0.886, 0.752, 0.547), ("80", "24", "5.8", "0.66")
RUNS, COMPARED = 10, 8
SETTINGS: dict[str, Any] = {
    "calibrate.timesteps": 4,
    "calibrate.batch_size": 4,
    "calibrate.observed": 8,
    "measure.timesteps": 4,
    "measure.samples": 4,
    "measure.calls": 2,
    "measure.batch_size": 2,
    "quantize.noise_draws": 0,
    "engine.batch_max": 2,
    "evaluate.timesteps": 4,
    "evaluate.batch_size": 4,
}


def fetched(folder: Path) -> Any:
    """The package's generator, from its wheel unpacked in ``folder``."""
    if not (folder / "package").is_dir():
        fetch = (sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE)
        subprocess.run((*fetch, "-d", str(folder)), check=True)
        (wheel,) = folder.glob("*.whl")
        subprocess.run(
            (sys.executable, "-m", "zipfile", "-e", wheel, folder / "package"), check=True
        )
    sys.path.insert(0, str(folder / "package"))
    from terrain_diffusion.generator import TerrainGenerator  # type: ignore[import-not-found]

    return TerrainGenerator(device="cpu")


def outputs(generator: Any, seed: int) -> list[np.ndarray]:
    """What the model gives along a chain from sigma 80 down, for one label: [1, 1, 128, 128] each."""
    rng = np.random.default_rng(seed)
    labels, _ = generator._difficulty_labels(1 + 97 * seed % 100, 1, rng)
    found = [generator._sample_native(labels, generator=rng)]
    for strength in STRENGTHS:
        source = np.clip(found[-1], -1, 1)
        found.append(
            generator._sample_native(labels, generator=rng, sources=source, strength=strength)
        )
    return found


def sqnr(generator: Any, session: ort.InferenceSession) -> list[float]:
    """SQNR in dB of a session's outputs at each noise level, on the inputs of the float chain."""
    expected: list[list[np.ndarray]] = [[] for _ in range(1 + len(STRENGTHS))]
    found: list[list[np.ndarray]] = [[] for _ in expected]
    original = generator._denoise
    level = 0

    def both(*given: np.ndarray) -> np.ndarray:
        nonlocal level
        names = ("noisy", "sigma", "difficulty")
        float_output: np.ndarray = original(*given)
        feeds = dict(zip(names, given, strict=True))
        expected[level].append(float_output)
        found[level].append(session.run(["denoised"], feeds)[0])
        level = (level + 1) % len(expected)
        return float_output

    generator._denoise = both
    try:
        for seed in range(1000, 1000 + COMPARED):
            outputs(generator, seed)
    finally:
        del generator._denoise
    pairs = [(np.stack(a), np.stack(b)) for a, b in zip(expected, found, strict=True)]
    return [float(10 * np.log10(np.square(a).sum() / np.square(b - a).sum())) for a, b in pairs]


def session_of(graph: Path) -> ort.InferenceSession:
    """The graph in ONNX Runtime, Q/DQ pairs as they are written."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(graph, options)


def main() -> None:
    """Run the benchmark."""
    parser = bench_parser(__doc__)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.30, 0.35, 0.50])
    parser.add_argument("--keep", type=Path, help="work here, and go on from what is there")
    chosen = parser.parse_args()
    page = Page("A k-diffusion model that others trained, from recorded calls to an engine")
    with tempfile.TemporaryDirectory() as aside:
        folder = chosen.keep or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        generator = fetched(folder)
        calls = folder / "calls"
        if not calls.is_dir():
            with mpq_deploy.record(generator.session, calls):
                for seed in range(RUNS):
                    outputs(generator, seed)
        page.say(
            f"{PACKAGE} (MIT), 10.46 M parameters, weights that are not ours. Its activations reach 1e10: a "
            "third of its layers read values that FP16 does not hold, so those compute in FP32, on quantized weights "
            "(and are stored in the engine with FP32 biases and scales)."
        )
        rows, checks = build_all(page, generator, folder, chosen.budgets)
        header = [
            "",
            "bytes",
            "of FP16",
            "engine's weight bytes",
            *(f"SQNR at {sigma}" for sigma in SIGMAS),
        ]
        page.say(
            "SQNR of the output in dB at "
            f"each noise level, over {COMPARED} chains from other seeds than the recorded {RUNS}; FP32 arithmetic on "
            "the quantized integers and scales, in ONNX Runtime."
        )
        page.say(markdown(header, rows))
        page.conclude(checks, chosen.page)


def build_all(
    page: Page, generator: Any, folder: Path, budgets: Sequence[float]
) -> tuple[list[list[str]], list[tuple[bool, str]]]:
    """Return a row per budget and control, and the checks."""
    rows, checks, ours = [], [], {}
    run = folder / "run"
    for budget in budgets:
        settings = {**SETTINGS, "calls": str(folder / "calls")}
        made = mpq_deploy.build(generator.model_path, budget=budget, out=run, settings=settings)
        report, engine = made.report, made.report["engine"]
        ours[budget] = sqnr(generator, session_of(run / "quantize" / SIMULATED))
        verified = bool(engine and engine["verified"])
        said = f"verified, {engine['weights_bytes']:,}" if verified else "refused"
        rows.append(row(f"ours at {budget:g}", report["size_bytes"], report, said, ours[budget]))
        what = f"the engine at {budget:g} is what was planned"
        checks.append((verified, verdict(verified, what, said)))
        page.say(
            f"At {budget:g}: {next(n for n in report['notes'] if 'FP16 arithmetic' in n or 'in FP16' in n)}"
        )
    for control in ("int8", "int4"):
        values = sqnr(generator, session_of(run / "controls" / control / SIMULATED))
        size = report["controls"][control]["size_bytes"]
        rows.append(row(f"everything {control.upper()}", size, report, "", values))
        if control == "int8":
            for budget, found in ours.items():
                closer = all(mine > theirs for mine, theirs in zip(found, values, strict=True))
                what = f"at {budget:g} closer to float than everything INT8 at every noise level"
                least = f"{min(a - b for a, b in zip(found, values, strict=True)):.1f} dB at least"
                checks.append((closer, verdict(closer, what, least)))
    return rows, checks


def row(
    name: str, size: int, report: dict[str, Any], engine: str, values: Sequence[float]
) -> list[str]:
    """A row of the table."""
    share = f"{size / report['fp16_size_bytes']:.4f}"
    return [name, f"{size:,}", share, engine, *(f"{value:.1f}" for value in values)]


if __name__ == "__main__":
    main()

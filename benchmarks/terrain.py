"""A k-diffusion model that others trained, from calls recorded around its own generator to a verified engine.

    python benchmarks/terrain.py --page docs/results/terrain.md
    python benchmarks/terrain.py --onnxsim-python VENV/bin/python --modelopt-python VENV/bin/python

The model is the UNet of the package adaptive-terrain-diffusion (10.46 M parameters, ONNX, opset 18): D(x, sigma) with
its preconditioning inside, 128 x 128 height maps, a difficulty as a condition. The wheel is fetched by pip into the
working folder and only its generator is imported. The generator makes the calls: new terrains in one step at sigma 80,
and variations of them at three lower noise levels; ``mpq_deploy.record`` listens to its ONNX Runtime session.
Compared by the generator itself and by ONNX Runtime: terrains from other seeds, of the float file and of the quantized
graph in FP32 arithmetic (the engine computes in FP16 and has not run on a GPU).
Other tools quantize the same file on the calls that ours is calibrated on, each in a process of its own.
Checked: the engine is verified; at each budget the terrains are closer to float than everything-INT8's; of weights
alone 0.35 of FP16 is not below INT8 weights at 0.5; INT8 compute alone at 0.5 is above 20 dB at every noise level.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from table import Page, bench_parser, markdown, verdict

import mpq_deploy
from mpq_deploy.calls.recorded import CallSet, RecordedCalls
from mpq_deploy.graph.writers.deployed_graphs import SIMULATED
from mpq_deploy.models.export import load_exported
from mpq_deploy.run.view import CALLS

TOOLS = Path(__file__).parent / "peer_tools"
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
    with np.errstate(divide="ignore"):
        ratios = [np.square(a).sum() / np.square(b - a).sum() for a, b in pairs]
    return [float(10 * np.log10(ratio)) for ratio in ratios]


def session_of(graph: Path) -> ort.InferenceSession:
    """The graph in ONNX Runtime, Q/DQ pairs as they are written."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(graph, options)


@dataclass(frozen=True)
class Row:
    """A model: its files' bytes, its constants' share of FP16, what its engine is, SQNR in dB by noise level."""

    name: str
    file_bytes: int
    share: float | None
    engine: str
    decibels: list[float]

    def cells(self) -> list[str]:
        """The row of the table."""
        share = "" if self.share is None else f"{self.share:.4f}"
        values = (f"{value:.1f}" for value in self.decibels)
        return [self.name, f"{self.file_bytes / 1e6:.2f}", share, self.engine, *values]


class Terrain:
    """The model, its generator, and a run of ours in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.generator = fetched(folder)
        if not (folder / "calls").is_dir():
            with mpq_deploy.record(self.generator.session, folder / "calls"):
                for seed in range(RUNS):
                    outputs(self.generator, seed)

    def build(self, budget: float) -> tuple[Row, dict[str, Any]]:
        """Build ours with its engine, and return its report."""
        settings = {**SETTINGS, "calls": str(self.folder / "calls")}
        model = self.generator.model_path
        report = mpq_deploy.build(model, budget=budget, out=self.run, settings=settings).report
        engine = report["engine"]
        verified = engine and engine["verified"]
        said = f"verified, {engine['weights_bytes']:,}" if verified else "refused"
        share = report["size_bytes"] / report["fp16_size_bytes"]
        return self.scored(f"ours at {budget:g}", self.run / "quantize", share, said), report

    def scored(self, name: str, folder: Path, share: float | None = None, engine: str = "") -> Row:
        """Compare the quantized graph of ours in ``folder``."""
        size = sum((folder / file).stat().st_size for file in ("model.onnx", "weights.bin"))
        found = sqnr(self.generator, session_of(folder / SIMULATED))
        return Row(name, size, share, engine, found)

    def ours(self, name: str, *command: str) -> Row:
        """Write a plan from the measured run (peer_tools/run_ours.py) and compare it."""
        place = self.folder / "plans" / name.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        how, *rest = command
        script = TOOLS / "run_ours.py"
        subprocess.run(
            [sys.executable, str(script), how, str(self.run), *rest, str(place)], check=True
        )
        return self.scored(name, place)

    def given(self) -> Path:
        """Write the calls that ours is calibrated on as peers read them (peer_tools/inputs.py)."""
        path = self.folder / "inputs.npz"
        spec = load_exported(self.run / "export").spec
        calls = CallSet.load(self.run / "calibrate" / CALLS)
        feeds = (
            RecordedCalls(calls, spec).feed(step, slice(call, call + 1))
            for step in range(len(calls.timesteps))
            for call in range(calls.count)
        )
        arrays = {
            f"calibration/{number}/{name}": array
            for number, feed in enumerate(feeds)
            for name, array in feed.items()
        }
        np.savez(path, allow_pickle=False, **arrays)
        return path

    def peer(self, tool: str, python: str, script: str, mode: str) -> Row | str:
        """Let another tool quantize the file, in a process of its own; why not, where it gives nothing."""
        place = self.folder / "peers" / f"{script.removesuffix('.py')}-{mode}"
        place.mkdir(parents=True, exist_ok=True)
        model = place / "model.onnx"
        command = [
            python,
            str(TOOLS / script),
            self.generator.model_path,
            self.folder / "inputs.npz",
        ]
        if not model.is_file():
            done = subprocess.run(
                [*map(str, command), mode, str(model)], capture_output=True, encoding="utf-8"
            )
            if done.returncode:
                return (
                    f"{tool}, {mode}: {(done.stderr.strip().splitlines() or ['no word'])[-1][:160]}"
                )
        size = sum(file.stat().st_size for file in place.iterdir())
        try:
            found = sqnr(self.generator, session_of(model))
        # Whatever ONNX Runtime says of another tool's file is the result.
        except Exception as error:
            return f"{tool}, {mode}: {str(error).splitlines()[0][:160]}"
        if np.isinf(found).any():
            return f"{tool}, {mode}: it wrote the float model, {size / 1e6:.2f} MB"
        return Row(f"{tool}, {mode}", size, None, "", found)


# Plans from the same run: the command of run_ours.py.
PLANS = {
    "weights alone, ours at 0.35": ("plan", "0.35", "fp16,w8a16,w4a16"),
    "weights alone, every layer INT8": ("uniform", "w8a16"),
    "weights alone, every layer INT4": ("uniform", "w4a16-b32,w4a16-b64,w4a16-b128"),
    "INT8 compute alone, ours at 0.5": ("plan", "0.5", "fp16,w8a8,w4a8"),
}
PEERS = {
    "ONNX Runtime": ("run_onnxruntime.py", ("minmax", "percentile-in-parts")),
    "onnxsim": ("run_onnxsim.py", ("static", "int4", "int8-block")),
    "Model Optimizer": ("run_modelopt.py", ("int8-max", "int8-entropy", "int4-rtn")),
}


def main() -> None:
    """Run the benchmark."""
    parser = bench_parser(__doc__)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.30, 0.35, 0.50])
    parser.add_argument("--keep", type=Path, help="work here, and go on from what is there")
    for tool in ("onnxsim", "modelopt"):
        parser.add_argument(
            f"--{tool}-python", metavar="PYTHON", help=f"the Python of an environment with {tool}"
        )
    chosen = parser.parse_args()
    page = Page("A k-diffusion model that others trained, beside other quantizers")
    with tempfile.TemporaryDirectory() as aside:
        folder = chosen.keep or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        terrain = Terrain(folder)
        page.say(
            f"{PACKAGE} (MIT), 10.46 M parameters, weights that are not ours. Its activations reach 1e10: a "
            "third of its layers read values that FP16 does not hold, so those compute in FP32, on quantized weights "
            "(and are stored in the engine with FP32 biases and scales)."
        )
        ours, controls = built(page, terrain, chosen.budgets)
        plans = {name: terrain.ours(name, *command) for name, command in PLANS.items()}
        pythons = {
            "ONNX Runtime": sys.executable,
            "onnxsim": chosen.onnxsim_python,
            "Model Optimizer": chosen.modelopt_python,
        }
        peers, failed = of_peers(terrain, pythons)
        page.say(
            "SQNR of the output in dB at "
            f"each noise level, over {COMPARED} chains from other seeds than the recorded {RUNS}; in ONNX Runtime on a "
            "CPU, Q/DQ pairs in float arithmetic as they are written; ours with the quantized integers and scales in "
            "FP32 arithmetic. MB are those of the files."
        )
        header = ["", "MB", "of FP16", "engine's weight bytes", *(f"at {s}" for s in SIGMAS)]
        rows = [*ours.values(), *controls, *plans.values(), *peers]
        page.say(markdown(header, [row.cells() for row in rows]))
        for line in failed:
            page.say(line)
        page.conclude(checks_of(ours, controls[0], plans, peers), chosen.page)


def built(
    page: Page, terrain: Terrain, budgets: Sequence[float]
) -> tuple[dict[float, Row], list[Row]]:
    """Return ours by budget and the controls, everything INT8 first; say what FP16 arithmetic changes."""
    ours = {}
    for budget in budgets:
        ours[budget], report = terrain.build(budget)
        arithmetic = (n for n in report["notes"] if "FP16 arithmetic" in n or "in FP16" in n)
        page.say(f"At {budget:g}: {next(arithmetic)}")
    controls = []
    for control in ("int8", "int4"):
        share = report["controls"][control]["size_bytes"] / report["fp16_size_bytes"]
        folder = terrain.run / "controls" / control
        controls.append(terrain.scored(f"everything {control.upper()}", folder, share))
    return ours, controls


def of_peers(terrain: Terrain, pythons: Mapping[str, str | None]) -> tuple[list[Row], list[str]]:
    """Return a row per tool and mode, and what gave none."""
    terrain.given()
    rows, failed = [], []
    for tool, (script, modes) in PEERS.items():
        python = pythons[tool]
        if python is None:
            failed.append(f"{tool} is skipped: its Python was not given.")
            continue
        for mode in modes:
            found = terrain.peer(tool, python, script, mode)
            if isinstance(found, Row):
                rows.append(found)
            else:
                failed.append(f"Nothing to compare: {found}")
    return rows, failed


def checks_of(
    ours: Mapping[float, Row], int8: Row, plans: Mapping[str, Row], peers: Sequence[Row]
) -> list[tuple[bool, str]]:
    """Return the checks: relations between rows of this very run."""
    checks = []
    for budget, row in ours.items():
        verified = row.engine.startswith("verified")
        what = f"the engine at {budget:g} is what was planned"
        checks.append((verified, verdict(verified, what, row.engine)))
        lead = least_lead(row, int8)
        what = f"at {budget:g} closer to float than everything INT8 at every noise level"
        checks.append((lead > 0, verdict(lead > 0, what, f"{lead:.1f} dB at least")))
    small, large = plans["weights alone, ours at 0.35"], plans["weights alone, every layer INT8"]
    lead = least_lead(small, large)
    what = "weights alone at 0.35 not below every layer's weights in INT8, at every noise level"
    checks.append((lead >= 0, verdict(lead >= 0, what, f"{lead:+.1f} dB at least")))
    least = min(plans["INT8 compute alone, ours at 0.5"].decibels)
    what = "INT8 compute alone at 0.5 above 20 dB at every noise level"
    checks.append((least > 20, verdict(least > 20, what, f"{least:.1f} dB at least")))
    for row in peers:
        within = [mine for mine in ours.values() if mine.file_bytes <= row.file_bytes]
        if within:
            lead = max(least_lead(mine, row) for mine in within)
            what = f"ours in no more bytes than {row.name} is closer to float at every noise level"
            checks.append((lead > 0, verdict(lead > 0, what, f"{lead:.1f} dB at least")))
    return checks


def least_lead(one: Row, other: Row) -> float:
    """By how many dB ``one`` is above ``other`` where it is the least."""
    return min(a - b for a, b in zip(one.decibels, other.decibels, strict=True))


if __name__ == "__main__":
    main()

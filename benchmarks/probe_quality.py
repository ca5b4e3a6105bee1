"""How well the cheap sensitivities agree with the truth: quantize one layer with one scheme, run the whole denoiser.

    python benchmarks/probe_quality.py digits                              every layer and scheme
    python benchmarks/probe_quality.py emoji --layers 'down_blocks*' --every 4

The truth ("exhaustive") is the relative squared error of the denoiser's output when a single layer takes a scheme,
over the same timesteps and samples. Against it: random adjoint probes, propagation gain x local error, and local error
alone. Per scheme: Spearman's rank correlation over the layers, and the calibration factor, the median of prediction
over truth (1 is perfect), with the 10th and 90th percentile. All metrics use the same calibration calls, none of
which the weights were rounded on. Seconds are processor seconds, of all threads; probe, gain and local error measure
every layer, the truth the chosen ones. Exit code 1 when a scheme's Spearman by probes is below 0.98 (schemes of fewer
than 10 layers are not judged). A second call reuses every metric that is still current.
"""

from __future__ import annotations

import fnmatch
import sys
import time
from pathlib import Path

from table import Page, bench_parser, bench_recipe, markdown, verdict, weights_digest

import mpq_deploy.sensitivity
from mpq_deploy.formats.scheme import SCHEMES
from mpq_deploy.graph.layers import Layer
from mpq_deploy.rounding.candidate_store import candidates_of
from mpq_deploy.run.pipeline import STAGES, open_pipeline
from mpq_deploy.run.view import Run
from mpq_deploy.sensitivity.exhaustive import measure_exhaustive
from mpq_deploy.sensitivity.measure import measure
from mpq_deploy.sensitivity.subject import Subject
from mpq_deploy.sensitivity.table import SensitivityTable
from mpq_deploy.studies.agreement import Compared, moments, rho_of
from mpq_deploy.system.files import file_digest
from mpq_deploy.system.memory import metered
from mpq_deploy.system.progress import PlainTalk

TRUTH, CHEAP = "exhaustive", ("probe", "gain", "local_error")
TITLES = {"probe": "probes", "gain": "gain x local error", "local_error": "local error"}
WANTED, FEWEST = 0.98, 10

Found = dict[str, SensitivityTable]


def measured(run: Run, metric: str, layers: list[Layer]) -> SensitivityTable:
    """Return the table of a metric, kept in the run folder as a stage of its own."""
    name = f"bench-{metric}"
    inputs = {
        **STAGES["measure"].fields(run),
        "recipe.measure.method": metric,
        "code": code_digest(),
    }
    if metric == TRUTH:
        inputs["layers"] = [layer.name for layer in layers]
    if run.folder.changed_fields(name, inputs) != []:
        started = time.process_time()
        with metered() as reading, run.folder.writing(name, inputs) as folder:
            measure_one(run, metric, layers).save(folder)
        run.folder.save_timing(name, time.process_time() - started, reading.peak_rss_bytes)
    return SensitivityTable.load(run.stage(name))


def measure_one(run: Run, metric: str, layers: list[Layer]) -> SensitivityTable:
    """Measure ``metric`` on the calls that the run measures on; the truth only for ``layers``."""
    exported, section = run.exported, run.recipe.measure
    inputs, stats = run.calibration
    settings = section.replace(calls=section.samples)
    candidates = candidates_of(run, exported.graph)
    calls = (
        inputs.split(section.samples)[1],
        exported.conditions,
        exported.spec,
        settings,
        run.talk,
    )
    subject = Subject(exported.graph, candidates, stats, *calls)
    if metric != TRUTH:
        return measure(metric, subject)
    pairs = {
        (layer.name, scheme.name) for layer in layers for scheme in candidates[layer.name].schemes
    }
    return measure_exhaustive(subject, pairs=pairs)


def code_digest() -> list[str]:
    """Digests of the code that measures: other code measures again."""
    return [
        file_digest(path) for path in sorted(Path(mpq_deploy.sensitivity.__path__[0]).glob("*.py"))
    ]


def compare(
    truth: SensitivityTable, table: SensitivityTable, scheme: str
) -> tuple[int, float, list[float]]:
    """Return the number of layers, Spearman, and the 10th, 50th and 90th percentile of prediction / truth.

    Layers that a scheme changes nothing of, and FP16 weights, are left out.
    """
    pairs = [(name, scheme) for name, losses in truth.losses.items() if scheme in losses]
    compared = Compared.of(pairs, truth.losses, table.losses)
    rank = float(rho_of(moments(compared.true, compared.found)))
    spread = compared.calibration()
    return (
        len(compared.true),
        rank,
        [spread.low, spread.median, spread.high] if spread else [float("nan")] * 3,
    )


def agreement(found: Found) -> tuple[str, list[tuple[str, int, float]]]:
    """Return the table per scheme, and (scheme, layers, Spearman) of the probes."""
    schemes = [s for s in SCHEMES if any(s in losses for losses in found[TRUTH].losses.values())]
    header = ["scheme", "layers"]
    for metric in CHEAP:
        header += [f"{TITLES[metric]}: Spearman", "factor (10 % to 90 %)"]
    rows, probes = [], []
    for scheme in schemes:
        row = []
        for metric in CHEAP:
            count, rank, (low, middle, high) = compare(found[TRUTH], found[metric], scheme)
            if count:
                row += [
                    f"{rank:.4f}" if count > 2 else "-",
                    f"{middle:.3g} ({low:.3g} to {high:.3g})",
                ]
            else:
                row += ["-", "changes nothing"]
            if metric == "probe":
                probes.append((scheme, count, rank))
        rows.append([scheme, str(count), *row])
    return markdown(header, rows), probes


def costs(run: Run, found: Found) -> str:
    """Return the table of seconds and memory."""
    timings = run.folder.timings()
    rows = []
    for metric in (*CHEAP, TRUTH):
        timing = timings[f"bench-{metric}"]
        pairs = sum(map(len, found[metric].losses.values()))
        seconds, memory = f"{timing['seconds']:.1f}", f"{timing['peak_rss_bytes'] / 1e6:.0f}"
        rows.append(
            [
                TITLES.get(metric, metric),
                str(pairs),
                seconds,
                memory,
                f"{timing['seconds'] / pairs * 1e3:.0f}",
            ]
        )
    return markdown(("metric", "layer-scheme pairs", "CPU s", "peak MB", "CPU ms a pair"), rows)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument(
        "model", nargs="?", default="digits", help="as of mpq-deploy build (default: digits)"
    )
    parser.add_argument(
        "--layers", default="*", help="a shell pattern: the truth of these layers only"
    )
    parser.add_argument("--every", type=int, default=1, help="of these, every nth")
    parser.add_argument("--recipe", type=Path, help="a recipe to start from")
    parser.add_argument(
        "-o", "--out", type=Path, help="run folder (default: runs/bench-probe-quality-NAME)"
    )
    chosen = parser.parse_args()
    # Branches would multiply the single layers to quantize, which take minutes as it is; --set brings them back.
    values = {"model": chosen.model, "engine.build": False, "allocate.branches": []}
    recipe = bench_recipe(chosen.recipe, chosen.set, values)
    name = Path(chosen.model).stem
    with open_pipeline(
        recipe, chosen.out or Path("runs") / f"bench-probe-quality-{name}", PlainTalk()
    ) as pipeline:
        pipeline.run_until("candidates")
        every = [
            n
            for n in pipeline.run.exported.graph.layers
            if fnmatch.fnmatchcase(n.name, chosen.layers)
        ]
        layers = every[:: chosen.every]
        if not layers:
            parser.error(f"no layer is named like {chosen.layers}")
        found = {metric: measured(pipeline.run, metric, layers) for metric in (*CHEAP, TRUTH)}
        section = recipe.measure
        page = Page(f"Sensitivity metrics against the truth: {name}")
        page.say(weights_digest(pipeline.run))
        calls = f"{recipe.calibrate.timesteps} timesteps x {section.samples} samples"
        page.say(
            f"{calls}, {section.probes} probes, rounding {recipe.quantize.rounding}, {len(layers)} layers."
        )
        table, probes = agreement(found)
        page.say(table)
        page.say(costs(pipeline.run, found))
    judged = [(scheme, rank) for scheme, count, rank in probes if count >= FEWEST]
    passed = bool(judged) and all(rank >= WANTED for _, rank in judged)
    worst = min(judged, key=lambda item: item[1], default=("none", float("nan")))
    page.say(
        verdict(
            passed,
            f"Spearman by probes is at least {WANTED} for every scheme",
            f"{worst[1]:.4f} ({worst[0]})",
        )
    )
    page.save(chosen.page)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()

"""How the images of ours at 0.35, everything INT8 and everything INT4 are distributed, beside the float model's.

    python benchmarks/images.py [MODEL] --images 1000

MODEL is a bundled one; distances are on its own feature network and are no FID (docs/metrics.md). The checks are
relations between results of this very run: the distance of ours to the real images lies within its 95 % interval of the
float model's, that of everything INT4 does not; ours is further below what other noise alone makes than INT4 is; and
the whole evaluation takes at most 1.3 times its sampling. That one is checked only where no image was cached. The exit
code is 1 when one fails.
"""

from __future__ import annotations

from pathlib import Path

from table import Page, bench_parser, bench_recipe, markdown, verdict, weights_digest

from mpq_deploy.evaluate.metrics.kept import ImageMetrics
from mpq_deploy.evaluate.metrics.measure_images import MetricsOptions, measure_metrics
from mpq_deploy.models.locate import DEMOS
from mpq_deploy.report.data import FrechetInfo
from mpq_deploy.report.words import FRECHET_COLUMNS, frechet_about, frechet_other, frechet_row
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.system.progress import PlainTalk

# Evaluation over its own sampling.
MOST_TIMES = 1.3
OURS, INT4 = "ours", "int4"
TITLES = {OURS: "ours, 0.35", "int8": "everything INT8", INT4: "everything INT4"}


def of_kind(metrics: ImageMetrics, against: str) -> dict[str, FrechetInfo]:
    """Return the distances to ``against`` by variant, ours first."""
    everything = {OURS: metrics.frechet, **metrics.controls}
    return {
        name: row for name, rows in everything.items() for row in rows if row.against == against
    }


def checks(metrics: ImageMetrics) -> list[tuple[bool, str]]:
    """Hold the distances against each other."""
    real, paired = of_kind(metrics, "real"), of_kind(metrics, "float")
    found = []
    for name, wanted in ((OURS, True), (INT4, False)):
        row = real[name]
        ends = f"{row.increase_interval.low:+.3g} to {row.increase_interval.high:+.3g}"
        what = f"{TITLES[name]}: float's distance to the real images is {'' if wanted else 'not '}within its interval"
        passed = row.within_noise == wanted
        found.append(
            (passed, verdict(passed, what, f"{row.increase:+.3g} above float's, interval {ends}"))
        )
    low, high = paired[OURS], paired[INT4]
    passed = low.interval.high < high.interval.low
    noise = f"{low.distance:.3g} and {high.distance:.3g}; other noise alone {low.other_noise:.3g}"
    what = "ours is nearer to the float model's images than everything INT4, intervals apart"
    return [*found, (passed, verdict(passed, what, noise))]


def time_check(metrics: ImageMetrics) -> tuple[bool, str]:
    """Whether the evaluation takes at most ``MOST_TIMES`` its sampling."""
    times = metrics.seconds / metrics.sampling_seconds
    found = f"{metrics.seconds:.0f} s, of which sampling {metrics.sampling_seconds:.0f} s: {times:.2f} times"
    return times <= MOST_TIMES, verdict(
        times <= MOST_TIMES, f"at most {MOST_TIMES} times the sampling", found
    )


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("model", nargs="?", choices=DEMOS, default=DEMOS[0], help="a bundled model")
    parser.add_argument("--images", type=int, default=1000, help="of each model (default 1000)")
    parser.add_argument("--workers", type=int, help="processes that sample (default: one per core)")
    parser.add_argument(
        "-o", "--out", type=Path, help="run folder (default: runs/bench-images-MODEL)"
    )
    chosen = parser.parse_args()
    recipe = bench_recipe(
        None, chosen.set, {"model": chosen.model, "budget": "0.35", "engine.build": False}
    )
    options = MetricsOptions(images=chosen.images, workers=chosen.workers, controls=True)
    with open_pipeline(
        recipe, chosen.out or Path(f"runs/bench-images-{chosen.model}"), PlainTalk()
    ) as pipeline:
        metrics = measure_metrics(pipeline.current("quantize", "controls"), options)
        page = Page(f"Distribution of the images: {chosen.model}")
        page.say(weights_digest(pipeline.run))
    for against in ("real", "float"):
        rows = of_kind(metrics, against)
        page.say(frechet_about(rows[OURS]))
        page.say(
            markdown(
                FRECHET_COLUMNS,
                [frechet_row(TITLES.get(name, name), row) for name, row in rows.items()],
            )
        )
        page.say(frechet_other(rows[OURS]))
    page.say("\n\n".join(metrics.notes))
    passed = checks(metrics)
    if metrics.fresh:
        passed.append(time_check(metrics))
    else:
        page.say("The time was not checked, for some of the images were cached.")
    page.conclude(passed, chosen.page)


if __name__ == "__main__":
    main()

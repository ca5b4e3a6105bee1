"""Runs of whole pipelines beside each other: their parts' bytes and errors, and what differs from the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import make_recipe
from mpq_deploy.report import words
from mpq_deploy.report.comparison import more
from mpq_deploy.report.markdown import plain, table
from mpq_deploy.report.page import rendered
from mpq_deploy.report.parts_page import COLUMNS, aligned, part_rows
from mpq_deploy.run.folder import COMPONENTS, PIPELINE
from mpq_deploy.run.pipeline_file import PipelineFile

PLAN = Path("allocate") / "plan.json"
HEADER = ("Part", "Run", *COLUMNS[1:])


@dataclass(frozen=True)
class WholeComparison:
    """The runs in the order given: where they lie, their joint views."""

    runs: tuple[Path, ...]
    views: tuple[PipelineFile, ...]

    def rows(self) -> list[list[str]]:
        """Return a row for each part of each run, the runs of a part below each other."""
        rows = [
            [row[0], str(number), *row[1:]]
            for number, view in enumerate(self.views, 1)
            for row in part_rows(view)
        ]
        order = list(dict.fromkeys(row[0].split(" (")[0] for row in rows))
        together = order.index("all together")
        order.append(order.pop(together))
        return sorted(rows, key=lambda row: order.index(row[0].split(" (")[0]))

    def about(self) -> list[str]:
        """Return what each run is."""
        return [
            f"{number}: {run}, {view.class_name} of {view.source}, budget {_recipe(view).budget}, "
            f"target {_recipe(view).target}"
            for number, (run, view) in enumerate(zip(self.runs, self.views), 1)
        ]

    def sentences(self) -> list[str]:
        """Return what differs between the first run and each other one."""
        return [
            f"{number} against 1: {sentence}"
            for number in range(2, len(self.runs) + 1)
            for sentence in self._against(number - 1)
        ]

    def _against(self, number: int) -> list[str]:
        first, other = self.views[0], self.views[number]
        parts = [f"{more((other.size_bytes or 0) - (first.size_bytes or 0), 'bytes')}."]
        missing = [f"{self.runs[k]}" for k in (0, number) if self.views[k].images is None]
        reasons = [f"Final images are not made yet: {one}." for one in missing]
        reasons = reasons or _obstacles(first, other)
        errors = first.measured_image_error, other.measured_image_error
        if reasons:
            parts += [*reasons, "So their images are not compared."]
        elif errors[0] and errors[1] is not None:
            text = f"the final images' error is {words.digits(errors[1] / errors[0])} times the first's"
            if first.psnr_db is not None and other.psnr_db is not None:
                text += f", PSNR {other.psnr_db:.1f} dB, the first's {first.psnr_db:.1f} dB"
            parts.append(f"{text}.")
        if first.image_ms is not None and other.image_ms is not None:
            times = words.digits(other.image_ms), words.digits(first.image_ms)
            parts.append(f"an image takes {times[0]} ms, the first's {times[1]} ms (estimated).")
        changes = [f"{name}: {change}" for name, change in self._changes(number).items()]
        return [*parts, f"Layers of another scheme: {'; '.join(changes)}."]

    def _changes(self, number: int) -> dict[str, str]:
        """Return how many layers of each part, of those that both have, took another scheme."""
        found = {}
        for name in dict.fromkeys((*self.views[0].parts, *self.views[number].parts)):
            own = [self.runs[k] / COMPONENTS / name for k in (0, number)]
            absent = [k for k in (0, number) if name not in self.views[k].parts]
            if absent:
                found[name] = f"only in {number + 1 if absent == [0] else 1}"
                continue
            before, after = (PrecisionPlan.load(one / PLAN).schemes for one in own)
            common = set(before) & set(after)
            changed = sum(before[layer] != after[layer] for layer in common)
            found[name] = f"{changed} of {len(common)}"
        return found

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        dumped = [view.model_dump(mode="json", exclude={"recipe"}) for view in self.views]
        return {
            "runs": [{**values, "run": str(run)} for values, run in zip(dumped, self.runs)],
            "against_first": [
                {
                    "run": str(self.runs[k]),
                    "sentences": self._against(k),
                    "layers_changed": self._changes(k),
                }
                for k in range(1, len(self.runs))
            ],
        }

    def text(self) -> str:
        """Return the comparison for a terminal."""
        return "\n".join(
            [*self.about(), "", *aligned([list(HEADER), *self.rows()]), "", *self.sentences()]
        )

    def markdown(self) -> str:
        """Return the comparison for a pull request."""
        lists = [
            "\n".join(f"- {plain(one)}" for one in some)
            for some in (self.about(), self.sentences())
        ]
        return "\n\n".join(["## Comparison", lists[0], table(HEADER, self.rows()), lists[1]]) + "\n"

    def page(self) -> str:
        """Return one page that fetches nothing; every string is escaped."""
        return rendered(
            "parts.html.j2",
            model=self.views[0].source,
            heading=f"{len(self.runs)} runs of a pipeline compared",
            caption="Each part in each run. Errors are relative and squared",
            columns=HEADER,
            rows=self.rows(),
            facts=[one.removesuffix(".") for one in self.sentences()],
            notes=self.about(),
        )


def compare_pipelines(runs: Sequence[Path]) -> WholeComparison:
    """Open ``runs``. Raises UsageError for fewer than two, one of another kind, and one without a plan."""
    if len(runs) < 2:
        raise UsageError(f"Only {len(runs)} run was given to compare.", "Give two or more.")
    for run in runs:
        if not run.exists():
            raise UsageError(f"There is no run {run}.", "Give the folders of finished runs.")
        if not (run / PIPELINE).is_file():
            raise UsageError(
                f"{run} is not the run of a whole pipeline, as others that are compared.",
                "Compare it with one part of those: RUN/components/NAME.",
            )
    views = tuple(map(PipelineFile.load, runs))
    for run, view in zip(runs, views):
        if view.size_bytes is None:
            raise UsageError(f"{run} has no plan yet.", f"Plan it: mpq-deploy allocate {run}")
    return WholeComparison(tuple(runs), views)


def _recipe(view: PipelineFile) -> Any:
    return make_recipe(dict(view.recipe))


def _obstacles(first: PipelineFile, other: PipelineFile) -> list[str]:
    """Say why the errors of final images are not of the same images; empty when they are."""
    own = [
        {"pipelines": f"{view.class_name} of {view.source}", "numbers of images": view.images}
        | {"steps": recipe.evaluate.steps, "seeds": recipe.evaluate.seed, "LoRAs": recipe.lora}
        | {"sizes": recipe.sizes.text, "prompts": recipe.prompts, "calls": recipe.call}
        for view, recipe in ((one, _recipe(one)) for one in (first, other))
    ]
    return [
        f"The {name} differ: {own[0][name]} and {own[1][name]}."
        for name in own[0]
        if own[0][name] != own[1][name]
    ]

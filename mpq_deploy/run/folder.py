"""The run folder: a folder per stage, moved into place when complete, with its inputs' digests.

A stage folder is current when its recorded inputs equal today's; else it is made again, and the
fields that changed are named. Timings live outside the stage folders, since what is digested must
repeat byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from mpq_deploy.errors import InputError, NoModelError, RunFolderError, UsageError, nearest
from mpq_deploy.system.files import (
    Fields,
    canonical_json,
    disk_error,
    file_digest,
    refuse_links,
    sealed_json,
    unsealed,
    write_text,
)
from mpq_deploy.system.inputs import read_json, read_json_object, read_text
from mpq_deploy.system.locks import HeldError, hold_folder
from mpq_deploy.system.names import printable
from mpq_deploy.system.release import __version__
from mpq_deploy.system.typed import typed

FORMAT = 1
RECORD = "stage.json"
TIMINGS = "timings.json"
# What makes a folder a run, and the recipe that it was made by.
MARKER, RECIPE = "run.json", "recipe.yaml"
# In a run of several targets: a run folder for each, which shares these stages with the others.
TARGETS, SHARED = "targets", ("export", "calibrate")
# Of a whole pipeline: its joint view, and below COMPONENTS a run folder for each part.
PIPELINE, COMPONENTS = "pipeline.json", "components"


@dataclass(frozen=True)
class StageRecord:
    """What a stage folder was made from (``inputs``), holds (``outputs``: file -> SHA-256), and computed on."""

    stage: str
    inputs: Fields
    outputs: dict[str, str]
    device: str = "cpu"

    @property
    def digest(self) -> str:
        """One digest of all outputs, for the inputs of later stages."""
        return hashlib.sha256(canonical_json(self.outputs).encode()).hexdigest()


class RunFolder:
    """One run: its lock, its stages, its timings. Create with ``open_run``.

    ``base``: the run that its shared stages lie in, itself unless it is a target's of several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = base_of(path)

    def stage(self, name: str) -> Path:
        """Folder of a finished stage."""
        return self._holder(name) / name

    def _holder(self, name: str) -> Path:
        return self.base if name in SHARED else self.path

    def scratch(self) -> Path:
        """A folder for a stage's temporary files; removed when the run folder is opened."""
        path = self.path / ".scratch"
        path.mkdir(exist_ok=True)
        return path

    def record(self, name: str) -> StageRecord | None:
        """Return the record of a finished stage; None where there is none or it cannot be read."""
        try:
            record = typed(StageRecord, read_json(self.stage(name) / RECORD))
        except (InputError, ValueError):
            # Missing, truncated or altered: the stage is made again.
            return None
        plain = all(_inside(file) for file in record.outputs)
        return record if plain and record.stage == name else None

    def changed_fields(self, name: str, inputs: Fields, outputs: bool = True) -> list[str] | None:
        """Name the inputs that differ from those recorded; [] when current, None when absent.

        An output that is missing or altered makes the stage absent; without ``outputs`` none is
        looked at.
        """
        record = self.record(name)
        if record is None:
            return None
        now = json.loads(canonical_json(inputs))
        keys = sorted({*now, *record.inputs})
        changed = [key for key in keys if now.get(key) != record.inputs.get(key)]
        if changed:
            return changed
        for file, digest in record.outputs.items() if outputs else ():
            path = self.stage(name) / file
            if not path.is_file() or file_digest(path) != digest:
                return [f"{name}/{file} (missing or altered)"]
        return []

    def made_before(self, name: str, now: Fields, aside: Set[str]) -> StageRecord | None:
        """Return the record of a finished stage, whole, of the inputs ``now`` but for those in ``aside``."""
        record = self.record(name)
        if record is None:
            return None
        same = alike(record.inputs, now, aside)
        return record if same and self.changed_fields(name, record.inputs) == [] else None

    @contextmanager
    def writing(self, name: str, inputs: Fields, device: str = "cpu") -> Iterator[Path]:
        """Yield an empty folder; on success it takes the stage's place, on failure it is removed.

        ``device``: what computes it, for the record. It makes no stage out of date: results of
        several devices differ by rounding.
        """
        holder = self._holder(name)
        aside = holder / f".{name}.partial"
        _remove(aside)
        try:
            aside.mkdir()
            yield aside
            files = sorted(p.relative_to(aside).as_posix() for p in aside.rglob("*") if p.is_file())
            outputs = {file: file_digest(aside / file) for file in files}
            record = {"stage": name, "inputs": inputs, "outputs": outputs, "device": device}
            write_text(aside / RECORD, canonical_json(record))
            final = holder / name
            old = holder / f".{name}.old"
            _remove(old)
            if final.exists():
                final.replace(old)
            aside.replace(final)
            _remove(old)
        except OSError as error:
            raise disk_error(error, holder) from error
        finally:
            _remove(aside)

    def timings(self) -> dict[str, dict[str, float]]:
        """Seconds and peak memory of each stage when it was last made."""
        return {**_timings(self.base), **_timings(self.path)}

    def save_timing(self, name: str, seconds: float, peak_rss_bytes: int) -> None:
        """Record what making a stage took."""
        holder = self._holder(name)
        timings = _timings(holder)
        timings[name] = {"seconds": round(seconds, 3), "peak_rss_bytes": peak_rss_bytes}
        write_text(holder / TIMINGS, sealed_json(timings))


def alike(one: Fields, other: Fields, aside: Set[str]) -> bool:
    """Whether the inputs of two stages are the same but for the names in ``aside``."""
    kept = ({k: v for k, v in fields.items() if k not in aside} for fields in (one, other))
    return len({canonical_json(fields) for fields in kept}) == 1


def _timings(path: Path) -> dict[str, dict[str, float]]:
    try:
        return typed(dict[str, dict[str, float]], unsealed(read_text(path / TIMINGS)))
    except (InputError, ValueError):
        # Only figures of the report: damaged ones are left out until the stages are made again.
        return {}


@dataclass(frozen=True)
class TargetPlace:
    """Where a run lies that is a target's of several: ``root`` / targets / ``name`` / ``part``.

    ``part``: components/NAME of a part of a whole pipeline, which shares its stages with that part
    of the other targets; else nothing.
    """

    root: Path
    name: str
    part: Path

    @property
    def base(self) -> Path:
        """The folder of the stages that targets share."""
        return self.root / self.part

    @property
    def below(self) -> Path:
        """The run, from ``root``."""
        return Path(TARGETS, self.name) / self.part


def target_place(path: Path) -> TargetPlace | None:
    """Return where ``path`` lies in a run of several targets; None for any other run."""
    for own in (path, path.absolute()):
        part = Path(COMPONENTS, own.name) if own.parent.name == COMPONENTS else Path()
        target = own.parent.parent if part.parts else own
        if target.parent.name == TARGETS:
            place = TargetPlace(target.parent.parent, target.name, part)
            # A worker's copy has the stages and no marker.
            known = (place.root / MARKER, *(place.base / name for name in SHARED))
            return place if any(one.exists() for one in known) else None
    return None


def base_of(path: Path) -> Path:
    """Return the folder of the stages that ``path`` shares with other targets; else ``path`` itself."""
    place = target_place(path)
    return path if place is None else place.base


def targets_in(path: Path) -> list[Path]:
    """Return the folders of a run of several targets, in the order in which they were added."""
    found = {
        one.parent for file in (RECIPE, PIPELINE) for one in (path / TARGETS).glob(f"*/{file}")
    }
    return sorted(
        found, key=lambda one: (read_json_object(one / MARKER).get("number", 0), one.name)
    )


def sharing_with(path: Path) -> list[Path]:
    """Return the runs that share stages with ``path``, in the order in which their targets were added."""
    place = target_place(path)
    if place is None:
        return []
    runs = (target / place.part for target in targets_in(place.root))
    return [one for one in runs if (one / RECIPE).exists() and one.absolute() != path.absolute()]


def several_in(path: Path) -> list[Path]:
    """Return the folders of a run of several targets; none where ``path`` is a run itself."""
    return [] if is_run(path) else targets_in(path)


def is_run(path: Path) -> bool:
    """Say whether ``path`` is a run, of a model or of a whole pipeline, and not of several targets."""
    return any((path / file).exists() for file in (RECIPE, PIPELINE))


def runs_at(path: Path, target: str | None = None) -> dict[str, Path]:
    """Return the runs that ``path`` stands for: of several targets each by name, else itself by no name.

    ``target``: of several this one alone. Raises UsageError for one that there is not.
    """
    several = {one.name: one for one in several_in(path)}
    if target is None:
        return several or {"": path}
    if not several:
        raise UsageError(f"{path} does not hold several targets.", "Leave --target out.")
    if target not in several:
        refuse_target(path, target)
    return {target: several[target]}


def check_one_run(path: Path) -> None:
    """Raise UsageError for a run of several targets, and for a target that such a run lacks."""
    if (path / PIPELINE).is_file():
        names = ", ".join(map(str, sorted((path / COMPONENTS).glob("*"))))
        raise UsageError(f"{path} holds the parts of a pipeline.", f"Give one of them: {names}.")
    several = several_in(path)
    if several:
        names = ", ".join(map(str, several))
        raise UsageError(f"{path} holds several targets.", f"Give one of them: {names}.")
    if path.parent.name == TARGETS and not path.exists() and targets_in(path.parent.parent):
        refuse_target(path.parent.parent, path.name)


@contextmanager
def telling_what_is_gone(model: str | None, run: Path) -> Iterator[None]:
    """Say of a ``model`` that is not found that ``run``, or a part in it, was built from it."""
    try:
        yield
    except NoModelError as error:
        records = (RunFolder(one).record("export") for one in (run, *run.glob(f"{COMPONENTS}/*")))
        names = {record.inputs.get("recipe.model") for record in records if record is not None}
        if model is None or Path(model).name not in names:
            raise
        whole = run.parents[1] if run.parent.name == COMPONENTS else run
        raise UsageError(
            f"The model '{model}', of which {whole} was built, is not there.",
            f"Put it back, or say where it is now: mpq-deploy build MODEL -o {whole}",
        ) from error


def refuse_target(run: Path, name: str) -> NoReturn:
    """Say that a run of several targets has none of that ``name``."""
    known = [one.name for one in targets_in(run)]
    raise UsageError(
        f"{run} has no target '{name}'; it has {', '.join(known)}.",
        f"{nearest(name, known)}To add it: mpq-deploy build MODEL --target {name} -o {run}.",
    )


def begin_run(path: Path) -> None:
    """Make a run folder for a further target, unless it is there; its run's lock is held."""
    path.mkdir(parents=True, exist_ok=True)
    _check_format(path)


def begin_target(path: Path, recipe: str) -> None:
    """Make the folder of a further target, with its recipe, unless it is there; its run's lock is held."""
    begin_run(path)
    if not (path / RECIPE).is_file():
        write_text(path / RECIPE, recipe)


@contextmanager
def open_targets(path: Path) -> Iterator[None]:
    """Make ``path`` a run of several targets for the block; with nothing finished it is removed again."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    with open_run(path):
        (path / TARGETS).mkdir(exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):
            (path / TARGETS).rmdir()
        _remove_unused(path, missing)


def refuse_altered(files: Iterable[Path]) -> None:
    """Raise RunFolderError when one of ``files`` is not as its finished stage left it.

    For callers that open results without the pipeline, which would make the stage again. Files
    outside a run folder are passed over: nothing is known of them. Within one, a stage without its
    record is refused as well.
    """
    for path in files:
        run = path.parent.parent
        if not (run / MARKER).exists():
            continue
        record = RunFolder(run).record(path.parent.name)
        known = {} if record is None else record.outputs
        if known.get(path.name) != file_digest(path):
            again = "Run 'mpq-deploy build' on its run folder: it makes it again."
            if path.name in known:
                raise RunFolderError(f"{path} was altered since it was made.", again)
            raise RunFolderError(f"{path} is not in the record of its stage.", again)


@contextmanager
def open_run(path: Path) -> Iterator[RunFolder]:
    """Create or open the run folder at ``path`` and hold its lock for the time of the block.

    Raises RunFolderError for a folder that is in use, has another format, is not a run folder, or
    cannot be written.
    """
    missing = [place for place in (path, *path.parents) if not place.exists()]
    with ExitStack() as stack:
        # Last, when the lock is free again.
        stack.callback(_remove_unused, path, missing)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for place in dict.fromkeys((base_of(path), path)):
                place.mkdir(parents=True, exist_ok=True)
                refuse_links(place, RunFolderError)
                stack.enter_context(hold_folder(place))
                _check_format(place)
            _remove(path / ".scratch")
        except HeldError as error:
            raise RunFolderError(
                f"The run folder {path} is in use by another process (pid {error}).",
                "Wait for it to end, or give another run folder with -o.",
            ) from error
        except OSError as error:
            raise disk_error(error, path) from error
        yield RunFolder(path)


def _remove_unused(path: Path, made: list[Path]) -> None:
    """Remove a run folder in which nothing was finished, and the folders ``made`` for it."""
    if not made or not path.is_dir() or any(one.is_dir() for one in path.iterdir()):
        return
    for file in path.iterdir():
        file.unlink()
    for place in made:
        with suppress(OSError):
            place.rmdir()


def _check_format(path: Path) -> None:
    marker = path / MARKER
    if not marker.exists():
        others = [p.name for p in path.iterdir() if p.name[0] != "." and p.name != RECIPE]
        if others:
            raise RunFolderError(
                f"{path} is not a run folder: it holds {others[0]} and no run.json.",
                "Give an empty or new folder.",
            )
        base = base_of(path)
        number = {} if base == path else {"number": len(targets_in(base))}
        write_text(marker, canonical_json({"format": FORMAT, "made_by": __version__, **number}))
        return
    again = "Give a new run folder with -o."
    made = read_json_object(marker, error=RunFolderError, hint=again)
    made_format, made_by = made.get("format"), printable(str(made.get("made_by"))[:40])
    if made_format != FORMAT:
        raise RunFolderError(
            f"The run folder {path} was made by mpq-deploy {made_by} (format {made_format}; this is {FORMAT}).",
            f"Give a new run folder with -o, or use mpq-deploy {made_by}.",
        )


def _inside(file: str) -> bool:
    """Whether a record's file lies in its stage's folder."""
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in file


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

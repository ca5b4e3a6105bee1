"""The run folder: a folder per stage, moved into place when complete, with its inputs' digests.

A stage folder is current when its recorded inputs equal today's; else it is made again, and the
fields that changed are named. Timings live outside the stage folders, since what is digested must
repeat byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mpq_deploy.errors import InputError, RunFolderError
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
# What makes a folder a run.
MARKER = "run.json"


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
    """One run: its lock, its stages, its timings. Create with ``open_run``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self, name: str) -> Path:
        """Folder of a finished stage."""
        return self.path / name

    def scratch(self) -> Path:
        """A folder for a stage's temporary files; removed when the run folder is opened."""
        path = self.path / ".scratch"
        path.mkdir(exist_ok=True)
        return path

    def record(self, name: str) -> StageRecord | None:
        """Return the record of a finished stage; None where there is none or it cannot be read."""
        try:
            record = typed(StageRecord, read_json(self.path / name / RECORD))
        except (InputError, ValueError):
            # Missing, cut short or altered: the stage is made again.
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
            path = self.path / name / file
            if not path.is_file() or file_digest(path) != digest:
                return [f"{name}/{file} (missing or altered)"]
        return []

    @contextmanager
    def writing(self, name: str, inputs: Fields, device: str = "cpu") -> Iterator[Path]:
        """Yield an empty folder; on success it takes the stage's place, on failure it is removed.

        ``device``: what computes it, for the record. It makes no stage out of date: results of
        several devices differ by rounding.
        """
        aside = self.path / f".{name}.partial"
        _remove(aside)
        try:
            aside.mkdir()
            yield aside
            files = sorted(p.relative_to(aside).as_posix() for p in aside.rglob("*") if p.is_file())
            outputs = {file: file_digest(aside / file) for file in files}
            record = {"stage": name, "inputs": inputs, "outputs": outputs, "device": device}
            write_text(aside / RECORD, canonical_json(record))
            final = self.path / name
            old = self.path / f".{name}.old"
            _remove(old)
            if final.exists():
                final.replace(old)
            aside.replace(final)
            _remove(old)
        except OSError as error:
            raise disk_error(error, self.path) from error
        finally:
            _remove(aside)

    def timings(self) -> dict[str, dict[str, float]]:
        """Seconds and peak memory of each stage when it was last made."""
        try:
            timings = unsealed(read_text(self.path / TIMINGS))
            return typed(dict[str, dict[str, float]], timings)
        except (InputError, ValueError):
            # Only figures of the report: damaged ones are left out until the stages are made again.
            return {}

    def save_timing(self, name: str, seconds: float, peak_rss_bytes: int) -> None:
        """Record what making a stage took."""
        timings = self.timings()
        timings[name] = {"seconds": round(seconds, 3), "peak_rss_bytes": peak_rss_bytes}
        write_text(self.path / TIMINGS, sealed_json(timings))


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

    Raises RunFolderError for a folder that is in use, has another format, is no run folder, or
    cannot be written.
    """
    missing = [place for place in (path, *path.parents) if not place.exists()]
    with ExitStack() as stack:
        # Last, when the lock is free again.
        stack.callback(_remove_unused, path, missing)
        try:
            path.mkdir(parents=True, exist_ok=True)
            refuse_links(path, RunFolderError)
            stack.enter_context(hold_folder(path))
            _check_format(path)
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
        others = [p.name for p in path.iterdir() if p.name[0] != "." and p.name != "recipe.yaml"]
        if others:
            raise RunFolderError(
                f"{path} is not a run folder: it holds {others[0]} and no run.json.",
                "Give an empty or new folder.",
            )
        write_text(marker, canonical_json({"format": FORMAT, "made_by": __version__}))
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

"""A worker on a node of a Ray cluster: its copy of the job's files, and the shards it computes.

The files come through Ray's object store, once per node: the first worker there writes them into a
folder that all workers of the node read. Only ``cluster.py`` imports this module's class into a
cluster.
"""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mpq_deploy.errors import DiskError
from mpq_deploy.system.files import FULL
from mpq_deploy.system.import_path import drop_current_folder
from mpq_deploy.system.locks import alone_with, user_folder
from mpq_deploy.system.parallel.child import Worker
from mpq_deploy.system.parallel.work import Opener
from mpq_deploy.system.release import __version__

# Where versions differ, results do: a cluster must have those of the machine that starts the work.
SAME_VERSIONS = ("numpy", "onnxruntime", "torch", "onnx", "onnx-ir")
COMPLETE = ".complete"


@dataclass(frozen=True)
class Packed:
    """Files in the object store: ``name`` of the whole, and per relative path the references of its pieces."""

    name: str
    files: dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Facts:
    """What results depend on beside the work: versions by package, and the processor's instruction sets."""

    versions: tuple[tuple[str, str], ...]
    processor: str

    @classmethod
    def here(cls) -> Facts:
        """Return the facts of this machine."""
        return cls(
            (("mpq-deploy", __version__), *((name, _version(name)) for name in SAME_VERSIONS)),
            _processor(),
        )


class NodeWorker:
    """Opens a job and computes its shards; answers as a worker process does (``child.py``)."""

    def __init__(self) -> None:
        # Ray gives its workers the import path of the process that started the work.
        drop_current_folder()
        self._answers: list[tuple[Any, ...]] = []
        self._worker = Worker(self._answers.append)
        self._folder: Path | None = None

    def open(
        self, node: str, opener: Opener, packed: Packed, fetch: Callable[[Any], Any]
    ) -> tuple[Facts, list[Any]]:
        """Bring the files to this node, open the job, and describe this node.

        Where the node cannot keep the files, the answer is ("unfit", None, why).
        """
        try:
            self._folder = unpacked(packed, node, fetch)
        except OSError as error:
            return Facts.here(), [("unfit", None, _why(error))]
        self._worker.obey(("open", opener, self._folder))
        return Facts.here(), self._taken()

    def run(self, number: int, task: Any) -> list[Any]:
        """Compute shard ``number``; return the answers."""
        self._worker.obey(("run", number, task))
        return self._taken()

    def forget(self) -> None:
        """Remove the files from this node."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _taken(self) -> list[Any]:
        answers = [("unfit", a[1], a[2].message) if _is_disks(a) else a for a in self._answers]
        self._answers.clear()
        return answers


def unpacked(packed: Packed, node: str, fetch: Callable[[Any], Any]) -> Path:
    """Return the folder with the files on this node, written by the first who asks for it."""
    folder = user_folder() / f"{node[:16]}-{packed.name}"
    with alone_with(folder):
        if not (folder / COMPLETE).exists():
            try:
                _write(packed, folder, fetch)
            except OSError:
                # Nobody reads half of them, and the disk is full.
                shutil.rmtree(folder, ignore_errors=True)
                raise
    return folder


def _write(packed: Packed, folder: Path, fetch: Callable[[Any], Any]) -> None:
    for name, pieces in packed.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in pieces:
                file.write(memoryview(fetch(piece)))
    (folder / COMPLETE).touch()


def _is_disks(answer: tuple[Any, ...]) -> bool:
    return answer[0] == "failed" and isinstance(answer[2], DiskError)


def _why(error: OSError) -> str:
    """Say why files cannot be written, and where."""
    if isinstance(error, TimeoutError):
        return "its part of the object store gave it no files in time"
    try:
        where = tempfile.gettempdir()
    except OSError as nowhere:
        return str(nowhere)
    if error.errno in FULL:
        return (
            f"its disk is full: {shutil.disk_usage(where).free / 1e6:.0f} MB are left under {where}"
        )
    return f"its folder {where} cannot be used: {error}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Name the instruction sets that NumPy found, which the other libraries choose their kernels by, too."""
    found = np.show_config(mode="dicts")
    extensions = found.get("SIMD Extensions", {}) if found else {}
    return " ".join([platform.machine(), *sorted(extensions.get("found", []))])

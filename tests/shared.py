"""Folders that one process of the suite makes and all of them read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name``, filled by ``make`` on the first call of the suite. Tests leave it as it is.

    A folder whose making failed is made anew, elsewhere, by the next call.
    """
    base = factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    base.mkdir(exist_ok=True)
    record = base / f"{name}.path"
    with FileLock(record.with_suffix(".lock")):
        if not record.is_file():
            folder = factory.mktemp(name)
            make(folder)
            record.write_text(str(folder), encoding="utf-8")
    return Path(record.read_text(encoding="utf-8"))

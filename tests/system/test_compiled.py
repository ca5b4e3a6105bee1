"""Compiled loops take no settings from the current folder, and work where nothing can be kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mpq_deploy

CHECKOUT = Path(mpq_deploy.__file__).parents[1]
LOOP = """
import os, sys
from mpq_deploy.system.compiled import compiled
{between}
from mpq_deploy.rounding.cpu_columns import rounding_errors
import numpy as np
one = np.ones((1, 1), np.float32)
errors = rounding_errors(one, one[0], one[None] / 3, np.float32(-8), np.float32(7))
print(float(errors[0, 0, 0]), os.environ.get("TAKEN", ""))
"""

# numba reads its settings again when it compiles, and takes them for what is decorated from then on.
PLANTED = """
double = compiled(lambda x: 2 * x)
with open(".numba_config.yaml", "w", encoding="utf-8") as file:
    file.write("cache_dir: evil")
double(1.0)
os.remove(".numba_config.yaml")
"""


def run(folder: Path, between: str = "", root: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    """Run the loop in the current folder ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(root), "HOME": str(folder / "none")}
    return subprocess.run(
        [sys.executable, "-c", LOOP.format(between=between)],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )


def test_settings_in_the_current_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / ".numba_config.yaml").write_text("cache_dir: evil\n", encoding="utf-8")
    said = run(tmp_path)
    assert said.returncode and "The current folder holds .numba_config.yaml" in said.stderr


def test_settings_that_appear_later_are_not_read(tmp_path: Path) -> None:
    said = run(tmp_path, PLANTED)
    assert said.stdout.split() == ["0.0"], said.stderr
    assert not (tmp_path / "evil").exists()


def test_code_that_cannot_be_kept_is_compiled_all_the_same(tmp_path: Path) -> None:
    """The package lies in a folder without write access for anybody, as does the user's own."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "mpq_deploy", copy / "mpq_deploy", ignore=ignored)
    # A file where numba would make its folder stops also root, whom access rights do not.
    (copy / "mpq_deploy/rounding/__pycache__").write_text("", encoding="utf-8")
    (tmp_path / "none").write_text("", encoding="utf-8")
    said = run(tmp_path, root=copy)
    assert said.stdout.split() == ["0.0"], said.stderr

"""Threads keep to the processor time that control groups allow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_deploy.system import threads
from mpq_deploy.system.threads import available_cores, keep_to_quota, physical_cores, quota_cores

SECOND = "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
FIRST = "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("said", "cores"),
    [("max 100000", 0), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("", 0)],
)
def test_the_second_version_of_control_groups(tmp_path: Path, said: str, cores: int) -> None:
    groups = {"proc__self__cgroup": "0::/\n", "proc__self__mountinfo": SECOND}
    root = write(tmp_path, **groups, sys__fs__cgroup__cpu_dot_max=f"{said}\n")
    assert quota_cores(root) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 0), ("250000", 3)])
def test_the_first_version_of_control_groups(tmp_path: Path, quota: str, cores: int) -> None:
    groups = {"proc__self__cgroup": "4:cpu,cpuacct:/job\n", "proc__self__mountinfo": FIRST}
    files = {"cpu_dot_cfs_quota_us": quota, "cpu_dot_cfs_period_us": "100000"}
    folder = "sys__fs__cgroup__cpu__job__"
    root = write(tmp_path, **groups, **{folder + name: one for name, one in files.items()})
    assert quota_cores(root) == cores


def test_the_least_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    groups = {"proc__self__cgroup": "0::/a/b\n", "proc__self__mountinfo": SECOND}
    write(tmp_path, **groups, sys__fs__cgroup__a__cpu_dot_max="300000 100000\n")
    write(tmp_path, sys__fs__cgroup__a__b__cpu_dot_max="800000 100000\n")
    assert quota_cores(tmp_path) == 3
    assert quota_cores(tmp_path / "nothing") == 0


def test_cores_and_libraries_keep_to_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*threads.TORCH_THREADS, *threads.BLAS_THREADS)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "5")
    monkeypatch.setattr(threads, "_allowed_cores", lambda: 64)
    monkeypatch.setattr(threads, "_allowed_physical_cores", lambda: 32)
    keep_to_quota()
    assert "OMP_NUM_THREADS" not in os.environ, "without a quota libraries take what they find"
    monkeypatch.setattr(threads, "quota_cores", lambda: 1)
    assert available_cores() == physical_cores() == 1
    keep_to_quota()
    assert {os.environ[name] for name in names} == {"1", "5"}
    code = "import torch; print(torch.get_num_threads())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert said.stdout.strip() == "1"
    monkeypatch.setattr(threads, "quota_cores", lambda: 99)
    assert (available_cores(), physical_cores()) == (64, 32)

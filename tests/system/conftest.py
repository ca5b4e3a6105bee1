"""Processes start here as they do for users."""

import pytest

from mpq_deploy.system.parallel import processes

START = processes.start_process


@pytest.fixture(autouse=True)
def started_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each worker's Python anew."""
    monkeypatch.setattr(processes, "start_process", START)

"""What holds for all tests: one thread, set before anything numerical is loaded.

Sums over other numbers of threads round otherwise, so runs in this process and in child processes must agree; one
thread is also what two busy cores can give.
"""

import gc
import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow: neither an example nor drawing one may fail a test by its time.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
os.environ.setdefault("OMP_NUM_THREADS", "1")

KEPT_SECONDS = 14 * 86400


# Whole builds, exports, children and browsers. Beside all rooms: one build per recipe.
HEAVY_ROOMS = ("pipeline", "oracle", "models", "recover", "delivery", "engine", "report", "run")
HEAVY_ROOMS += ("bench", "docs", "rounding", "system", "parallel")
HEAVY_FILES = ("test_recipes.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long: workers take whole files in this order, and short ones even out the end.

    The fuzz tests come first of all: their process must start the server that their cases are forked
    from, with all imports done. Another test's server has none, and each case then takes 4 s.
    """
    long = {
        item.path
        for item in items
        if item.get_closest_marker("slow")
        or item.path.parent.name in HEAVY_ROOMS
        or item.path.name in HEAVY_FILES
    }
    items.sort(key=lambda item: (item.path.parent.name != "fuzz", item.path not in long))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported: torch alone has a million objects.

    What a test imports later it then passes over less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def shared_exports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Trace no tiny module that is recorded, and each other one once, for this suite and, in pytest's cache, the next.

    PyTorch's exporter would take a third of the suite's time.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnxscript") is None:
        yield
        return
    from mpq_deploy.models.torch_export import TorchNetwork
    from tests.export_record import Records

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    if (kept := getattr(request.config, "cache", None)) is not None:
        folder = kept.mkdir("exports")
        _forget(folder)
    folder.mkdir(exist_ok=True)
    records = Records(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchNetwork, "_exported", lambda network: records.exported(network))
        _register_operators_once(patch)
        yield


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many tiny modules are not recorded as they are now."""
    kept = getattr(config, "cache", None)
    # Workers have a summary, too, which nobody sees.
    if kept is not None and not hasattr(config, "workerinput"):
        told = kept.mkdir("exports") / "traced.txt"
        with suppress(OSError):
            count = len(told.read_text(encoding="utf-8").splitlines())
            told.unlink()
            line = "modules were traced: python -m tests.export_record (CONTRIBUTING.md)"
            terminalreporter.write_line(f"{count} {line}")


@pytest.fixture(autouse=True, scope="session")
def machine_timed_once() -> Iterator[None]:
    """Time what a model takes on this machine once, by one call: hundreds of builds are of the same few models."""
    from mpq_deploy.run import machine_speed

    timed, known = machine_speed.time_machine, dict[Any, Any]()

    def once(run: Any, *rest: Any) -> Any:
        recipe = run.recipe
        sizes = recipe.calibrate.batch_size, recipe.evaluate.batch_size
        key = (run.digest("export"), *sizes, machine_speed._wants_torch(recipe))
        if key not in known:
            with pytest.MonkeyPatch.context() as one_call:
                one_call.setattr(machine_speed, "WARM_CALLS", 0)
                known[key] = timed(run, *rest)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_speed, "time_machine", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def unsynced() -> Iterator[None]:
    """Do not wait for disks: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def forked_workers() -> Iterator[None]:
    """Fork workers from a server that has their imports; tests/system starts each as users do."""
    from mpq_deploy.system.parallel import processes
    from tests.forked import start_worker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "start_process", start_worker)
        yield


def _register_operators_once(patch: pytest.MonkeyPatch) -> None:
    """The exporter parses its 500 operators anew for each export: a second, however small the module is."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return
    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))


def _forget(folder: Path) -> None:
    """Delete exports that no suite of late has asked for."""
    for path in folder.glob("*.onnx"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink()

"""What holds for all tests: one thread, set before anything numerical is loaded.

Sums over other numbers of threads round otherwise, so runs in this process and in child processes must agree; one
thread is also what two busy cores can give.
"""

import gc
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow: neither an example nor drawing one may fail a test by its time.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# It compares two exports of one module.
SECOND_EXPORT = "test_a_second_export"
# Classes that are known by their configuration; what a test's own module computes is in no key.
CONFIGURED = ("diffusers.", "transformers.")
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
    """Trace each tiny module once: PyTorch's exporter takes most of the suite's time.

    The exporter's graph, before any pass of ours, is kept by module, weights, inputs, how the
    module is called, the source of ``models/`` and the libraries' versions, for all processes of
    the suite and, in pytest's cache, for the next suites.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnxscript") is None:
        yield
        return
    import onnx_ir as ir
    from filelock import FileLock

    from mpq_deploy.models.torch_export import TorchNetwork

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    if (kept := getattr(request.config, "cache", None)) is not None:
        folder = kept.mkdir("exports")
        _forget(folder)
    folder.mkdir(exist_ok=True)
    original = TorchNetwork._exported

    def exported(self: TorchNetwork) -> Any:
        second = SECOND_EXPORT in os.environ.get("PYTEST_CURRENT_TEST", "")
        if second or not type(self.module).__module__.startswith(CONFIGURED):
            return original(self)
        path = folder / f"{_export_key(self)}.onnx"
        # The other worker waits for what this one is exporting.
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                made = original(self)
                aside = path.with_suffix(".partial")
                counters = json.dumps(_counters(made.graph))
                path.with_suffix(".json").write_text(counters, encoding="utf-8")
                ir.save(made, aside, format="protobuf")
                aside.replace(path)
                return made
        os.utime(path)
        model = ir.load(path)
        # Passes name what they add by these: a graph that was read gets the names of a new one.
        counters = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        vars(model.graph._name_authority).update(counters)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchNetwork, "_exported", exported)
        _register_operators_once(patch)
        yield


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


def _counters(graph: Any) -> dict[str, int]:
    """How many values and nodes without a name the graph has named."""
    return {name: n for name, n in vars(graph._name_authority).items() if isinstance(n, int)}


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


@cache
def _exporter() -> bytes:
    """A digest of the code that exports: our own sources, and the versions of others."""
    import mpq_deploy

    digest = hashlib.sha256(sys.version.encode())
    for name in ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "peft"):
        with suppress(PackageNotFoundError):
            digest.update(f"{name} {version(name)}".encode())
    package = Path(mpq_deploy.__file__).parent
    for path in (*sorted((package / "models").rglob("*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.digest()


def _export_key(network: Any) -> str:
    """A digest of all that the exporter's graph depends on."""
    digest = hashlib.sha256(_exporter())
    module = network.module
    told = [type(module).__qualname__, _configuration(module), network.output]
    told += [repr(item) for item in network.inputs]
    told += _described(network._call)
    for text in told:
        digest.update(text.encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _configuration(module: Any) -> str:
    """A module's configuration, or its parts, without the folder that it was read from."""
    config = getattr(module, "config", None)
    if config is None:
        return str(module)
    values = dict(config) if isinstance(config, dict) else config.to_dict()
    return str({key: value for key, value in values.items() if key != "_name_or_path"})


def _described(value: Any) -> list[str]:
    """How a function calls: its code and what it closes over, tensors by their values."""
    import torch

    if isinstance(value, torch.Tensor):
        return [hashlib.sha256(value.detach().float().contiguous().numpy().tobytes()).hexdigest()]
    if isinstance(value, dict):
        return [text for key, one in value.items() for text in (str(key), *_described(one))]
    if callable(value) and hasattr(value, "__code__"):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        code = value.__code__
        return [
            code.co_code.hex(),
            _without_addresses(str(code.co_consts)),
            *(t for c in cells for t in _described(c)),
        ]
    if hasattr(value, "form"):
        # Arguments of a first call: the tensors in their places are replaced.
        return [_without_addresses(repr(value.form))]
    if hasattr(value, "__dataclass_fields__"):
        return [
            text for name in value.__dataclass_fields__ for text in _described(getattr(value, name))
        ]
    return [_without_addresses(repr(value))]


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)

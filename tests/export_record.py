"""What PyTorch's exporter made of the suite's tiny modules, recorded: tracing them takes a third of a suite.

The exporter's graph is kept before any pass of ours and without the weights, by module, inputs, how the module is
called, the source of ``models/`` and the libraries' versions. A module that nobody recorded so is traced.
``python -m tests.export_record`` records what the last whole suite has used.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import tarfile
import types
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from filelock import FileLock
from onnx_ir.tensor_adapters import TorchTensor

import mpq_deploy
from mpq_deploy.models.torch_export import PREFIX, SCOPES, TorchNetwork

ARCHIVE = Path(__file__).parent / "data" / "exports.tar.xz"
# These compare the exporter with itself, or with what is recorded.
TRACED = "test_a_second_export"
# One line for each module that this suite had to trace.
TRACED_HERE = "traced.txt"
# Classes that are known by their configuration; what a test's own module computes is in no key.
CONFIGURED = ("diffusers.", "transformers.")
LIBRARIES = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "peft")


class Records:
    """The graphs that the suite's processes share in ``folder``, those of ARCHIVE among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trace = TorchNetwork._exported

    def exported(self, network: TorchNetwork) -> Any:
        """The exporter's graph of ``network``: recorded, made by another test, or traced now."""
        traced = TRACED in os.environ.get("PYTEST_CURRENT_TEST", "")
        if traced or not type(network.module).__module__.startswith(CONFIGURED):
            return self._trace(network)
        path = self.folder / f"{export_key(network)}.onnx"
        # The other worker waits for what this one is tracing.
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file() and not _from_archive(path):
                made = self._trace(network)
                with (self.folder / TRACED_HERE).open("a", encoding="utf-8") as told:
                    told.write(f"{type(network.module).__name__}\n")
                counters = {k: n for k, n in vars(_names(made)).items() if isinstance(n, int)}
                path.with_suffix(".json").write_text(json.dumps(counters), encoding="utf-8")
                aside = path.with_suffix(".partial")
                _save(made, network.module, aside)
                aside.replace(path)
        os.utime(path)
        model = ir.load(path)
        for value, name in _weights(model, network.module):
            value.const_value = TorchTensor(network.module.state_dict()[name], value.name)
        # Passes name what they add by these: a graph that was read gets the names of a new one.
        vars(_names(model)).update(
            json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        )
        return model


def _names(model: ir.Model) -> Any:
    return model.graph._name_authority


def _from_archive(path: Path) -> bool:
    """Write the recorded graph and its counters to ``path``; return whether there is one."""
    if path.name not in (held := recorded()):
        return False
    for one in (path.with_suffix(".json"), path):
        one.write_bytes(held[one.name])
    return True


@cache
def recorded() -> dict[str, bytes]:
    """The files in ARCHIVE, by name."""
    if not ARCHIVE.is_file():
        return {}
    with tarfile.open(ARCHIVE) as archive:
        found = ((one.name, archive.extractfile(one)) for one in archive)
        return {name: file.read() for name, file in found if file is not None}


def _weights(model: ir.Model, module: Any) -> list[tuple[ir.Value, str]]:
    """The initializers that are the module's own weights, each with its name there."""
    own = module.state_dict()
    found = [(value, name.removeprefix(PREFIX)) for name, value in model.graph.initializers.items()]
    return [(value, name) for value, name in found if value.name != name and name in own]


def _save(model: ir.Model, module: Any, path: Path) -> None:
    """Without weights: modules that differ by their values alone have one graph."""
    for value, _ in _weights(model, module):
        tensor = value.const_value
        assert tensor is not None and value.name is not None
        shape = ir.Shape(tensor.shape)
        value.const_value = ir.ExternalTensor(
            "none", 0, 0, tensor.dtype, shape=shape, name=value.name
        )
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    for node in model.graph:
        # Lines of the module's source, by the paths of this machine, are most of a graph.
        kept = {key: text for key, text in node.metadata_props.items() if key == SCOPES}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        for output in node.outputs:
            output.metadata_props.clear()
    ir.save(model, path, format="protobuf")


def export_key(network: TorchNetwork) -> str:
    """A digest of all that the exporter's graph depends on."""
    digest, module = hashlib.sha256(_exporter()), network.module
    told = [type(module).__qualname__, _configuration(module), network.output]
    told += [repr(item) for item in network.inputs]
    told += _described(network._call)
    # Tied weights are one initializer.
    first: dict[int, str] = {}
    for name, tensor in module.state_dict().items():
        tied = first.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        told.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tied}")
    for text in told:
        digest.update(text.encode())
    return digest.hexdigest()


@cache
def _exporter() -> bytes:
    """A digest of the code that exports: our own without its comments, and the versions of others."""
    digest = hashlib.sha256()
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            digest.update(f"{name} {version(name).partition('+')[0]}".encode())
    for path in sorted((Path(mpq_deploy.__file__).parent / "models").rglob("*.py")):
        digest.update(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))).encode())
    return digest.digest()


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
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), *(t for one in value.co_consts for t in _described(one))]
    if callable(value) and hasattr(value, "__code__"):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [text for one in (value.__code__, *cells) for text in _described(one)]
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


def record(folder: Path) -> int:
    """Write the graphs in ``folder``, and none but those, to ARCHIVE; return how many."""
    graphs = sorted(folder.glob("*.onnx"))
    ARCHIVE.parent.mkdir(exist_ok=True)
    # One after the other without a date: equal records have equal bytes, and what repeats takes no room.
    with tarfile.open(ARCHIVE, "w:xz") as archive:
        for path in graphs:
            for one in (path, path.with_suffix(".json")):
                held = tarfile.TarInfo(one.name)
                held.size = one.stat().st_size
                with one.open("rb") as file:
                    archive.addfile(held, file)
    return len(graphs)


if __name__ == "__main__":
    record(Path(__file__).parents[1] / ".pytest_cache" / "d" / "exports")

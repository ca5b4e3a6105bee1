"""A STAND-IN for Triton Inference Server and the module that it gives to Python models.

Written after NVIDIA's documentation, since no server can be installed here: it shows that our models
fit that description, not that a server takes them. Graphs run in plain onnxruntime, at the level of
optimization that their configuration names.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime as ort

from tests.delivery.triton_schema import ENUMS, parsed

TYPES = {
    **{"TYPE_FP16": np.float16, "TYPE_FP32": np.float32, "TYPE_UINT8": np.uint8},
    **{"TYPE_INT32": np.int32, "TYPE_INT64": np.int64, "TYPE_STRING": np.object_},
}
NAMES = {number: name for name, number in ENUMS["DataType"].items()}
BASIC = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC


@dataclass
class Tensor:
    name: str
    values: Any

    def as_numpy(self) -> Any:
        return self.values


@dataclass
class TritonError:
    text: str

    def message(self) -> str:
        return self.text


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error_: TritonError | None = None

    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.output_tensors, self.error_ = list(output_tensors), error

    def has_error(self) -> bool:
        return self.error_ is not None

    def error(self) -> TritonError | None:
        return self.error_


class StandIn:
    """A repository, loaded; also the module ``triton_python_backend_utils`` of its Python models."""

    TRITONSERVER_MEMORY_CPU = 0
    Tensor, TritonError, InferenceResponse = Tensor, TritonError, InferenceResponse

    def __init__(self, repository: Path) -> None:
        self.warnings: list[str] = []
        self.Logger = mock.Mock(log_warn=self.warnings.append)
        self.calls: list[str] = []
        folders = sorted(one for one in repository.iterdir() if one.is_dir())
        self.configs = {
            one.name: parsed((one / "config.pbtxt").read_text("utf-8")) for one in folders
        }
        self._runs = {one.name: self._opened(one, self.configs[one.name]) for one in folders}

    def _opened(self, folder: Path, config: Any) -> Any:
        assert config.name == folder.name and (folder / "1").is_dir()
        if config.backend == "onnxruntime":
            options = ort.SessionOptions()
            assert config.optimization.graph.level == -1
            options.graph_optimization_level = BASIC
            graph = folder / "1" / "model.onnx"
            file = graph / "model.onnx" if graph.is_dir() else graph
            return ort.InferenceSession(str(file), options, ["CPUExecutionProvider"])
        if config.backend == "python":
            spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            with mock.patch.dict(sys.modules, {"triton_python_backend_utils": self}):
                spec.loader.exec_module(module)
                model = module.TritonPythonModel()
                model.initialize({"model_name": folder.name, "model_version": "1"})
            return model
        assert config.platform == "ensemble"
        return None

    def PreferredMemory(self, kind: int, device: int) -> tuple[int, int]:
        return kind, device

    def InferenceRequest(
        self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], **_: Any
    ) -> Any:
        given = {one.name: one.values for one in inputs}

        def execute() -> InferenceResponse:
            outputs = self.infer(model_name, given)
            return InferenceResponse([Tensor(one, outputs[one]) for one in requested_output_names])

        return mock.Mock(exec=execute)

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, Any], name: str) -> Tensor | None:
        return Tensor(name, request[name]) if name in request else None

    @staticmethod
    def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor:
        return next(one for one in response.output_tensors if one.name == name)

    def infer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """The outputs of a request, checked as the server checks it; RuntimeError with its error."""
        config, run = self.configs[name], self._runs[name]
        self.calls.append(name)
        named = {one.name: one for one in config.input}
        assert set(given) <= set(named)
        assert {one.name for one in config.input if not one.optional} <= set(given)
        feeds = {key: self._checked(config, named[key], values) for key, values in given.items()}
        if config.platform == "ensemble":
            return self._ensemble(config, feeds)
        names = [one.name for one in config.output]
        if config.backend == "python":
            [response] = run.execute([feeds])
            if response.has_error():
                raise RuntimeError(response.error().message())
            outputs = {one.name: one.as_numpy() for one in response.output_tensors}
        else:
            outputs = dict(zip(names, run.run(names, feeds)))
        return {one.name: self._checked(config, one, outputs[one.name]) for one in config.output}

    def _checked(self, config: Any, tensor: Any, values: Any) -> Any:
        shape = list(np.shape(values))
        assert values.dtype == TYPES[NAMES[tensor.data_type]], (tensor.name, values.dtype)
        batch = []
        if config.max_batch_size:
            batch, shape = shape[:1], shape[1:]
            assert 1 <= batch[0] <= config.max_batch_size
        assert len(shape) == len(tensor.dims), (config.name, tensor.name, shape)
        assert all(wanted in (-1, size) for wanted, size in zip(tensor.dims, shape))
        inner = list(tensor.reshape.shape) if tensor.HasField("reshape") else shape
        return values.reshape(*batch, *inner)

    def _ensemble(self, config: Any, known: dict[str, Any]) -> dict[str, Any]:
        for step in config.ensemble_scheduling.step:
            given = {
                inner: known[outer] for inner, outer in step.input_map.items() if outer in known
            }
            outputs = self.infer(step.model_name, given)
            known |= {outer: outputs[inner] for inner, outer in step.output_map.items()}
        return {one.name: self._checked(config, one, known[one.name]) for one in config.output}

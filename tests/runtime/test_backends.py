"""The torch side of engines, with a FAKE of TensorRT and of torch.cuda: nothing of it is proven on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpq_deploy.errors import EngineError
from mpq_deploy.models.spec import DenoiserSpec, InputSpec
from tests.device import fake_tensorrt as fake
from tests.tiny_models import tiny_scheduler

torch = pytest.importorskip("torch")


class Stream:
    cuda_stream = 7

    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


class Graph:
    """Replaying repeats the call of ``context``."""

    made: list[Graph]
    context: Any = None

    def __init__(self) -> None:
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        Graph.context.execute_async_v3(7)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAKE: streams do nothing, a graph replays the call."""

    @contextmanager
    def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    Graph.made = []
    for name, value in {
        "Stream": Stream,
        "stream": nothing,
        "graph": nothing,
        "CUDAGraph": Graph,
        "current_stream": Stream,
        "get_device_capability": lambda device: (8, 9),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setitem(sys.modules, "fake_tensorrt", fake)


def backend(folder: Path, content: bytes) -> Any:
    from mpq_deploy.runtime.backends import EngineBackend

    (folder / "model.engine").write_bytes(content)
    spec = DenoiserSpec(
        name="m",
        source="m",
        sample=InputSpec(name="x", shape=(3,), dtype="float32"),
        timestep=InputSpec(name="t", shape=(), dtype="float32"),
        output="y",
        prediction_type="epsilon",
        scheduler=tiny_scheduler(),
    )
    return EngineBackend(folder / "model.engine", spec, torch.device("cpu"), "fake_tensorrt")


@pytest.mark.parametrize("content", [b"rtx", b"trt"])
def test_batches_are_split_and_outputs_are_the_callers_own(
    cuda: None, tmp_path: Path, content: bytes
) -> None:
    engine = backend(tmp_path, content)
    former = None
    for seed in range(3):
        torch.manual_seed(seed)
        x, t = torch.randn(6, 3), torch.arange(6.0)
        found = engine({"x": x, "t": t})
        assert torch.equal(found, 2 * x + t[:, None])
        if former is not None:
            assert torch.equal(former[0], former[1])
        former = (found, found.clone())


def test_tensorrts_calls_are_captured_once_their_shapes_are_settled(
    cuda: None, tmp_path: Path
) -> None:
    engine = backend(tmp_path, b"trt")
    Graph.context = engine._opened.context
    replays = []
    for count in (2, 2, 2, 2, 3, 3):
        x = torch.randn(count, 3)
        assert torch.equal(engine({"x": x, "t": torch.zeros(count)}), 2 * x)
        replays.append([graph.replays for graph in Graph.made])
    # The first call of a shape runs plainly; a graph of other shapes is never replayed.
    assert replays == [[], [1], [2], [3], [3], [3, 1]]


def test_rtx_captures_by_itself_and_its_cache_is_kept_per_shape(cuda: None, tmp_path: Path) -> None:
    engine = backend(tmp_path, b"rtx")
    for count in (2, 2, 3):
        engine({"x": torch.zeros(count, 3), "t": torch.zeros(count)})
    assert Graph.made == []
    assert (tmp_path / "model.runtime-cache").read_bytes() == b"fake:2,3;3,3"


def test_slots_for_loras_are_zero_until_they_are_filled(
    cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fake the input t stands for a slot."""
    from mpq_deploy.runtime import backends

    monkeypatch.setattr(backends, "is_slot", lambda name: name == "t")
    monkeypatch.setattr(fake.Engine, "get_tensor_shape", lambda *_: (2,))
    engine = backend(tmp_path, b"rtx")
    engine._opened.context.shapes["t"] = (2,)
    x = torch.randn(2, 3)
    assert torch.equal(engine({"x": x}), 2 * x) and engine.slots == {"t": (2,)}
    # Filled, they stay where they are bound.
    bound = engine._buffers["t"].data_ptr()
    engine.fill({"t": np.array([1, 2], np.float16)})
    engine({"x": x})
    assert engine._buffers["t"].tolist() == [1, 2] and engine._buffers["t"].data_ptr() == bound


def test_an_engine_of_another_gpu_is_refused(cuda: None, tmp_path: Path) -> None:
    (tmp_path / "build.json").write_text(
        '{"compute_capabilities": ["SM75"], "target": "rtx-turing"}', encoding="utf-8"
    )
    with pytest.raises(EngineError, match="the GPU here is SM89"):
        backend(tmp_path, b"rtx")

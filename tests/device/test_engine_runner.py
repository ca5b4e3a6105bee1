"""Buffers, CUDA graphs, the runtime cache, with a FAKE of TensorRT and of the GPU: nothing of it is proven on one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpq_deploy.device import engine_runner
from mpq_deploy.device.context import RUNTIME_CACHE, load_engine, open_context, refuse_other_gpu
from mpq_deploy.device.engine_runner import EngineRunner
from mpq_deploy.errors import EngineError
from tests.device import fake_tensorrt as fake


def engine_file(folder: Path, content: bytes = b"rtx") -> Path:
    path = folder / "model.engine"
    path.write_bytes(content)
    return path


def feeds(count: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((count, 3)).astype(np.float32),
        "t": np.arange(count, dtype=np.float32),
    }


@pytest.mark.rtx
def test_the_fake_has_no_name_that_the_real_bindings_lack() -> None:
    """What our code calls on the fake exists in the installed tensorrt_rtx, by name."""
    real = pytest.importorskip("tensorrt_rtx")
    for one in (
        *(
            fake.IRuntimeCache,
            fake.IRuntimeConfig,
            fake.IExecutionContext,
            fake.ICudaEngine,
            fake.Runtime,
        ),
        *(fake.TensorIOMode, fake.CudaGraphStrategy),
    ):
        theirs = getattr(real, one.__name__)
        ours = {
            name for base in one.__mro__[:-1] for name in vars(base) if not name.startswith("_")
        }
        missing = {name for name in ours if not hasattr(theirs, name)}
        assert missing == set(), (one.__name__, missing)
    assert hasattr(real, "nptype")


@pytest.mark.parametrize("content", [b"rtx", b"trt"])
@pytest.mark.parametrize("graphs", [False, True])
def test_outputs_follow_the_inputs_whatever_launches_them(
    tmp_path: Path, content: bytes, graphs: bool
) -> None:
    cuda: Any = fake.FakeCuda()
    runner = EngineRunner(fake, cuda, engine_file(tmp_path, content), None, graphs)
    assert runner.tensors() == (["x", "t"], ["y"])
    assert runner.usual_shape("x") == (2, 3)
    for count in (2, 3, 2):
        given = feeds(count, count)
        runner.bind(given)
        runner.call()
        np.testing.assert_array_equal(runner.output("y"), 2 * given["x"] + given["t"][:, None])
        assert runner.timed() == 1.5
    # TensorRT-RTX captures by itself; TensorRT's calls are captured here, anew for each binding.
    assert cuda.captured == (3 if graphs and content == b"trt" else 0)
    assert cuda.launched == 2 * cuda.captured


def test_slots_for_loras_are_zero_until_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fake the input t stands for a slot."""
    monkeypatch.setattr(engine_runner, "is_slot", lambda name: name == "t")
    runner = EngineRunner(fake, fake.FakeCuda(), engine_file(tmp_path), None)  # type: ignore[arg-type]
    given = feeds(2)
    for bound, added in (({"x"}, 0), ({"x", "t"}, 1), ({"x"}, 1)):
        runner.bind({name: values for name, values in given.items() if name in bound})
        runner.call()
        expected = 2 * given["x"] + added * given["t"][:, None]
        np.testing.assert_array_equal(runner.output("y"), expected)


def test_a_shape_or_type_that_the_engine_does_not_take_is_named(tmp_path: Path) -> None:
    runner = EngineRunner(fake, fake.FakeCuda(), engine_file(tmp_path), None)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"does not take x of shape \(5, 3\)"):
        runner.bind(feeds(5))
    with pytest.raises(EngineError, match="takes 'x' as float32, not float64"):
        runner.bind({"x": np.zeros((1, 3))})
    with pytest.raises(EngineError, match="cannot load"):
        EngineRunner(fake, fake.FakeCuda(), engine_file(tmp_path, b"other"), None)  # type: ignore[arg-type]


def test_what_was_compiled_is_there_at_the_next_start(tmp_path: Path) -> None:
    compiled = []
    for _ in range(2):
        runner = EngineRunner(fake, fake.FakeCuda(), engine_file(tmp_path), None)  # type: ignore[arg-type]
        runner.bind(feeds(2))
        runner.opened.keep_cache()
        compiled.append(runner.opened.context.compiled)
    assert compiled == [1, 0]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_cache_that_the_library_refuses_is_made_anew(tmp_path: Path) -> None:
    path = engine_file(tmp_path)
    path.with_name(RUNTIME_CACHE).write_bytes(b"of another GPU")
    opened = open_context(fake, fake.ICudaEngine(), path)
    assert opened.cache.resets == 1
    opened.keep_cache()
    assert path.with_name(RUNTIME_CACHE).read_bytes() == b"fake:"


def test_a_folder_that_cannot_be_written_only_costs_the_cache(tmp_path: Path) -> None:
    opened = open_context(fake, fake.ICudaEngine(), tmp_path / "gone" / "model.engine")
    with pytest.warns(UserWarning, match="runtime cache .* cannot be written"):
        opened.keep_cache()


def test_graphs_can_be_left_out(tmp_path: Path) -> None:
    path = engine_file(tmp_path)
    chosen = [
        open_context(fake, fake.ICudaEngine(), path, graphs).context.config
        for graphs in (True, False)
    ]
    assert [config.cuda_graph_strategy for config in chosen] == ["whole", "disabled"]


def test_an_altered_engine_is_refused_before_the_library_sees_it(tmp_path: Path) -> None:
    path = engine_file(tmp_path)
    (tmp_path / "build.json").write_text(
        json.dumps({"sha256": hashlib.sha256(b"rtx").hexdigest()}), encoding="utf-8"
    )
    EngineRunner(fake, fake.FakeCuda(), path, None)  # type: ignore[arg-type]
    # Another engine that would load.
    path.write_bytes(b"trt")
    with pytest.raises(EngineError, match="not the engine that build"):
        EngineRunner(fake, fake.FakeCuda(), path, None)  # type: ignore[arg-type]


def test_an_engine_of_another_gpu_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    path = engine_file(tmp_path, b"would not load")
    (tmp_path / "build.json").write_text(
        json.dumps({"compute_capabilities": ["SM120"], "target": "rtx-blackwell"}), encoding="utf-8"
    )
    with pytest.raises(
        EngineError, match=r"is for SM120 \(target rtx-blackwell\); the GPU here is SM89"
    ):
        EngineRunner(fake, fake.FakeCuda(), path, None)  # type: ignore[arg-type]
    refuse_other_gpu(path, "SM120")
    (tmp_path / "build.json").write_text(
        json.dumps({"compute_capabilities": [], "target": "tensorrt-10"}), encoding="utf-8"
    )
    refuse_other_gpu(path, "SM70")


def test_buffers_are_kept_for_calls_of_the_same_size_and_freed_at_the_end(tmp_path: Path) -> None:
    cuda: Any = fake.FakeCuda()
    runner = EngineRunner(fake, cuda, engine_file(tmp_path), None)
    runner.bind(feeds(2))
    count = len(cuda.kept)
    for rows in (2, 1, 3, 2):
        runner.bind(feeds(rows, seed=rows))
        assert len(cuda.kept) == count
    runner.close()
    assert not cuda.kept


def test_an_engine_that_streams_weights_keeps_what_the_library_proposes(tmp_path: Path) -> None:
    """A FAKE; the names are those of the library where it is installed."""
    engine = SimpleNamespace(streamable_weights_size=10)
    engine.get_weight_streaming_automatic_budget = lambda: 4
    opened = SimpleNamespace(deserialize_cuda_engine=lambda content: engine)
    (tmp_path / "x.engine").write_bytes(b"x")
    load_engine(SimpleNamespace(Runtime=lambda logger: opened), None, tmp_path / "x.engine")
    assert engine.weight_streaming_budget_v2 == 4
    library = pytest.importorskip("tensorrt_rtx").ICudaEngine
    assert all(hasattr(library, name) for name in vars(engine))

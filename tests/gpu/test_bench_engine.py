"""On a machine with an RTX GPU: bench times engines, graphs change no output. (Nothing here has run on one yet.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.bench.bench import Origin, Schedule, measure, results
from mpq_deploy.bench.sources import Wish, subject_of
from mpq_deploy.device.context import RUNTIME_CACHE
from mpq_deploy.device.cuda import Cuda, why_no_gpu
from mpq_deploy.device.engine_runner import EngineRunner
from mpq_deploy.engine.builder import ENGINE, BuildRequest, build_engine
from mpq_deploy.engine.target import load_target
from mpq_deploy.system.progress import Talk
from tests.engine.plans import FAMILIES, SIZE, profile, write_plan

pytestmark = [pytest.mark.gpu, pytest.mark.rtx]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    pytest.importorskip("tensorrt_rtx")
    if why_no_gpu():
        pytest.skip(why_no_gpu())
    if Cuda().compute_capability() not in load_target("rtx").compute_capabilities:
        pytest.skip("TensorRT-RTX has no engine for this GPU")
    written = write_plan(tmp_path, lambda number, layer: FAMILIES[number % len(FAMILIES)])
    build_engine(
        BuildRequest(written.model, load_target("rtx").build_target, profile()),
        tmp_path / "engine",
        written.expected,
        Talk(),
    )
    return tmp_path / "engine" / ENGINE


def test_an_engine_is_timed_and_its_cache_kept(engine: Path) -> None:
    subjects = [subject_of(engine, name, Wish(batch=2)) for name in ("ours", "other")]
    found = results(
        measure(subjects, Schedule(20, 5, 3), Talk()), Origin("m", "rtx", "trt-rtx", {})
    )
    assert found["latency"]["p50_ms"] > 0
    assert found["memory"]["taken_bytes"] > 0
    # The same engine twice.
    assert 0.5 < found["bench"]["ratio"]["value"] < 2
    assert engine.with_name(RUNTIME_CACHE).stat().st_size > 0


def test_graphs_and_shapes_change_no_output(engine: Path) -> None:
    import tensorrt_rtx

    rng, outputs = np.random.default_rng(0), []
    sample = rng.standard_normal((4, 3, SIZE, SIZE)).astype(np.float32)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.WARNING)
    for graphs in (False, True):
        runner = EngineRunner(tensorrt_rtx, Cuda(), engine, logger, graphs)
        for count in (4, 2, 4):
            feeds = {"sample": sample[:count], "timestep": np.full(count, 400.0)}
            runner.bind({name: values.astype(runner.dtype(name)) for name, values in feeds.items()})
            for _ in range(3):
                runner.call()
            outputs.append(runner.output("out_sample")[:2])
    for other in outputs[1:]:
        np.testing.assert_allclose(other, outputs[0], atol=1e-2)

"""On a machine with an RTX GPU: the engine that was built loads there. (Nothing here has run on one yet.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from mpq_deploy.engine.builder import ENGINE, BuildRequest, build_engine
from mpq_deploy.engine.target import load_target
from mpq_deploy.system.doctor import find_gpus, why_not_run
from mpq_deploy.system.progress import Talk
from tests.engine.plans import FAMILIES, profile, write_plan


@pytest.mark.gpu
@pytest.mark.rtx
def test_an_engine_of_every_scheme_loads_on_this_gpu(tmp_path: Path) -> None:
    target = load_target("rtx")
    against = why_not_run(target, find_gpus())
    if against:
        pytest.skip(against)
    import tensorrt_rtx

    written = write_plan(tmp_path, lambda number, layer: FAMILIES[number % len(FAMILIES)])
    build_engine(
        BuildRequest(written.model, target.build_target, profile()),
        tmp_path / "engine",
        written.expected,
        Talk(),
    )
    runtime = tensorrt_rtx.Runtime(tensorrt_rtx.Logger(tensorrt_rtx.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine((tmp_path / "engine" / ENGINE).read_bytes())
    assert engine is not None
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    assert names == {"sample", "timestep", "out_sample"}

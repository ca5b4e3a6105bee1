"""On a machine with an RTX GPU: the engine in the place of a UNet. (Nothing here has run on one yet.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from mpq_deploy.engine.target import load_target
from mpq_deploy.system.doctor import find_gpus, why_not_run
from tests.tiny_models import tiny_unet_folder


@pytest.mark.gpu
@pytest.mark.rtx
def test_the_engine_answers_as_onnxruntime_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    against = why_not_run(load_target("rtx"), find_gpus())
    if against or not torch.cuda.is_available():
        pytest.skip(against or "torch sees no CUDA device")
    import mpq_deploy

    folder = tiny_unet_folder(tmp_path)
    small = {
        "calibrate.samples": 8,
        "measure.samples": 2,
        "measure.calls": 2,
        "evaluate.samples": 2,
    }
    built = mpq_deploy.build(folder, budget=0.6, out=tmp_path / "run", settings=small, quiet=True)
    engine = mpq_deploy.load(built.run, backend="tensorrt_rtx")
    reference = mpq_deploy.load(built.run, backend="onnxruntime", device="cpu")
    sample, label = torch.randn(10, 3, 8, 8), torch.arange(10) % 5
    # Ten calls are more than the engine takes at once.
    found, expected = (unet(sample, 400, class_labels=label).sample for unet in (engine, reference))
    assert float((found - expected).square().sum() / expected.square().sum()) < 1e-2
    engine.backend.keep_cache()
    assert (built.run / "engine" / "model.runtime-cache").stat().st_size > 0

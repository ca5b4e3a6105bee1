"""Every class of pipeline: what our code records is what diffusers alone gives its denoiser, and so are the images."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from mpq_deploy.errors import MpqError
from mpq_deploy.models.export import export_denoiser
from mpq_deploy.runtime.ort import OrtDenoiser
from tests.oracle.comparison import compare, open_case
from tests.oracle.pipelines import BUILDERS, REFUSED, save_case

pytestmark = pytest.mark.torch
# Parts of the largest value: float32 in other layouts of memory, and what steps make of it.
INPUTS, IMAGES, EXPORTED = 1e-5, 1e-4, 1e-3
# A UNet of pixels, a transformer with constants of positions, and a video.
BY_GRAPH = ("DDIMPipeline", "FluxPipeline", "WanPipeline")


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in REFUSED])
def test_the_denoiser_is_given_what_diffusers_gives_it(name: str, tmp_path: Path) -> None:
    case = save_case(name, tmp_path)
    denoiser = open_case(case)
    found = compare(case, denoiser, denoiser.network.reference, tmp_path)
    assert found.inputs <= INPUTS
    assert found.images <= IMAGES


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_says_why_in_one_line(name: str, tmp_path: Path) -> None:
    case = save_case(name, tmp_path)
    with pytest.raises(MpqError, match=REFUSED[name]) as refusal:
        denoiser = open_case(case)
        compare(case, denoiser, denoiser.network.reference, tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", BY_GRAPH)
def test_the_exported_graph_makes_the_same_images(name: str, tmp_path: Path) -> None:
    case = save_case(name, tmp_path)
    denoiser = open_case(case)
    export_denoiser(denoiser, tmp_path / "export")
    session = OrtDenoiser(tmp_path / "export" / "model.onnx", denoiser.spec)
    found = compare(case, denoiser, session.run, tmp_path)
    assert found.images <= EXPORTED

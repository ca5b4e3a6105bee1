"""A pipeline run whole in float: what its parts are given is there for their graphs, whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.calls.whole_pipeline import PartCall, WholePipeline
from mpq_deploy.models.spec import Array
from tests.oracle.comparison import open_case
from tests.oracle.pipelines import save_case

pytestmark = pytest.mark.torch


def test_inputs_that_the_unet_takes_out_of_their_lists_are_there_for_its_graph(
    tmp_path: Path,
) -> None:
    case = save_case("StableDiffusionAdapterPipeline", tmp_path)
    spec = open_case(case).spec
    given: list[dict[str, Array]] = []

    def looked_at(call: PartCall) -> Array:
        given.append(call.feeds())
        return call.output

    whole = WholePipeline(case.folder, "unet", {"unet": spec}, ())
    plain = whole.image(0, 1, 3, {})
    assert np.array_equal(plain, whole.image(0, 1, 3, {"unet": looked_at}))
    names = [name for name in given[0] if name.startswith("down_intrablock_additional_residuals")]
    assert set(given[0]) == {item.name for item in spec.inputs} and names

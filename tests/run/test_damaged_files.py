"""Files of a run folder that a stranger made: each reader ends in one line that names the file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpq_deploy.allocate.plan import PrecisionPlan
from mpq_deploy.calibrate.shifted_inputs import shifted_layers
from mpq_deploy.calibrate.stats import CalibrationStats
from mpq_deploy.errors import MpqError
from mpq_deploy.evaluate.evaluation_result import Evaluation
from mpq_deploy.evaluate.metrics.kept import ImageMetrics
from mpq_deploy.evaluate.variants import read_controls
from mpq_deploy.graph.layers import LayerGraph
from mpq_deploy.latency.latency_table import LatencyTable
from mpq_deploy.recover.recovery_result import Recovery
from mpq_deploy.report.read import read_report
from mpq_deploy.runtime.correction import read_correction
from mpq_deploy.sensitivity.table import Importance, SensitivityTable
from mpq_deploy.system.files import read_sealed

JSON_READERS = {
    "plan.json": lambda folder: PrecisionPlan.load(folder / "plan.json"),
    "evaluation.json": Evaluation.load,
    "metrics.json": ImageMetrics.load,
    "controls.json": read_controls,
    "table.json": SensitivityTable.load,
    "latency.json": lambda folder: LatencyTable.load(folder / "latency.json"),
    "recovery.json": Recovery.load,
    "report.json": read_report,
    "correction.json": lambda folder: read_correction(folder / "correction.json"),
    "shifted.json": lambda folder: shifted_layers(LayerGraph(None, (), ()), folder),
    "sealed.json": lambda folder: read_sealed(folder / "sealed.json"),
}
TEXTS = {
    "list": "[1]",
    "text": '"a"',
    "number": "1e308",
    "null": "null",
    "wrong kinds": json.dumps(
        {"format": 1, "order": 3, "losses": [], "size_bytes": "a", "../x": 1}
    ),
    "negative": '{"size_bytes": -1, "ours": -1}',
    "deep": "[" * 100_000,
    "twice": '{"a": 1, "a": 2}',
    "nan": '{"a": NaN}',
    "cut": '{"a": ',
    "digits": '{"a": ' + "9" * 5000 + "}",
    "bytes": "\udcff\udcfe",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", JSON_READERS)
def test_json_of_another_form_names_the_file(tmp_path, name, text):
    for beside in ("images.npz", "projections.npz"):
        np.savez(tmp_path / beside, by_timestep=np.zeros((1, 1)))
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(MpqError) as caught:
        JSON_READERS[name](tmp_path)
    assert name in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 1000


ARRAY_READERS = (CalibrationStats.load, Importance.load)


@pytest.mark.parametrize("load", ARRAY_READERS, ids=lambda load: load.__self__.__name__)
@pytest.mark.parametrize("index", ['["a"]', "3", "[", '{"a": 1}'])
def test_arrays_of_another_form_name_the_file(tmp_path, load, index):
    path = tmp_path / "some.npz"
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(MpqError, match=r"some\.npz"):
        load(path)
    text = np.array(index)
    np.savez(path, index=text, layers=text, **{"0.scale": np.array(["x", "y"])})
    with pytest.raises(MpqError, match=r"some\.npz"):
        load(path)


def test_a_variant_of_text_is_no_variant():
    from mpq_deploy.evaluate.evaluation_result import _variant_from_json

    with pytest.raises(MpqError, match="a variant"):
        _variant_from_json(
            dict.fromkeys(("nmse_by_timestep", "psnr_db_each", "ssim_each"), "x")
            | {"psnr_db": 1, "pooled_psnr_db": 1}
        )

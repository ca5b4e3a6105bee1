"""Latency tables: what is written is read, and what is not of this target or no table is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.latency.latency_table import LatencyTable, LayerShape

SHAPE = LayerShape("Conv", (2, 8, 4, 4), (2, 16, 4, 4), (16, 8, 3, 3))
TABLE = LatencyTable(
    "rtx-ada", "a GPU", "tensorrt_rtx 1.7", "measured", 2, {(SHAPE, "fp16"): 0.25}, "2026-01-02"
)


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == TABLE


def test_the_date_is_kept_and_counts_for_no_digest() -> None:
    later = replace(TABLE, date="2027-01-01")
    assert later.digest_fields() == TABLE.digest_fields()
    assert replace(TABLE, device="another").digest_fields() != TABLE.digest_fields()
    assert replace(TABLE, entries={(SHAPE, "fp16"): 0.26}).digest_fields() != TABLE.digest_fields()


def test_a_table_of_another_target_or_batch_is_refused() -> None:
    TABLE.require("rtx-ada", 2)
    with pytest.raises(UsageError, match="rtx-ada, not of jetson-agx-orin"):
        TABLE.require("jetson-agx-orin", 2)
    with pytest.raises(UsageError, match="batch 2"):
        TABLE.require("rtx-ada", 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entries": [{"op": "Conv"}]}, "entries"),
        ({"source": "guessed"}, "source"),
        ({"format": 2}, "format"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_its_field(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    TABLE.save(path)
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8"
    )
    with pytest.raises(UsageError, match=words):
        LatencyTable.load(path)


@pytest.mark.parametrize("milliseconds", [0, -1, "NaN", "Infinity"])
def test_a_time_that_is_none_is_refused(milliseconds: object, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    TABLE.save(path)
    path.write_text(
        path.read_text(encoding="utf-8").replace("0.25", str(milliseconds)), encoding="utf-8"
    )
    with pytest.raises(UsageError, match="milliseconds"):
        LatencyTable.load(path)


def test_a_file_that_is_missing_or_cut_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        LatencyTable.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"format": 1, "entr', encoding="utf-8")
    with pytest.raises(UsageError, match="not JSON"):
        LatencyTable.load(tmp_path / "cut.json")

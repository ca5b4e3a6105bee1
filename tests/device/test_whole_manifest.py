"""The manifest of a whole pipeline's package: read back as it was written, and what of it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.device.archive import MANIFEST, ArchiveError, odd_parts
from mpq_deploy.device.whole_manifest import ReferenceImage, WholeManifest, is_whole
from mpq_deploy.engine.target import load_target

GRAPH = "components/unet/model.fp32.onnx"
PARTS = ("generation.json", "scheduler_config.json", "install.pyz", "build.sh", GRAPH)
GOOD = WholeManifest(
    name="tiny",
    made_by="0",
    target=load_target("onnxruntime-cpu").build_target,
    parts=dict.fromkeys((*PARTS, "reference/0.png", "tokenizer/tokenizer.json"), "0" * 64),
    components={"unet": 5},
    images=(ReferenceImage("reference/0.png", "abc", 4, 7.5, 0),),
    tolerance=1e-3,
    digests={"unet": {"quantize": "0" * 64}},
    alternatives={},
)


def load(folder: Path, change: Callable[[dict[str, Any]], object] = lambda values: None) -> Any:
    """Read the manifest after ``change``."""
    values = json.loads(GOOD.to_json())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
    return WholeManifest.load(folder / MANIFEST)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert load(tmp_path) == GOOD and is_whole(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": 1}', encoding="utf-8")
    assert not is_whole(tmp_path)


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda v: v.update(format=9),
    "unknown": lambda v: v.update(more=1),
    "no tolerance": lambda v: v.update(tolerance=0),
    "a tolerance for all": lambda v: v.update(tolerance=1e9),
    "a path": lambda v: v["parts"].update({"components/../../x": "0" * 64}),
    "code": lambda v: v["parts"].update({"components/unet/numpy.py": "0" * 64}),
    "a digest": lambda v: v["parts"].update({GRAPH: "x"}),
    "a component": lambda v: v["components"].update({"../x": 1}),
    "a component without a graph": lambda v: v["components"].update(transformer=1),
    "less than nothing": lambda v: v["components"].update(unet=-1),
    "an image elsewhere": lambda v: v["images"][0].update(file="../0.png"),
    "an image of no steps": lambda v: v["images"][0].update(steps=0),
    "many images": lambda v: v.update(images=v["images"] * 11),
    "a builder": lambda v: v["target"].update(builder="os"),
    "a name": lambda v: v.update(name="\x1b[2J"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_impossible_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError) as caught:
        load(tmp_path, WRONG[name])
    assert "\n" not in caught.value.message and "\x1b" not in caught.value.message


def test_the_parts_of_both_packages_are_a_closed_list() -> None:
    assert odd_parts(GOOD.parts) == []
    for name in ("x.py", "reference/10.png", "tokenizer_4/tokenizer.json", "components/vae/x"):
        assert odd_parts([*GOOD.parts, name]) == [name]
    assert odd_parts([name for name in GOOD.parts if name != "build.sh"]) == ["build.sh"]

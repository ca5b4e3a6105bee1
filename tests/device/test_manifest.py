"""A manifest that somebody wrote: its checks cannot be left out, and nothing of it runs."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpq_deploy.delivery.package import build_script
from mpq_deploy.device import installer
from mpq_deploy.device.archive import (
    MANIFEST,
    PROGRAMS,
    REQUIRED_PARTS,
    ArchiveError,
    check_parts,
    read_archive,
    write_archive,
)
from mpq_deploy.device.manifest import Manifest, Reference, tensor_name
from mpq_deploy.engine.build_target import BuildTarget
from mpq_deploy.engine.expected import ExpectedLayer, ExpectedLayers
from mpq_deploy.errors import InputError

TARGET = BuildTarget("rtx", "RTX", "trt-rtx", "tensorrt_rtx", ("1.",), "", ("SM86",))
LAYER = ExpectedLayer("conv", "Conv", ("/conv",), "w8a8", 100, 4, 36, (3, 3))
GOOD = Manifest(
    name="m",
    made_by="0.1.0",
    target=TARGET,
    model="model.onnx",
    parts=dict.fromkeys(sorted(REQUIRED_PARTS), "0" * 64),
    expected=ExpectedLayers((LAYER,), 100),
    fp16_bytes=200,
    batches=(1, 1, 2),
    shapes={"sample": (4, 8, 8)},
    reference=Reference("reference.npz", ("small",), ("sample",), "out", "ORT", 1e-6, 1e-4),
    digests={"allocate": "0"},
    alternatives={"rtx-ada": ("1.",)},
    versions={"numpy": "2"},
)


def written(values: dict[str, Any], folder: Path) -> Path:
    path = folder / MANIFEST
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def changed(place: str, value: Any) -> dict[str, Any]:
    """The good manifest with another ``value`` at ``place``; ... removes it."""
    values: dict[str, Any] = json.loads(GOOD.to_json())
    *path, last = place.split(".")
    inner: Any = values
    for key in path:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[int(last) if isinstance(inner, list) else last] = value
    return values


def test_a_good_manifest_is_read_back(tmp_path: Path) -> None:
    assert Manifest.load(written(json.loads(GOOD.to_json()), tmp_path)) == GOOD


FORGED: list[tuple[str, Any]] = [
    # Checks switched off.
    ("parts", {}),
    ("parts.model.onnx", ...),
    ("parts.evil.py", "0" * 64),
    ("parts.model.onnx", "x"),
    ("expected.layers", []),
    ("expected.layers.0.nodes", []),
    ("expected.layers.0.scheme", "w1a1"),
    ("expected.layers.0.bytes", 0),
    ("expected.total_bytes", 0),
    ("reference.cases", []),
    ("reference.inputs", []),
    ("reference.inputs", ["other"]),
    ("reference.tolerance_nmse", 1e308),
    ("reference.tolerance_nmse", 0.2),
    ("reference.tolerance_nmse", 0),
    ("reference.tolerance_nmse", "0.1"),
    ("reference.cases", ["a", "a"]),
    # Names that would become paths, modules or shell code.
    ("model", "../../home/model.onnx"),
    ("model", "/etc/passwd"),
    ("reference.file", "../reference.npz"),
    ("reference.cases", ["../../case"]),
    ("target.builder", "evil.x"),
    ("target.builder", "none"),
    ("target.builder", "os"),
    ("target.name", "rtx\ntouch /tmp/owned"),
    ("target.name", "$(touch /tmp/owned)"),
    ("target.dialect", "x\n"),
    ("target.versions", ["1; touch x"]),
    ("alternatives", {"a b": ["1."]}),
    ("shapes", {"sample,other:1": [4, 8, 8]}),
    ("shapes", {"sample --plugins=x.so": [4, 8, 8]}),
    ("reference.output", "out\x1b"),
    # Other kinds of values.
    ("shapes.sample", [4, -8, 8]),
    ("shapes.sample", "448"),
    ("batches", [2, 1, 1]),
    ("batches", [1, 1, 10**9]),
    ("batches", [1, 1]),
    ("fp16_bytes", -1),
    ("target", []),
    ("expected.layers.0", None),
    ("reference", ...),
    ("unknown", 1),
    ("format", 2),
]


@pytest.mark.parametrize(("place", "value"), FORGED, ids=[f"{a}={b!r}"[:50] for a, b in FORGED])
def test_a_forged_manifest_is_refused_in_one_line(place: str, value: Any, tmp_path: Path) -> None:
    if place.startswith("parts."):
        values = json.loads(GOOD.to_json())
        name = place.removeprefix("parts.")
        values["parts"] = {k: v for k, v in values["parts"].items() if k != name}
        values["parts"] |= {} if value is ... else {name: value}
    else:
        values = changed(place, value)
    with pytest.raises(ArchiveError) as caught:
        Manifest.load(written(values, tmp_path))
    assert "\n" not in caught.value.message and "\x1b" not in caught.value.message


@pytest.mark.parametrize("name", sorted(REQUIRED_PARTS - PROGRAMS))
def test_no_part_is_left_out_for_another(name: str) -> None:
    parts = {**GOOD.parts, "correction.json": "0" * 64}
    replace(GOOD, parts=parts).check()
    del parts[name]
    with pytest.raises(ValueError, match=rf"not those of a package: {name}"):
        replace(GOOD, parts=parts).check()


BRANCHED = replace(
    GOOD,
    expected=ExpectedLayers(
        (
            LAYER,
            replace(LAYER, name="lin", op="MatMul", scheme="w4a16-b32"),
            replace(LAYER, name="lin/lowrank_down", op="MatMul", scheme="fp16"),
        ),
        300,
    ),
)
PLANS: dict[str, tuple[dict[str, str], str]] = {
    "nothing": ({}, "which the plan does not have"),
    "a layer less": ({"conv": "w8a8"}, "'lin', which the plan does not have"),
    "a layer more": (
        {"conv": "w8a8", "lin": "w4a16-b32+lowrank8", "x": "fp16"},
        "'x' as no layer",
    ),
    "another scheme": (
        {"conv": "fp16", "lin": "w4a16-b32+lowrank8"},
        "w8a8, and the plan says fp16",
    ),
    "no branch": ({"conv": "w8a8", "lin": "w4a16-b32"}, "lowrank_down', which the plan"),
    "unknown": ({"conv": "w1a1", "lin": "w4a16-b32"}, "unknown"),
}


def test_the_plan_fits_what_is_expected() -> None:
    BRANCHED.check_plan({"conv": "w8a8", "lin": "w4a16-b32+lowrank8"})


@pytest.mark.parametrize(("schemes", "words"), PLANS.values(), ids=PLANS)
def test_layers_that_the_plan_does_not_have_are_refused(
    schemes: dict[str, str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        BRANCHED.check_plan(schemes)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"format": 1}', '{"a":' * 500])
def test_what_is_no_manifest_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ArchiveError) as caught:
        Manifest.load(tmp_path / MANIFEST)
    assert str(tmp_path) in str(caught.value) or MANIFEST in str(caught.value)


def test_an_archive_with_code_of_its_own_is_not_unpacked(tmp_path: Path) -> None:
    parts = dict.fromkeys(REQUIRED_PARTS, b"x") | {MANIFEST: b"{}"}
    archive = tmp_path / "a.mpq.tar"
    write_archive(archive, {**parts, "numpy.py": b"raise SystemExit(9)"})
    with pytest.raises(ArchiveError, match=r"numpy\.py"):
        installer.unpack(archive, tmp_path / "out", installer.Talk())
    assert not (tmp_path / "out").exists()
    for lacking in ("plan.json", *PROGRAMS):
        write_archive(archive, {name: part for name, part in parts.items() if name != lacking})
        with pytest.raises(ArchiveError, match=re.escape(lacking)):
            check_parts(read_archive(archive), archive)


def test_a_part_that_is_a_link_is_not_the_part(tmp_path: Path) -> None:
    for name in REQUIRED_PARTS:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "elsewhere").write_bytes(b"x")
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model.onnx").symlink_to("elsewhere")
    with pytest.raises(ArchiveError, match=r"'model\.onnx' is missing"):
        digests = dict.fromkeys(sorted(REQUIRED_PARTS), hashlib.sha256(b"x").hexdigest())
        installer.check_unpacked(tmp_path, replace(GOOD, parts=digests))


def test_values_of_the_script_are_filled_in_once() -> None:
    """A value that looks like another's place stays as it is."""
    script = build_script(replace(GOOD, model="@SHAPES@", alternatives={"@MODEL@": ("1.",)}))
    assert "--onnx=@SHAPES@" in script
    assert "--target @MODEL@" in script


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a\nb", "'a'", "$(x)", "a=b", "\u202e"])
def test_names_that_trtexec_cannot_be_given_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        tensor_name(name)
    for good in ("sample", "/down/x.0:0", "encoder_hidden_states"):
        assert tensor_name(good) == good

"""Targets: every shipped file loads, the rules of each hold, and a user's own file is read the same way."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpq_deploy.engine.build_target import version_fits
from mpq_deploy.engine.expected import ExpectedLayers
from mpq_deploy.engine.target import Target, known_targets, load_target
from mpq_deploy.engine.target_text import describe_target
from mpq_deploy.errors import UsageError
from mpq_deploy.formats.scheme import FAMILIES, SCHEMES, schemes_named
from mpq_deploy.graph.layers import LAYER_OPS, Layer, LayerUse

USE = (LayerUse("node", "x", "y"),)


def conv(*shape: int, group: int = 1) -> Layer:
    return Layer("conv", "Conv", "conv.weight", shape, 0, group, USE)


def matmul(k: int, n: int) -> Layer:
    return Layer("fc", "MatMul", "fc.weight", (k, n), 1, 1, USE)


@pytest.mark.parametrize("name", known_targets())
def test_every_shipped_target_loads_and_explains_what_it_leaves_out(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.proven, "a target says what is proven"
    for layer in (conv(64, 64, 3, 3), matmul(64, 64)):
        for scheme in SCHEMES.values():
            kinds = target.branches.get(layer.op, ())
            allowed = scheme.family in target.schemes[layer.op] and (
                not scheme.branch or scheme.branch.kind in kinds
            )
            assert bool(target.refusal(layer, scheme)) != allowed


@pytest.mark.parametrize("name", known_targets())
def test_a_scheme_that_is_not_offered_names_the_nearest(name: str) -> None:
    target = load_target(name)
    layer = matmul(64, 64)
    for scheme in SCHEMES.values():
        if scheme.quantized and scheme.family not in target.schemes["MatMul"]:
            reason, _, nearest = target.refusal(layer, scheme).rpartition("; nearest: ")
            assert reason and any(not target.refusal(layer, s) for s in schemes_named([nearest]))


@pytest.mark.parametrize(
    ("target", "scheme", "says"),
    [
        ("rtx", "w2a4-sim", "2-bit weights do not exist in TensorRT; nearest: w4a8"),
        ("rtx", "w4a6-sim", "6-bit activations do not exist in TensorRT; nearest: w4a8"),
        ("rtx", "w8a8-sim", "simulated, with zero points and nominal bytes"),
        ("rtx", "w4a8-sim+omq", "channels different bits"),
        ("simulate", "w8a16", "nearest: w8a16-sim"),
        ("simulate", "w4a8-b64", "nearest: w4a8-sim"),
        ("tensorrt-10", "w8a16", "unproven); nearest: w8a8"),
    ],
)
def test_refusals_say_why_and_what_is_nearest(target: str, scheme: str, says: str) -> None:
    assert says in load_target(target).refusal(matmul(64, 64), SCHEMES[scheme])


def test_simulated_schemes_never_reach_a_builder(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: simulate\nname: mine\nbuilder: tensorrt_rtx\n", encoding="utf-8")
    with pytest.raises(UsageError, match="never reach a builder"):
        load_target(file)
    layer = matmul(64, 64)
    with pytest.raises(ValueError, match="no engine can hold"):
        ExpectedLayers.of([layer], {layer.name: SCHEMES["w2a4-sim"]}, 1000)


@pytest.mark.parametrize("name", known_targets())
def test_figures_name_their_source(name: str) -> None:
    target = load_target(name)
    for figure in (
        target.memory_bytes,
        target.bandwidth_bytes_per_s,
        target.int8_ops_per_s,
        target.fp16_ops_per_s,
    ):
        assert figure is None or (figure.value > 0 and len(figure.source) > 10)


def test_depthwise_convolutions_never_compute_in_int8() -> None:
    depthwise = conv(32, 1, 3, 3, group=32)
    for name in known_targets():
        target = load_target(name)
        if target.dialect == "onnxruntime":
            continue
        for family in ("w8a8", "w4a8"):
            assert target.refusal(depthwise, schemes_named([family])[0])
    assert not load_target("rtx").refusal(depthwise, SCHEMES["w8a16"])
    assert not load_target("rtx").refusal(conv(64, 2, 3, 3, group=32), SCHEMES["w8a8"])


def test_int4_needs_an_even_number_of_elements_on_rtx() -> None:
    rtx = load_target("rtx")
    assert "odd" in rtx.refusal(conv(3, 3, 3, 3), SCHEMES["w4a16-b32"])
    assert "odd" in rtx.refusal(matmul(27, 45), SCHEMES["w4a8-b32"])
    assert not rtx.refusal(conv(64, 3, 3, 3), SCHEMES["w4a16-b32"])
    assert not rtx.refusal(matmul(27, 45), SCHEMES["w8a8"])


def test_rows_that_leave_an_odd_body_are_no_candidates() -> None:
    rtx, orin = load_target("rtx"), load_target("jetson-agx-orin")
    # Of 32 channels, 3 or 15 are promoted: 29 or 17 rows of 27 are left, of 6 they are 26.
    assert "odd" in rtx.refusal(conv(32, 3, 3, 3), SCHEMES["w4a16-b32+rows1"])
    assert "odd" in rtx.refusal(conv(32, 3, 3, 3), SCHEMES["w4a8-b32+rows5"])
    assert not rtx.refusal(conv(32, 3, 3, 3), SCHEMES["w4a16-b32+rows2"])
    assert not rtx.refusal(conv(32, 4, 3, 3), SCHEMES["w4a16-b32+rows1"])
    # TensorRT proper wants the last dimension even, which for a weight [in, out] holds the channels that are left.
    assert "odd" in orin.refusal(matmul(64, 32), SCHEMES["w4a16-b32+rows1"])
    assert "odd" not in orin.refusal(matmul(64, 32), SCHEMES["w4a16-b32+rows2"])


def test_the_reason_for_leaving_a_family_out_comes_before_that_of_a_special_case() -> None:
    orin = load_target("jetson-agx-orin")
    assert "requantized" in orin.refusal(conv(32, 1, 3, 3, group=32), SCHEMES["w4a8-b64"])
    assert "odd" in orin.refusal(matmul(64, 45), SCHEMES["w4a16-b64"])
    assert not orin.refusal(matmul(64, 46), SCHEMES["w4a16-b64"])


def test_turing_has_neither_int4_nor_int8_convolutions() -> None:
    turing = load_target("rtx-turing")
    assert "FP16" in turing.refusal(conv(64, 64, 3, 3), SCHEMES["w8a8"])
    assert "SM75" in turing.refusal(matmul(64, 64), SCHEMES["w4a16-b32"])
    assert not turing.refusal(matmul(64, 64), SCHEMES["w8a8"])


def test_an_unknown_target_names_the_nearest_and_lists_all() -> None:
    with pytest.raises(UsageError) as caught:
        load_target("jetson-agx-orion")
    assert "Did you mean 'jetson-agx-orin'?" in caught.value.hint
    assert all(name in caught.value.hint for name in known_targets())


def test_a_users_file_extends_a_shipped_target_and_may_allow_what_it_forbids(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "extends: jetson-agx-orin\nname: my-orin\nversions: ['10.16']\n"
        "schemes: {Conv: [fp16, w8a8, w4a8]}\n"
        "rules: [{ops: [Conv], families: [w8a8], when: conv3d, reason: tried on my board}]\n",
        encoding="utf-8",
    )
    mine = load_target(file)
    assert (mine.name, mine.versions, mine.dialect) == ("my-orin", ("10.16",), "trt-10.3")
    assert not mine.refusal(conv(64, 64, 3, 3), SCHEMES["w4a8-b64"])
    assert mine.refusal(conv(64, 64, 3, 3, 3), SCHEMES["w8a8"]) == "tried on my board"
    assert mine.refusal(matmul(64, 64), SCHEMES["w4a8-b64"]), "the other ops keep their rules"
    assert load_target(str(file)) == mine


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: rtx\ntitel: x\n", "titel: there is no such field. Did you mean 'title'?"),
        ("extends: rtx\nversions: [ten]\n", "'ten' is not of the form"),
        ("extends: rtx\nversions: [10.3]\n", "versions.0"),
        ("extends: rtx\ncompute_capabilities: [8.7]\n", "compute_capabilities.0"),
        ("extends: rtx\ncompute_capabilities: ['8.7']\n", "'8.7' is not of the form SM87"),
        ("extends: rtx\nmemory_bytes: {value: -1, source: mine}\n", "memory_bytes.value"),
        ("extends: rtx\nmemory_bytes: {value: .inf, source: mine}\n", "memory_bytes.value"),
        ("extends: rtx\ndialect: trt-9\n", "(found 'trt-9')"),
        ("extends: rtx\nname: 3\n", "name: Input should be a valid string (found 3)"),
        ("extends: rtx\nschemes: {Conv: [fp16, w8a9]}\n", "Did you mean 'w8a8'?"),
        ("extends: rtx\nschemes: {Conv: [fp16]}\n", "leaves out w8a8, w8a16, w4a16, w4a8"),
        ("extends: rtx\nschemes: {Gemm: [w8a8, w8a16, w4a16, w4a8]}\n", "must list fp16"),
        ("extends: rtx\nschemes: {Cnov: [fp16]}\n", "Did you mean 'Conv'?"),
        ("extends: rtxx\n", "extends 'rtxx'"),
        ("extends: [rtx]\n", "extends '['rtx']'"),
        ("name: bare\n", "title: Field required"),
        ("- rtx\n", "holds list"),
        ("a: [1\n", "is not usable YAML"),
        ("extends: rtx\nrules: 3\n", "rules"),
        ("extends: rtx\nschemes: 3\n", "schemes"),
        ("", "holds NoneType"),
    ],
)
def test_a_users_wrong_file_is_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_target(file)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        load_target(tmp_path / "none.yaml")


def test_the_words_of_the_targets_are_those_of_the_schemes() -> None:
    assert set(Target.model_validate(load_target("rtx").model_dump()).schemes) == set(LAYER_OPS)
    assert set(load_target("rtx").schemes["Conv"]) == set(FAMILIES)


@pytest.mark.parametrize("name", known_targets())
def test_a_target_prints_in_80_columns_with_its_reasons_and_doubts(name: str) -> None:
    target = load_target(name)
    text = describe_target(target)
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    # Of what a target extends, the reasons why it lacks what this one lists are no longer said.
    rules = [
        rule
        for rule in target.rules
        if rule.when != "always"
        or any(f not in target.schemes[op] for op in rule.ops for f in rule.families)
    ]
    for said in (*(rule.reason for rule in rules), *(one.what for one in target.proven)):
        assert " ".join(said.split()) in flat
    figures = (
        target.memory_bytes,
        target.bandwidth_bytes_per_s,
        target.int8_ops_per_s,
        target.fp16_ops_per_s,
        target.fp8_ops_per_s,
        target.fp4_ops_per_s,
    )
    assert text.count("(unconfirmed)") == sum(
        figure is not None and not figure.confirmed for figure in figures
    )


@pytest.mark.parametrize(
    "name", [name for name in known_targets() if name.startswith(("jetson", "rtx"))]
)
def test_every_device_has_its_figures(name: str) -> None:
    target = load_target(name)
    assert target.memory_bytes is not None
    assert target.bandwidth_bytes_per_s is not None
    assert target.int8_ops_per_s is not None
    assert target.fp16_ops_per_s is not None
    assert target.int8_ops_per_s.value >= target.fp16_ops_per_s.value
    assert target.compute_capabilities
    assert target.versions


def test_each_jetpack_has_a_target_of_its_own_and_no_version_belongs_to_two() -> None:
    jetsons = [load_target(name) for name in known_targets() if name.startswith("jetson")]
    for version, dialect in (
        ("10.3.0", "trt-10.3"),
        ("10.13.3", "trt-10.13"),
        ("11.4.1", "trt-11"),
    ):
        found = {target.dialect for target in jetsons if target.build_target.takes_version(version)}
        assert found == {dialect}
    assert all(target.jetpack for target in jetsons)


@pytest.mark.parametrize(
    ("version", "wanted", "same"),
    [
        ("10.3.0", "10.3", True),
        ("10.30.1", "10.3", False),
        ("10.13.3", "10.1", False),
        ("1.7.1.116", "1.", True),
        ("11.4.1", "11.", True),
        ("10.3", "10.3.0", False),
    ],
)
def test_versions_match_number_by_number(version: str, wanted: str, same: bool) -> None:
    assert version_fits(version, (wanted,)) is same

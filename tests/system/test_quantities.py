"""Budgets and latencies as users write them."""

from __future__ import annotations

import pytest

from mpq_deploy.errors import UsageError
from mpq_deploy.recipe import load_recipe
from mpq_deploy.system.quantities import Budget, ImageSize, ImageSizes, Latency


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("0.35", 350), ("35%", 350), (0.35, 350), ("1", 1000), ("100 %", 1000)),
        *(
            ("600B", 600),
            ("1kB", 1000),
            ("1KiB", 1024),
            ("0.6 kB", 600),
            ("8bits", 400),
            ("4.5 bits", 225),
        ),
    ],
)
def test_budgets_as_a_user_writes_them(text: str | float, expected: int) -> None:
    budget = Budget.parse(text)
    assert budget.bytes(1000, 400) == expected
    assert str(budget) == str(text) and Budget.parse(budget) is budget


@pytest.mark.parametrize(
    "text", ["0", "-1", "40", "abc", "", "nan", "inf", "120%", "0%", "0MB", "MB", "4.5 bytes"]
)
def test_a_budget_that_is_no_size_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(UsageError, match=f"budget '{text}'"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            ("120ms", 120_000_000),
            ("0.12 s", 120_000_000),
            ("0.12s", 120_000_000),
            ("1.2s", 1_200_000_000),
        ),
        *(("850us", 850_000), ("850µs", 850_000), ("0.85ms", 850_000), (" 1e2 ms ", 100_000_000)),
    ],
)
def test_latencies_as_a_user_writes_them(text: str, expected: int) -> None:
    latency = Latency.parse(text)
    assert latency.nanoseconds == expected
    assert latency.milliseconds == pytest.approx(expected / 1e6)
    assert Latency.parse(latency) is latency


@pytest.mark.parametrize(
    "text", ["120", "fast", "-1ms", "-3ms", "0ms", "nan ms", "ms", "", "120min", "1e999", "1e999s"]
)
def test_a_latency_that_is_no_time_is_refused_with_what_was_found(text: str) -> None:
    with pytest.raises(UsageError, match=f"Invalid latency '{text}'"):
        Latency.parse(text)


def test_a_recipe_keeps_both_as_they_were_written() -> None:
    recipe = load_recipe(None, {"budget": 0.4, "allocate.max_latency": "850us"})
    assert recipe.budget == Budget.parse("0.4")
    assert recipe.allocate.max_latency == Latency.parse("850us")
    written = recipe.model_dump(mode="json")
    assert (written["budget"], written["allocate"]["max_latency"]) == ("0.4", "850us")
    with pytest.raises(UsageError, match="Invalid latency 'soon'"):
        load_recipe(None, {"allocate.max_latency": "soon"})


def test_sizes_as_a_user_writes_them() -> None:
    sizes = (ImageSize(512, 512), ImageSize(768, 512))
    for given in ("512x512,768x512", ["512x512", " 768x512 "], sizes):
        assert ImageSizes.parse(given).listed == sizes
    recipe = load_recipe(None, {"sizes": "512x512,768x512"})
    assert recipe.sizes.listed == sizes and "sizes:\n- 512x512\n- 768x512" in recipe.to_yaml()
    assert not load_recipe(None).sizes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("512", "Invalid size '512'"),
        ("512x0", "Invalid size '512x0'"),
        ("512*512", "Give WIDTHxHEIGHT"),
        ("8x8,8x8", "8x8 is named twice"),
        (512, "Invalid sizes '512'"),
        ("8x8:16", "Invalid size '16'"),
        ("8x8:16x16:0", "Invalid range of sizes '8x8:16x16:0'"),
        ("8x8:16x16:4:4", "Give FROM:TO or FROM:TO:STEP"),
        ("16x8:8x16", "8x16 is not above 16x8"),
        ("8x8:8x8", "holds no sizes"),
        ("8x24,8x8:16x16", "8x24 is outside 8x8:16x16"),
        ("8x8:16x16,8x8:12x12", "Two ranges"),
    ],
)
def test_sizes_that_are_none_are_refused(given: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ImageSizes.parse(given)


def test_a_range_of_sizes_has_its_corners_the_usual_size_first() -> None:
    for text, listed, step in (
        ("8x8:16x12", "8x8 16x12 16x8 8x12", 0),
        ("8x8:16x8:4", "8x8 16x8", 4),
        ("12x8,8x8:16x8", "12x8 8x8 16x8", 0),
    ):
        sizes = ImageSizes.parse(text)
        assert [str(one) for one in sizes] == listed.split() and sizes.step == step
        recipe = load_recipe(None, {"sizes": text})
        assert recipe.sizes == sizes == ImageSizes.parse(recipe.model_dump(mode="json")["sizes"])

"""The grid holds each image, upscaled, where its row and column say."""

import numpy as np
import pytest
from PIL import Image

from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.grid import GridStyle, image_grid, save_grid


def images(seed, count=3, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, channels), np.uint8)


def test_every_pixel_is_there_upscaled_without_smoothing():
    style = GridStyle(cell=32)
    rows = {"float": images(0), "ours": images(1)}
    grid = np.asarray(image_grid(rows, ("a", "b", "c"), style))
    bottom = grid.shape[0] - style.margin - 32
    right = grid.shape[1] - style.margin - 32
    tile = grid[bottom : bottom + 32, right : right + 32]
    assert np.array_equal(tile[::4, ::4], rows["ours"][2])
    assert np.array_equal(tile[3::4, 3::4], rows["ours"][2])
    above = grid[bottom - 32 - style.gap : bottom - style.gap, right : right + 32]
    assert np.array_equal(above[::4, ::4], rows["float"][2])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels(channels):
    grid = image_grid({"x": images(0, channels=channels)})
    style = GridStyle()
    assert grid.height == 2 * style.margin + style.gap + style.cell
    assert grid.mode == "RGB"


def test_long_labels_do_not_widen_the_columns():
    rows = {"float": images(0)}
    short = image_grid(rows, ("a", "b", "c"))
    long = image_grid(
        rows, ("grinning face with very big eyes and an extraordinarilylongword " * 3, "b", "c")
    )
    assert long.width == short.width
    assert long.height > short.height


def test_saved_file_is_the_same_each_time(tmp_path):
    (tmp_path / "deep").mkdir()
    first = save_grid(tmp_path / "deep" / "a.png", {"x": images(0)}, ("ü", "é", "文"))
    second = save_grid(tmp_path / "b.png", {"x": images(0)}, ("ü", "é", "文"))
    assert first.read_bytes() == second.read_bytes()
    assert Image.open(first).format == "PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.png", "deep"]


def test_nothing_to_draw_is_refused():
    with pytest.raises(UsageError, match="no images"):
        image_grid({})
    with pytest.raises(UsageError, match="differ"):
        image_grid({"a": images(0), "b": images(0, count=2)})

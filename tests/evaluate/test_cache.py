"""Entries of the cache of samples: an altered one is made again, wherever the damage is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.evaluate.cache import SampleCache
from mpq_deploy.system.progress import Talk

KEY = {"model": "a", "steps": 20}
# Larger than what a reader of archives takes at once, so that a header that asks for less would go unnoticed.
ARRAYS = {
    "images": np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32),
    "t": np.arange(9.0),
}


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    SampleCache(tmp_path / "cache", Talk()).keep(KEY, ARRAYS)
    return next((tmp_path / "cache").iterdir())


def found(entry: Path) -> dict[str, np.ndarray] | None:
    return SampleCache(entry.parent, Talk()).find(KEY)


def test_what_was_kept_is_found_and_numpy_reads_it(entry: Path) -> None:
    kept = found(entry)
    assert kept is not None and kept.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(kept[name], array)
        assert kept[name].dtype == array.dtype
    with np.load(entry, allow_pickle=False) as data:
        np.testing.assert_array_equal(data["images"], ARRAYS["images"])


def test_every_flipped_bit_of_the_headers_is_noticed(entry: Path) -> None:
    """A header that asks for less than there is keeps NumPy from ever looking at the checksum."""
    whole = entry.read_bytes()
    ends = [*range(250), *range(len(whole) - 600, len(whole))]
    places = [*ends, *np.random.default_rng(1).integers(0, len(whole), 20)]
    for number, place in enumerate(places):
        content = bytearray(whole)
        content[place] ^= 1 << number % 8
        entry.write_bytes(content)
        assert found(entry) is None, place
    entry.write_bytes(whole)
    assert found(entry) is not None


@pytest.mark.parametrize("kept", [0, 1, 31, 32, 33, 5000, -33, -1])
def test_an_entry_that_ends_early_is_noticed(entry: Path, kept: int) -> None:
    entry.write_bytes(entry.read_bytes()[:kept])
    assert found(entry) is None


def test_a_shape_that_asks_for_less_is_noticed(entry: Path) -> None:
    """The alteration that NumPy alone takes for whole."""
    whole = entry.read_bytes()
    assert whole.count(b"'shape': (8, 3, 32, 32)") == 1
    entry.write_bytes(whole.replace(b"'shape': (8, 3, 32, 32)", b"'shape': (2, 3, 32, 32)"))
    with np.load(entry, allow_pickle=False) as data:
        assert data["images"].shape == (2, 3, 32, 32)
    assert found(entry) is None

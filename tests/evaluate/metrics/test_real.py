"""Real images: folders, arrays and statistics, and every way in which they do not fit."""

import numpy as np
import pytest
from PIL import Image

from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.metrics.frechet import Moments, frechet_distance
from mpq_deploy.evaluate.metrics.networks import NetworkOptions
from mpq_deploy.evaluate.metrics.real import read_folder, real_set


class Tiny:
    """Four features: the mean of each quarter of the rows."""

    name, digest, width, title = "tiny", "d", 4, "Frechet distance (tiny)"

    def features(self, images):
        return images.reshape(len(images), 4, -1).mean(axis=2).astype(np.float64)


def pictures(count, side=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(
        0, 256, (count, side, side, channels), dtype=np.uint8
    )


def save_folder(folder, images):
    folder.mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels.squeeze()).save(folder / f"{i:03}.png")
    return folder


def taken(path, shape=(8, 8, 3)):
    return real_set(path, Tiny(), NetworkOptions(), shape)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_and_an_npz_of_the_same_images_agree(tmp_path, channels):
    images = pictures(20, channels=channels)
    folder = save_folder(tmp_path / "real", images)
    np.testing.assert_array_equal(read_folder(folder, images.shape[1:]), images)
    np.savez(tmp_path / "real.npz", images=images)
    first, second = taken(folder, images.shape[1:]), taken(tmp_path / "real.npz", images.shape[1:])
    np.testing.assert_array_equal(first.features, second.features)
    assert first.digest == second.digest
    assert first.floor_count == 10
    assert first.floor > 0


def test_statistics_are_taken_in_both_spellings(tmp_path):
    found = Moments.of(Tiny().features(pictures(50)))
    np.savez(tmp_path / "ours.npz", mean=found.mean, cov=found.covariance, count=50)
    np.savez(tmp_path / "theirs.npz", mu=found.mean, sigma=found.covariance)
    for name, count in (("ours.npz", 50), ("theirs.npz", 0)):
        real = taken(tmp_path / name)
        assert frechet_distance(real.moments, found) == pytest.approx(0, abs=1e-9)
        assert (real.moments.count, real.features, real.floor) == (count, None, None)


def test_statistics_may_lack_rank_and_carry_rounding(tmp_path):
    """Fewer pictures than features have such a covariance, and pytorch-fid's files say no count."""
    rows = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    np.savez(
        tmp_path / "low.npz",
        mu=rows.mean(axis=0),
        sigma=np.cov(rows, rowvar=False).astype(np.float32),
    )
    assert taken(tmp_path / "low.npz").moments.count == 0


def test_too_few_real_images_for_halves_have_no_floor(tmp_path):
    np.savez(tmp_path / "real.npz", images=pictures(6))
    assert taken(tmp_path / "real.npz").floor is None


def test_without_real_images_there_are_none():
    assert taken(None) is None


def different_sizes(path):
    save_folder(path / "real", pictures(6))
    Image.fromarray(pictures(1, 16)[0]).save(path / "real" / "zzz.png")
    return path / "real"


def transparent(path):
    save_folder(path / "real", pictures(6))
    Image.new("RGBA", (8, 8)).save(path / "real" / "aaa.png")
    return path / "real"


def broken(path):
    save_folder(path / "real", pictures(6))
    (path / "real" / "bbb.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return path / "real"


def empty(path):
    (path / "real").mkdir()
    return path / "real"


def saved(**arrays):
    def make(path):
        np.savez(path / "real.npz", **arrays)
        return path / "real.npz"

    return make


def damaged(path):
    (path / "real.npz").write_bytes(b"PK\x03\x04 cut short")
    return path / "real.npz"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (different_sizes, r"differ in size: 000.png has 8 x 8 .* zzz.png has 16 x 16"),
        (transparent, "transparency"),
        (broken, "bbb.png is not an image"),
        (empty, "holds no images"),
        (lambda path: path / "none", "no real images at"),
        (damaged, "is not a file of NumPy arrays"),
        (saved(images=pictures(6, 16)), "16 x 16 pixels, 3 channels, the model's samples 8 x 8"),
        (saved(images=pictures(6).astype(np.float32)), "float32"),
        (saved(images=pictures(4)), "too few for the covariance of the 4 features.*at least 5"),
        (saved(numbers=np.zeros(3)), "holds numbers"),
        (saved(mean=np.zeros(5), cov=np.eye(5), count=9), "has 4 features"),
        (saved(mean=np.full(4, np.nan), cov=np.eye(4), count=9), "not finite"),
        # Each of these has a distance that could pass a gate: of the negative one it is 0.
        (saved(mean=np.zeros(4), cov=-np.eye(4), count=9), "negative eigenvalue -1\\."),
        (
            saved(mean=np.zeros(4), cov=np.triu(np.ones((4, 4))), count=9),
            "not symmetric: .* by up to 1",
        ),
        (
            saved(mean=np.zeros(4), cov=np.eye(4), count=4),
            "4 real images behind .* too few.*at least 5",
        ),
        (saved(mean=np.zeros(4), cov=np.eye(4), count=-9), "too few"),
        (saved(mean=np.zeros(4), cov=np.eye(4), count=[3, 9]), "count in .* int64 .2."),
        (saved(mean=np.array(list("abcd")), cov=np.eye(4), count=9), "are <U1 .4."),
        (saved(images=np.array([{}], dtype=object)), "Python objects"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, make, said):
    with pytest.raises(UsageError, match=said):
        taken(make(tmp_path))


def test_the_first_picture_of_another_size_ends_the_reading(tmp_path, monkeypatch):
    from mpq_deploy.system import picture_file

    folder, read = save_folder(tmp_path / "real", pictures(6, 16)), []
    original = picture_file.read_picture

    def counted(path, **options):
        read.append(path)
        return original(path, **options)

    monkeypatch.setattr(picture_file, "read_picture", counted)
    with pytest.raises(UsageError, match="16 x 16 pixels"):
        taken(folder)
    assert len(read) == 1

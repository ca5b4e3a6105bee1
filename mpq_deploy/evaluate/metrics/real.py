"""Real images to compare with: a folder of pictures, an .npz of pictures, or an .npz of a network's statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.metrics.frechet import Moments, check_count, frechet_distance
from mpq_deploy.evaluate.metrics.networks import DEMO, FeatureNetwork, NetworkOptions, digest_of
from mpq_deploy.models.locate import bundled_demo
from mpq_deploy.models.spec import Array
from mpq_deploy.system.array_file import read_arrays
from mpq_deploy.system.files import file_digest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Seed of the split into halves (our choice).
SEED = 0
# What float32 statistics may be off by, relative to the largest entry (our choice: a hundred times
# its precision).
ROUNDING = 1e-5
HINT = "Give a folder of images, an .npz with images uint8 [N, H, W, C], or one with mean, cov and count of features."
# What to do about a picture that cannot be used.
REPLACE = "Remove or replace it."


@dataclass(frozen=True)
class RealSet:
    """Real images on one network: ``moments``, and ``features`` [M, D] where known.

    ``floor``: the distance between two random halves of ``floor_count`` images each, or None where
    a half is too small for a covariance.
    """

    moments: Moments
    digest: str
    source: str
    features: Array | None = None
    floor: float | None = None
    floor_count: int | None = None


def check_real(path: Path | None) -> None:
    """Find real images that are not there, before anything is made. Raises UsageError."""
    if path is not None and not path.exists():
        raise UsageError(f"There are no real images at {path}.", HINT)


def real_set(
    path: Path | None, network: FeatureNetwork, options: NetworkOptions, shape: tuple[int, ...]
) -> RealSet | None:
    """Return the real images at ``path`` on ``network``; else the bundled statistics, or None.

    ``shape``: [H, W, C] of the samples, which real images must have. Raises UsageError for what
    cannot be compared.
    """
    if path is None:
        return (
            _shipped(options.demo, network)
            if options.demo is not None and network.name == DEMO
            else None
        )
    if path.suffix == ".npz" and path.is_file():
        arrays = _arrays(path)
        if "images" not in arrays:
            return _statistics(path, arrays, network)
        images = arrays["images"]
    else:
        images = read_folder(path, shape)
    check_images(images, shape, path)
    check_count(len(images), network.width, f"real images in {path}", network.name)
    return _of_features(network.features(images), digest_of(_images_digest(images)), str(path))


def read_folder(folder: Path, shape: tuple[int, ...]) -> Array:
    """Read every picture directly in ``folder``, by name, uint8 [N, H, W, C]; ``shape``: [H, W, C] that they must have.

    Raises UsageError for an empty folder, a file that is not a picture, transparency, and pictures of
    different sizes.
    """
    from mpq_deploy.system.picture_file import read_picture

    if not folder.is_dir():
        raise UsageError(f"There are no real images at {folder}.", HINT)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UsageError(f"{folder} holds no images ({', '.join(SUFFIXES)}).", HINT)
    found: list[Array] = []
    for file in files:
        mode = "RGB" if shape[2] == 3 else "L"
        picture = read_picture(file, mode=mode, opaque=True, error=UsageError, hint=REPLACE)
        pixels = np.asarray(picture)
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if found and pixels.shape != found[0].shape:
            raise UsageError(
                f"The images differ in size: {files[0].name} has {_size(found[0].shape)}, {file.name} has "
                f"{_size(pixels.shape)}.",
                "Bring all to the size of the model's samples; nothing is resized for you.",
            )
        if not found:
            # Before the others are read: all of them are held at this size.
            check_images(pixels[None], shape, folder)
        found.append(pixels)
    return np.stack(found)


def check_images(images: Array, shape: tuple[int, ...], source: Path) -> None:
    """Refuse arrays that are not pictures of the samples' shape. Raises UsageError."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UsageError(f"The images of {source} are {images.dtype} {list(images.shape)}.", HINT)
    if images.shape[1:] != shape:
        raise UsageError(
            f"The images of {source} have {_size(images.shape[1:])}, the model's samples {_size(shape)}.",
            "Bring them to the samples' size and channels; nothing is resized for you.",
        )


def _shipped(demo: str, network: FeatureNetwork) -> RealSet:
    path = bundled_demo(demo) / "features_stats.npz"
    stored = _arrays(path)
    whole, first, second = (
        Moments(stored[f"mean{part}"], stored[f"cov{part}"], int(stored[f"count{part}"]))
        for part in ("", "_a", "_b")
    )
    source = f"the {whole.count:,} real images that '{demo}' was trained on (shipped statistics)"
    floor = frechet_distance(first, second)
    return RealSet(
        whole, digest_of(file_digest(path)), source, None, floor, min(first.count, second.count)
    )


def _statistics(path: Path, arrays: dict[str, Array], network: FeatureNetwork) -> RealSet:
    """Read ``mean``, ``cov`` and ``count``, or ``mu`` and ``sigma`` as pytorch-fid writes them (without a count)."""
    mean, covariance = arrays.get("mean", arrays.get("mu")), arrays.get("cov", arrays.get("sigma"))
    if mean is None or covariance is None:
        raise UsageError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}.", HINT)
    width = network.width
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise UsageError(
            f"The statistics in {path} are of {list(mean.shape)} and {list(covariance.shape)}; '{network.name}' has "
            f"{width} features.",
            "Give statistics of the same network.",
        )
    number = arrays.get("count", np.zeros((), np.int64))
    if (
        any(value.dtype.kind not in "fiu" for value in (mean, covariance, number))
        or number.size != 1
    ):
        kinds = ", ".join(
            f"{value.dtype} {list(value.shape)}" for value in (mean, covariance, number)
        )
        raise UsageError(
            f"Mean, covariance and count in {path} are {kinds}.",
            "Give real numbers, and one count.",
        )
    moments = Moments(
        np.asarray(mean, np.float64), np.asarray(covariance, np.float64), int(number.item())
    )
    _check_moments(path, moments, network)
    if "count" in arrays:
        check_count(
            moments.count,
            network.width,
            f"real images behind the statistics in {path}",
            network.name,
        )
    return RealSet(moments, digest_of(file_digest(path)), f"{path} (statistics)")


def _check_moments(path: Path, moments: Moments, network: FeatureNetwork) -> None:
    """Refuse what is not a covariance, of which a distance would be nonsense: even 0. Raises UsageError."""
    covariance = moments.covariance
    hint = f"Make them again, of the features of '{network.name}'."
    if not (np.isfinite(moments.mean).all() and np.isfinite(covariance).all()):
        raise UsageError(f"The statistics in {path} are not finite.", hint)
    largest = float(np.abs(covariance).max())
    apart = float(np.abs(covariance - covariance.T).max())
    if apart > ROUNDING * largest:
        raise UsageError(
            f"The covariance in {path} is not symmetric: entries differ by up to {apart:.3g}.", hint
        )
    smallest = float(np.linalg.eigvalsh(covariance)[0])
    if smallest < -ROUNDING * largest * len(covariance):
        raise UsageError(
            f"The covariance in {path} has the negative eigenvalue {smallest:.3g}.", hint
        )


def _of_features(features: Array, digest: str, source: str) -> RealSet:
    shuffled = features[np.random.default_rng(SEED).permutation(len(features))]
    half = len(features) // 2
    floor = None
    if half > features.shape[1]:
        floor = frechet_distance(Moments.of(shuffled[:half]), Moments.of(shuffled[half : 2 * half]))
    return RealSet(
        Moments.of(features), digest, source, features, floor, None if floor is None else half
    )


def _arrays(path: Path) -> dict[str, Array]:
    return read_arrays(path, error=UsageError, hint=HINT)


def _images_digest(images: Array) -> str:
    from mpq_deploy.evaluate.cache import arrays_digest

    return arrays_digest({"images": images})


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels, {shape[2]} channel{'' if shape[2] == 1 else 's'}"

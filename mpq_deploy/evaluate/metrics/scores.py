"""Scores of single images: LPIPS to the float model's, CLIP's agreement with the prompt.

In: images uint8 [N, H, W, C], the float model's from the same noise, and the prompts. Out: a figure
of each image. What the weights lack is an error that says where to get them; nothing is downloaded,
and nothing stands in for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from mpq_deploy.errors import UsageError
from mpq_deploy.evaluate.metrics.networks import CLIP, LPIPS, NetworkOptions, offline_now
from mpq_deploy.models.spec import Array, DenoiserSpec

CLIP_SCORE = "clip-score"
SCORES = (LPIPS, CLIP_SCORE)
ScoreKind = Literal["lpips", "clip-score"]


class ImageScore(Protocol):
    """Gives each image a figure.

    ``digest`` tells its weights and preprocessing; ``title``: what it is called; ``min_side``:
    minimum height and width of an image, in pixels.
    """

    name: ScoreKind
    title: str
    digest: str
    min_side: int

    def scores(self, images: Array, reference: Array, prompts: Sequence[str]) -> Array:
        """Return float64 [N] of ``images`` uint8 [N, H, W, C]; ``reference``: the float model's, of the same noise."""


def check_scores(names: Sequence[str], options: NetworkOptions) -> None:
    """Find a score that cannot be had, before anything is made: names, packages, weights.

    Raises UsageError, MissingDependencyError.
    """
    for name in names:
        if name == LPIPS:
            from mpq_deploy.evaluate.metrics.lpips import check_lpips

            check_lpips(options.path(LPIPS), offline_now(options))
        elif name == CLIP_SCORE:
            from mpq_deploy.evaluate.metrics.clip_score import check_clip_score

            check_clip_score(options.path(CLIP), offline_now(options))
        else:
            raise UsageError(f"There is no score '{name}'.", f"Scores: {', '.join(SCORES)}.")


def open_scores(
    names: Sequence[str], options: NetworkOptions, spec: DenoiserSpec, shape: tuple[int, ...]
) -> tuple[ImageScore, ...]:
    """Open the scores ``names``, before anything is sampled; ``shape``: [H, W, C] of the images.

    Raises what ``check_scores`` does, and UsageError for images or models that have no such score.
    """
    if CLIP_SCORE in names:
        _check_prompts(spec)
    check_scores(names, options)
    found = tuple(_opened(name, options) for name in dict.fromkeys(names))
    for score in found:
        if min(shape[:2]) < score.min_side:
            raise UsageError(
                f"The images have {shape[1]} x {shape[0]} pixels; {score.title} takes at least "
                f"{score.min_side} on each side.",
                "Leave --lpips out: images are not resized for it. PSNR and SSIM take any size.",
            )
    return found


def _opened(name: str, options: NetworkOptions) -> ImageScore:
    if name == LPIPS:
        from mpq_deploy.evaluate.metrics.lpips import Lpips

        return Lpips(options.path(LPIPS))
    from mpq_deploy.evaluate.metrics.clip_score import ClipScore, check_clip_score

    return ClipScore(check_clip_score(options.path(CLIP), offline_now(options)))


def has_prompts(spec: DenoiserSpec) -> bool:
    """Whether the labels of the conditions are prompts: some condition is a row of numbers, none a class."""
    whole = any(item.dtype.startswith("int") for item in spec.conditions)
    return bool(spec.labels) and not whole and any(item.shape for item in spec.conditions)


def prompts_of(spec: DenoiserSpec, rows: Array) -> tuple[str, ...]:
    """Return each image's prompt by its condition row; empty where labels are not prompts.

    Raises UsageError for a row without a label.
    """
    if not has_prompts(spec):
        return ()
    if len(spec.labels) <= int(rows.max()):
        raise UsageError(
            f"The model has {len(spec.labels)} labels, but conditions up to row {int(rows.max())}.",
            "Give a label for every row (_labels in --conditions FILE.npz, or labels in the YAML).",
        )
    return tuple(spec.labels[int(row)] for row in rows)


def _check_prompts(spec: DenoiserSpec) -> None:
    if not has_prompts(spec):
        kind = ", ".join(item.name for item in spec.conditions) or "none"
        raise UsageError(
            f"The model has no prompts (its conditions: {kind}), so there is no CLIP score.",
            "Leave --clip-score out. Where the conditions are text, name their rows: _labels in --conditions FILE.npz.",
        )

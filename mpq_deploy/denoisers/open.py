"""Open a denoiser from whatever the user names: a bundled demo, a folder, a hub id or an ONNX file."""

from __future__ import annotations

from pathlib import Path

from mpq_deploy.denoisers.additions import Additions
from mpq_deploy.denoisers.bundled import DEMOS, bundled_demo
from mpq_deploy.denoisers.denoiser import Denoiser
from mpq_deploy.errors import UsageError, nearest
from mpq_deploy.talk import Talk


def open_denoiser(
    source: str | Path | None = None,
    *,
    conditions: Path | None = None,
    scheduler: Path | None = None,
    prompts: Path | None = None,
    guidance_scale: float | None = None,
    description: Path | None = None,
    talk: Talk | None = None,
) -> Denoiser:
    """Open the denoiser that ``source`` names.

    ``source``: None, ``emoji`` or ``digits`` (bundled); a diffusers pipeline or UNet folder; an ONNX file with a
    YAML beside it (or at ``description``); a hub id. ``conditions``, ``scheduler``, ``prompts`` and
    ``guidance_scale`` replace or add to what the model brings.
    Raises UsageError when there is no such model or something is missing, ModelError when it cannot be read.
    """
    talk = talk or Talk()
    additions = Additions(conditions, scheduler, prompts, guidance_scale, description)
    if source is None or str(source) in DEMOS:
        folder = bundled_demo(None if source is None else str(source))
        return _open_folder(folder, f"bundled:{folder.name}", additions, talk)
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, str(source), additions, talk)
    raise UsageError(
        f"There is no model '{source}'.",
        f"{nearest(str(source), DEMOS)}Give a diffusers folder, an .onnx file, a hub id (org/name), or one of the "
        f"bundled models: {', '.join(DEMOS)}.",
    )


def _open_folder(folder: Path, source: str, additions: Additions, talk: Talk) -> Denoiser:
    from mpq_deploy.denoisers.folder import open_folder

    return open_folder(folder, source, additions, talk)

"""Which files a model consists of: what decides whether an export is still current."""

from __future__ import annotations

from pathlib import Path

from mpq_deploy.denoisers.bundled import DEMOS, bundled_demo

# What is read of a diffusers folder: configurations, safetensors, tokenizer files.
FOLDER_SUFFIXES = (".json", ".safetensors", ".txt", ".model")


def source_files(source: str | None) -> list[tuple[str, Path]]:
    """Return (name, path) of every file behind ``source``, sorted by name; empty for a hub id.

    Of an ONNX file: the file, its YAML, and its external data. A hub id is pinned by its own cache.
    """
    if source is None or source in DEMOS:
        folder = bundled_demo(source)
    else:
        folder = Path(source)
    if folder.is_dir():
        files = [p for p in folder.rglob("*") if p.is_file() and p.suffix in FOLDER_SUFFIXES]
        return sorted((p.relative_to(folder).as_posix(), p) for p in files)
    if not folder.is_file():
        return []
    from mpq_deploy.graph.load import external_files

    beside = [p for ending in (".yaml", ".yml") if (p := folder.with_suffix(ending)).is_file()]
    return sorted((p.name, p) for p in [folder, *beside, *external_files(folder)])

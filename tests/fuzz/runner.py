"""One case in a process of its own: its limits, what it wrote, and whether that is as it should be."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import psutil

from tests.fuzz.cases import KINDS, Arguments, Bases

SECONDS, MEMORY_BYTES = 30.0, 2_000_000_000
# What a case starts from has these imports, so that each takes milliseconds to start.
PRELOAD = [
    *("mpq_deploy.cli", "mpq_deploy.run.pipeline", "mpq_deploy.models.pipeline_folder"),
    *("mpq_deploy.check.check", "mpq_deploy.report.gate", "mpq_deploy.report.comparison"),
    *("mpq_deploy.delivery.package", "mpq_deploy.device.installer", "mpq_deploy.runtime.drop_in"),
    *("diffusers.models.unets.unet_2d", "diffusers.schedulers.scheduling_ddim", "diffusers"),
    *("mpq_deploy.models.lora", "mpq_deploy.models.single_file", "transformers.models.clip"),
    *("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",),
    *("diffusers.loaders.single_file",),
    *("mpq_deploy.sensitivity.probe", "mpq_deploy.evaluate.evaluate", "tests.fuzz.runner"),
]
LOST = 255
# Unicode's classes of what must not reach a terminal raw; blanks of other scripts may.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
FORKED = multiprocessing.get_context("forkserver")
# Raises these where a library is asked for in a stranger's folder.
PLANTED = ("json", "numpy", "onnx", "tensorrt_rtx", "torch")
MARK = "open({mark!r}, 'w')\nraise SystemExit(9)\n"


@dataclass(frozen=True)
class Outcome:
    """What a case came to. ``problem``: what is wrong with that; empty: nothing."""

    kind: str
    seed: int
    arguments: Arguments
    code: int | None
    seconds: float
    peak_bytes: int
    said: str
    problem: str


def run_seed(kind: str, seed: int, bases: Bases) -> Outcome:
    """Make the case of ``kind`` and ``seed`` from ``bases`` and run it."""
    return run_case(kind, seed, lambda folder: KINDS[kind](bases, folder, Random(seed)), bases)


def run_case(kind: str, seed: int, make: Callable[[Path], Arguments], bases: Bases) -> Outcome:
    """Run the command that ``make`` returns for an empty folder, within the limits."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        (folder / "home").mkdir()
        (folder / "case").mkdir()
        (folder / "here").mkdir()
        for name in PLANTED:
            text = MARK.format(mark=str(folder / "mark"))
            (folder / "here" / f"{name}.py").write_text(text, encoding="utf-8")
        arguments = make(folder / "case")
        before = _listing(bases.root)
        code, seconds, peak, said = _in_child(arguments, folder)
        problem = _problem(arguments, folder, code, seconds, peak, said)
        if not problem and _listing(bases.root) != before:
            problem = "files outside of the case were written"
        return Outcome(kind, seed, arguments, code, seconds, peak, said[-2000:], problem)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _listing(root: Path) -> list[tuple[str, int, int]]:
    files = (path for path in root.rglob("*") if path.name not in (".lock", ".owner"))
    found = ((str(path), path.lstat()) for path in files)
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found if name)


def _in_child(arguments: Arguments, folder: Path) -> tuple[int | None, float, int, str]:
    """Return exit code (None: it was ended by us), seconds, peak memory and all that was said."""
    FORKED.set_forkserver_preload(PRELOAD)
    process = FORKED.Process(target=_child, args=(arguments, folder))
    started = time.monotonic()
    process.start()
    peak = 0
    while process.is_alive():
        process.join(0.02)
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        except psutil.Error:
            # It has just ended.
            continue
        if peak > MEMORY_BYTES or time.monotonic() - started > SECONDS:
            process.kill()
            break
    process.join()
    seconds = time.monotonic() - started
    said = folder / "said"
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    if peak > MEMORY_BYTES or seconds > SECONDS:
        return None, seconds, peak, text
    # multiprocessing's server loses an exit code now and then, and says 255.
    told = folder / "code"
    code = process.exitcode
    if code == LOST and told.exists():
        code = int(told.read_text(encoding="utf-8"))
    return code, seconds, peak, text


def _child(arguments: Arguments, folder: Path) -> None:
    """Run the command line in this process; write what it says into ``folder``."""
    # The garbage collector passes over what the case makes, not over all that was imported.
    gc.freeze()
    os.environ["HOME"] = str(folder / "home")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "home")
    os.chdir(folder / "here")
    sys.path.insert(0, "")
    said, code = io.StringIO(), 0
    try:
        with redirect_stdout(said), redirect_stderr(said):
            code = _command(arguments)
    except BaseException:
        said.write(traceback.format_exc())
        code = 99
    (folder / "said").write_text(said.getvalue(), encoding="utf-8", errors="backslashreplace")
    (folder / "code").write_text(str(code), encoding="utf-8")
    os._exit(code)


def _command(arguments: Arguments) -> int:
    from mpq_deploy import cli

    if arguments[0] in LIBRARY:
        cli.app = lambda: LIBRARY[arguments[0]](*arguments[1:])  # type: ignore[assignment]
    # For whoever looks into a problem: FUZZ_DEBUG=1 python -m tests.fuzz --kind K --seed N --cases 1
    debug = ["--debug"] if os.environ.get("FUZZ_DEBUG") else []
    cli.State.debug = bool(debug)
    sys.argv = ["mpq-deploy", *debug, *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _open(source: str) -> Any:
    from mpq_deploy.models.open import open_denoiser

    return open_denoiser(source)


def _lora(folder: str, file: str, texts: str) -> Any:
    from mpq_deploy.models.additions import Additions
    from mpq_deploy.models.lora_option import parse_lora
    from mpq_deploy.models.open import open_denoiser

    scheduler, conditions = Path(folder), Path(texts)
    given = Additions(loras=(parse_lora(file),), scheduler=scheduler, conditions=conditions)
    return open_denoiser(scheduler / "unet", given)


def _slots(file: str) -> Any:
    from mpq_deploy.device.generate.lora_factors import updates_in
    from mpq_deploy.models.lora_option import parse_lora

    return list(updates_in(parse_lora(file), "unet"))


def _checkpoint(file: str, config: str) -> Any:
    from mpq_deploy.models.additions import Additions
    from mpq_deploy.models.open import open_denoiser

    return open_denoiser(file, Additions(config=Path(config)))


def _load(source: str) -> Any:
    import mpq_deploy

    return mpq_deploy.load(source, backend="onnxruntime", device="cpu", threads=1)


# What no command does alone: errors end as a command's do.
LIBRARY: dict[str, Callable[..., Any]] = {
    "open": _open,
    "lora": _lora,
    "slots": _slots,
    "checkpoint": _checkpoint,
    "load": _load,
}


def _problem(
    arguments: Arguments, folder: Path, code: int | None, seconds: float, peak: int, said: str
) -> str:
    """Say what is wrong with an outcome; empty where nothing is."""
    if code is None:
        return f"over the limits: {seconds:.0f} s, {peak / 1e6:.0f} MB"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in said:
        return "a traceback"
    messages = said[said.rfind("mpq-deploy: ") :].splitlines() if "mpq-deploy: " in said else []
    if code and messages and len(messages) > 2:
        return f"a message of {len(messages)} lines"
    raw = {one for one in said if unicodedata.category(one) in HIDDEN and one not in "\n\t"}
    if raw:
        return f"control characters reach the terminal: {sorted(map(ord, raw))}"
    if (folder / "mark").exists() or (folder / "here" / "owned").exists():
        return "code was run"
    if sorted(one.name for one in folder.iterdir()) != ["case", "code", "here", "home", "said"]:
        return "files beside the case were written"
    if arguments[0] == "check" and code == 0:
        return _refused_by_onnx(Path(arguments[1]))
    return ""


def _refused_by_onnx(path: Path) -> str:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return f"check accepts what onnx.checker refuses: {str(error)[:200]}"
    return ""

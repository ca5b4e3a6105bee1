"""What other libraries log, print and warn of: hidden, or shown in full with ``--debug``."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from typing import Any

from mpq_deploy.system.names import printable

# Set under --debug, for this process and its children.
DEBUG = "MPQ_DEPLOY_DEBUG"
# What a message of ours quotes of a library's.
LONGEST_GIST = 300
# Errors whose text alone says nothing.
BARE = (LookupError, AssertionError, NotImplementedError)

SETTINGS = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "PYTHONWARNINGS": "ignore",
}
# Warnings of their code; ours are shown.
WARNING_MODULES = (
    r"(torch|torchmetrics|diffusers|transformers|huggingface_hub|onnx\w*|matplotlib)(\.|$)"
)


# What onnx_ir imports for arithmetic with open axes, which a graph that is read has none of: a third
# of the time in which a command starts.
IMPORTED_LATE = ("sympy", "onnx_ir._symbolic_shapes")


class _Late(MetaPathFinder):
    """Finds the modules of ``IMPORTED_LATE``, which run at the first look into them."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find ``fullname`` where others find it."""
        spec = PathFinder.find_spec(fullname, path) if fullname in IMPORTED_LATE else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def start_lightly() -> None:
    """Let this process, which is ours alone, import ``IMPORTED_LATE`` late and end without a last garbage collection.

    The collector's passes over all that torch and onnx import take longer than most commands.
    """
    if not any(isinstance(finder, _Late) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Late())
        atexit.register(gc.freeze)


def quiet_libraries() -> None:
    """Show only errors of other libraries, also in children; the user's own settings stay.

    They read these settings when they are imported, so call it first.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", module=WARNING_MODULES)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def show_libraries() -> None:
    """Show everything that other libraries say, also in children (``--debug``)."""
    os.environ[DEBUG] = "1"


def libraries_shown() -> bool:
    """Whether the user asked for what other libraries say."""
    return os.environ.get(DEBUG) == "1"


@contextmanager
def silenced() -> Iterator[None]:
    """Keep what libraries log, print and warn of in the block; all of it is shown under ``--debug``.

    Errors are raised as ever: whoever catches one says its ``gist``.
    """
    if libraries_shown():
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def gist(error: BaseException) -> str:
    """Return in one line what went wrong at first, without the advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[:1]
    # "... the following conflicts:" is followed by them.
    for line in lines[1:]:
        if not said[-1].endswith(":"):
            break
        said.append(line)
    text = printable(" ".join(said))[:LONGEST_GIST]
    if not text or isinstance(error, BARE):
        return f"{type(error).__name__}{': ' if text else ''}{text}"
    return text


def tell_cause(error: BaseException) -> None:
    """Write an error that is only noted, and what it came from, to stderr under ``--debug``."""
    if libraries_shown():
        sys.stderr.write("".join(traceback.format_exception(error)))


@contextmanager
def no_bars(library: str) -> Iterator[None]:
    """Switch off the progress bars of ``library``: diffusers or transformers."""
    logging = import_module(f"{library}.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

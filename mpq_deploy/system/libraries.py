"""What diffusers, transformers and Python's warnings say stays out of the command line's output."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

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


def quiet_libraries() -> None:
    """Show only errors of other libraries, also in children; the user's own settings stay.

    They read these settings when they are imported, so call it first.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", module=WARNING_MODULES)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


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

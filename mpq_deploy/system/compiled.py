"""Loops compiled to machine code by numba, for work that NumPy and torch would make many passes over."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from mpq_deploy.errors import UsageError

# numba takes settings from this file of the current folder, where an untrusted model may lie: among
# them the folder of machine code that it keeps, which it loads and runs.
SETTINGS_FILE = ".numba_config.yaml"
# x + HALVES - HALVES is x rounded to an integer, ties to even, where |x| < 2^22. A call of rint would
# keep a loop from becoming vector instructions.
HALVES = np.float32(1.5 * 2**23)

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile ``function`` on its first call; it runs without Python's lock.

    Sums keep their order and nothing is fused: the results are the same bits on every processor. The
    machine code is kept on disk where numba finds a folder for it. Raises UsageError where the current
    folder has settings for numba.
    """
    numba = _numba()
    made: Callable[P, R]
    try:
        made = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return made


def _numba() -> Any:
    """Import numba without settings of the current folder; it would read them again at each compilation."""
    if os.path.lexists(SETTINGS_FILE):
        raise UsageError(
            f"The current folder holds {SETTINGS_FILE}, which numba would take settings from.",
            "Remove it (NUMBA_ variables set the same), or run from another folder.",
        )
    import numba
    from numba.core import config

    config._config_fname = os.devnull
    return numba

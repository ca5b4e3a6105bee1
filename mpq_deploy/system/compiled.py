"""Loops compiled to machine code by numba, for work that NumPy and torch would make many passes over."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba
import numpy as np

# x + HALVES - HALVES is x rounded to an integer, ties to even, where |x| < 2^22. A call of rint would
# keep a loop from becoming vector instructions.
HALVES = np.float32(1.5 * 2**23)

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile ``function`` on its first call; it runs without Python's lock.

    Sums keep their order and nothing is fused: the results are the same bits on every processor. The
    machine code is kept on disk where numba finds a folder for it.
    """
    made: Callable[P, R]
    try:
        made = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return made

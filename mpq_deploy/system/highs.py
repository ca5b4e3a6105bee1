"""The MILP solver HiGHS, silent and reproducible, with the options that a caller sets."""

from __future__ import annotations

from typing import Any

import highspy


class QuietHighs(highspy.Highs):  # type: ignore[misc]
    """HiGHS that prints nothing, not even its banner, on one thread and with one seed."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for option, value in {"output_flag": False, "threads": 1, "random_seed": 1, **options}.items():
            self.setOptionValue(option, value)

    def enableCallbacks(self) -> None:  # noqa: N802
        """Since 1.16 the constructor enables callbacks, which prints the banner."""
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()

"""On how many images a control is compared with the plan: until they can be distinguished, or all.

In: the PSNR of both on the images so far, image by image. Out: the interval of their mean difference,
and whether it settles the comparison. Images come in groups; after each group is a look. A look has an
equal share of the level's error (Bonferroni), so that all intervals of a comparison hold together at
95 % or more, whenever it stops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpq_deploy.evaluate.interval import LEVEL, Difference, student_quantile

# Images of a group, our choice: fewer say little of what differs between images.
GROUP = 8


def groups_of(images: int) -> list[range]:
    """Return the images of each group, in order; the last may have fewer."""
    return [range(at, min(at + GROUP, images)) for at in range(0, images, GROUP)]


def paired_difference(
    values: Sequence[float], others: Sequence[float], looks: int
) -> Difference | None:
    """Return the mean of ``values`` - ``others`` by image, with Student's interval at a level for ``looks`` looks.

    None below two images.
    """
    differences = np.subtract(values, others, dtype=np.float64)
    count = len(differences)
    if count < 2:
        return None
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(count))
    width = error * student_quantile(count - 1, (1 - LEVEL) / looks / 2)
    return Difference(mean, mean - width, mean + width)

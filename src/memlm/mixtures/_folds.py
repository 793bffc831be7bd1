"""Splitting held-out text for cross-validation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FOLDS = 5


class Split(NamedTuple):
    """Targets to fit on, and targets to judge by."""

    fitted: npt.NDArray[np.bool_]
    held: npt.NDArray[np.bool_]


def folds(groups: npt.NDArray[np.int64], number: int = FOLDS) -> list[Split]:
    """Split targets for cross-validation: by group, or into contiguous parts where there is but one group.

    Returns:
        One split a fold; nothing for fewer than two targets.
    """
    fold = np.unique(groups, return_inverse=True)[1] % number
    if len(groups) and not fold.any():
        fold = np.arange(len(groups)) * number // len(groups)
    splits = [Split(fold != held, fold == held) for held in np.unique(fold)]
    return splits if len(splits) > 1 else []

"""Do the numbers bear a claim out? Intervals over seeds and over the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ._experiment import Claim, Measured, Place

# 97.5 % points of Student's t with 1, 2, … 9 degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Range(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the numbers say of a claim.

    Attributes:
        claim: The claim.
        difference: How much lower the lower mean is, averaged over seeds.
        over_seeds: t interval of the seeds' differences: what another start and order of the text would change. None
            for a single seed.
        over_groups: Bootstrap interval of the seeds' mean difference: what another test text would change. None where
            there is a single group.
        groups: What was resampled.
    """

    claim: Claim
    difference: float
    over_seeds: Range | None
    over_groups: Range | None
    groups: str

    @property
    def holds(self) -> bool:
        """Whether the difference, with all intervals that there are, lies above what was claimed."""
        ranges = [item for item in (self.over_seeds, self.over_groups) if item is not None]
        return min([self.difference, *(item.low for item in ranges)]) > self.claim.by

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        values = asdict(self) | {"holds": self.holds}
        for name in ("over_seeds", "over_groups"):
            values[name] = None if values[name] is None else list(values[name])
        return values | {"claim": asdict(self.claim) | {"lower": [*self.claim.lower], "higher": [*self.claim.higher]}}


def judge(claim: Claim, runs: Mapping[str, Sequence[Measured]]) -> Verdict:
    """Compare two means seed by seed.

    Args:
        claim: The claim.
        runs: Of each arm what was measured, seed after seed; all on the same groups.
    """
    from ..evaluation import bootstrap_mean  # which loads torch

    lower, higher = (_sums(runs, place) for place in (claim.lower, claim.higher))
    first = runs[claim.lower.arm][0]
    counts = np.array(first.counts)
    differences = higher - lower  # (seeds, groups)
    by_seed = differences.sum(axis=1) / counts.sum()
    over_groups = bootstrap_mean(differences.mean(axis=0), counts) if len(counts) > 1 else None
    return Verdict(
        claim=claim,
        difference=float(by_seed.mean()),
        over_seeds=t_interval(by_seed),
        over_groups=None if over_groups is None else Range(*over_groups),
        groups=first.groups,
    )


def t_interval(values: np.ndarray) -> Range | None:
    """Return the 95 % interval of a mean by Student's t, values of shape (n,); None for a single value."""
    freedom = len(values) - 1
    if freedom < 1:
        return None
    half = _t_point(freedom) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Range(float(values.mean()) - half, float(values.mean()) + half)


def _t_point(freedom: int) -> float:
    """Return the 97.5 % point of Student's t; beyond the table by an expansion around the normal distribution's."""
    z = 1.959964
    if freedom <= len(_T):
        return _T[freedom - 1]
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _sums(runs: Mapping[str, Sequence[Measured]], place: Place) -> np.ndarray:
    """Return the sums of a row, shape (seeds, groups)."""
    return np.array([measured.rows[place.row].sums for measured in runs[place.arm]])

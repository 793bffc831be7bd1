"""Intervals for a difference of two methods on the same tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_BLOCK = 2048  # tokens a block where there are few documents
_FEW_DOCUMENTS = 20


class Interval(NamedTuple):
    """A mean with its 95 % interval, and what was resampled ("documents" or "blocks of 2,048 tokens")."""

    mean: float
    low: float
    high: float
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None, which JSON has, in the place of an infinite bound."""
        values = self._asdict()
        return {name: value if name == "unit" or np.isfinite(value) else None for name, value in values.items()}

    def __str__(self) -> str:
        if self.high == np.inf:
            return f"{self.mean:.3f} nats a token (too little text for an interval)"
        return f"{self.mean:.3f} nats a token (95 % interval {self.low:.3f} to {self.high:.3f} over {self.unit})"


def units(documents: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], str]:
    """Say what is resampled and held out together: documents, or contiguous blocks where documents are few.

    Args:
        documents: Document of each token, int64, shape (n,).

    Returns:
        Number of each token's unit from 0, int64, shape (n,), and what a unit is.
    """
    if len(np.unique(documents)) >= _FEW_DOCUMENTS:
        return np.unique(documents, return_inverse=True)[1], "documents"
    return np.arange(len(documents)) // _BLOCK, f"blocks of {_BLOCK:,} tokens"


def paired_bootstrap(
    differences: npt.NDArray[np.float64], documents: npt.NDArray[np.int64], *, samples: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap the mean of per-token differences, by document, or by contiguous blocks where documents are few.

    Args:
        differences: Of the two methods' log probabilities, float64, shape (n,), in the order of the text; n ≥ 1.
        documents: Document of each token, int64, shape (n,).
        samples: Resamples.
        seed: Of the resampling.

    Returns:
        Mean and percentile interval. With fewer than two units the interval is infinitely wide.
    """
    group, unit = units(documents)
    sums, counts = np.bincount(group, differences), np.bincount(group)
    mean = float(differences.mean())
    if len(sums) < 2:
        return Interval(mean, -np.inf, np.inf, unit)
    return Interval(mean, *bootstrap_mean(sums, counts, samples=samples, seed=seed), unit)


def bootstrap_mean(
    sums: npt.NDArray[np.number], counts: npt.NDArray[np.int64], *, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a mean over tokens, of which groups are resampled.

    Args:
        sums: Total over the tokens of each group, shape (groups,).
        counts: Tokens in each group, int64, shape (groups,).
        samples: Resamples.
        seed: Of the resampling.
    """
    drawn = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    # "inverted_cdf" does not interpolate: means may be −inf, where λ = 1 made a token impossible
    low, high = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    return float(low), float(high)

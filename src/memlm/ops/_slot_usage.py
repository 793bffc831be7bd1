"""How evenly the slots of a table are read, and which of them a text reads more than others do."""

from __future__ import annotations

import torch
from torch import Tensor


def usage_share(weights: Tensor) -> Tensor:
    """Return the share of slots that were read at all (Lample et al. 2019, arXiv:1907.05242, section 4.4).

    Args:
        weights: Sum of the softmax weights that each slot got, shape (slots,).

    Returns:
        float64, shape (): from 0 to 1, and 0 where there are no slots.
    """
    return (weights > 0).double().sum() / max(len(weights), 1)


def usage_divergence(weights: Tensor) -> Tensor:
    """Return KL(z ‖ uniform) = log N + Σ z_i log z_i of the normalized weights (Lample et al. 2019, section 4.4).

    Args:
        weights: As in `usage_share`.

    Returns:
        Nats, float64, shape (): 0 where all slots are read alike, log N where one is read alone, NaN where none is.

    Example:
        >>> round(float(usage_divergence(torch.tensor([1.0, 1.0, 0.0, 0.0])).exp()), 6)
        2.0
    """
    shares = weights.double() / weights.double().sum()
    return torch.special.xlogy(shares, shares * len(weights)).sum()


def slot_tf_idf(reads: Tensor, documents_reading: Tensor, documents: int) -> Tensor:
    """Return how much more a text reads each slot than other documents do (Lin et al. 2025, arXiv:2510.15103).

    tf-idf_i = c_i / Σ_j c_j · log((D + 1) / (D_i + 1))

    Args:
        reads: c, how often the text read each slot, shape (slots,).
        documents_reading: D_i, in how many of the other documents each slot was read, shape (slots,).
        documents: D, the number of these documents.

    Returns:
        float64, shape (slots,): not negative, and 0 for slots that the text did not read or that every document reads.
    """
    frequency = reads.double() / reads.double().sum().clamp(min=1)
    return frequency * torch.log((documents + 1) / (documents_reading.double() + 1))

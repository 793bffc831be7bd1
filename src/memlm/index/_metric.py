"""A datastore's metric, as FAISS knows it: distances are squared L2 or the negative inner product."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import faiss  # isort: skip

from ..evidence import INNER_PRODUCT, SQUARED_L2

FAISS_METRICS = {SQUARED_L2: faiss.METRIC_L2, INNER_PRODUCT: faiss.METRIC_INNER_PRODUCT}


def as_distances(scores: npt.NDArray[np.float32], faiss_metric: int) -> npt.NDArray[np.float32]:
    """Return what FAISS calls distances as ours: it gives inner products as they are, the largest first."""
    return -scores if faiss_metric == faiss.METRIC_INNER_PRODUCT else scores


def distances(queries: Tensor, keys: Tensor, metric: str) -> Tensor:
    """Return the distance of every key to its query, float32.

    Args:
        queries: float32, shape (…, width), broadcast against the keys.
        keys: float32, shape (…, width); they are overwritten.
        metric: One of `evidence.METRICS`.
    """
    if metric == INNER_PRODUCT:
        return -torch.mul(keys, queries, out=keys).sum(dim=-1)
    return torch.sub(keys, queries, out=keys).square_().sum(dim=-1)

"""Fitting a codec to keys: principal components, and a grid that spans what they take."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, DatastoreError
from ..evidence import INNER_PRODUCT
from ._codec import Codec
from ._manifest import CODED_TYPES

_BLOCK = 1 << 12  # keys whose products are added up at once, in float64
_STEPS = 255  # between the ends of an int8 grid
_SAME = 1e-20  # a number that varies by no more is always the same, and any grid will do


def fit_codec(keys: Tensor, width: int, key_dtype: str, metric: str) -> Codec:
    """Fit a codec to a sample of keys.

    The projection is on the principal components of the keys (PCA, as He et al. 2021 before quantization): of all
    projections to so many numbers it keeps the most of the squared distances. Where distances are inner products, the
    mean is not taken off and the components are those about zero, so that the products with what is kept are whole:
    what a mean adds to the products of one query would not cancel where they meet a vocabulary's logits. The grid of
    each number goes from its least to its greatest in the sample, in 255 steps.

    Args:
        keys: Any float type, shape (n, key width); n at least 1. With no more keys than `width`, the remaining
            components are any that are orthogonal, and mean nothing to other keys.
        width: Numbers to keep.
        key_dtype: "int8" or "float16".
        metric: "squared_l2" or "inner_product".

    Raises:
        ConfigError: The width is not in 1 to the key width, the type is not known, or there is no key.
    """
    check_codec(width, key_dtype, keys.shape[1])
    if not len(keys):
        raise ConfigError("there are no keys to fit a codec to; expected at least one entry: add documents first")
    keys = keys.float()
    mean = torch.zeros(keys.shape[1]) if metric == INNER_PRODUCT else keys.mean(dim=0, dtype=torch.float64).float()
    moments = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64)
    for block in keys.split(_BLOCK):
        centered = (block - mean).double()
        moments.addmm_(centered.T, centered)
    if not bool(moments.isfinite().all()):
        raise DatastoreError("there are keys that are NaN or infinite; look at them by `memlm verify`, and build again")
    components = torch.linalg.eigh(moments).eigenvectors  # columns, by rising variance
    projection = components[:, -width:].flip(1).float().contiguous()
    offset, step = torch.zeros(width), torch.ones(width)
    if key_dtype == "int8":
        projected = (keys - mean) @ projection
        low, high = projected.amin(dim=0), projected.amax(dim=0)
        varies = high - low > _SAME
        step = torch.where(varies, (high - low) / _STEPS, 1.0)
        offset = torch.where(varies, low + 128 * step, low)
    return Codec(mean, projection, offset, step, key_dtype)


def check_codec(width: int, key_dtype: str, key_width: int) -> None:
    """Raise ConfigError unless keys of a width can be compressed to this width and type."""
    if not isinstance(width, int) or not 1 <= width <= key_width:
        raise ConfigError(f"width is {width}; expected 1 to {key_width}, the numbers in a key")
    if key_dtype not in CODED_TYPES:
        raise ConfigError(f"key type is {key_dtype!r}; expected {' or '.join(CODED_TYPES)}")

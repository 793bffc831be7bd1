"""Rotary positions, as the model itself computes them."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn


class Rotary:
    """Rotates queries and keys to positions of our choice.

    Args:
        tables: The model's module that gives cosines and sines …
        attention: … and an attention layer, whose module's `apply_rotary_pos_emb` applies them.
    """

    def __init__(self, tables: nn.Module, attention: nn.Module) -> None:
        self._tables, self._apply = tables, apply_function(attention)
        takes_kind = "layer_type" in inspect.signature(tables.forward).parameters
        self._kind: dict[str, Any] = {"layer_type": getattr(attention, "layer_type", None)} if takes_kind else {}

    def __call__(self, tensor: Tensor, positions: Tensor) -> Tensor:
        """Rotate a tensor of shape (batch, heads, n, d) to positions of shape (batch or 1, n)."""
        cos, sin = self._tables(tensor, positions, **self._kind)
        return rotated(self._apply, tensor, tensor, cos, sin)[0]


def apply_function(attention: nn.Module) -> Any:
    """Return the `apply_rotary_pos_emb` of an attention layer's model family; None if it has none."""
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def rotated(apply: Any, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, shape (batch, heads, n, d); of d only as much as the tables are wide."""
    width = cos.shape[-1]
    if width == queries.shape[-1]:
        return apply(queries, keys, cos, sin)
    turned = apply(queries[..., :width], keys[..., :width], cos, sin)
    whole = zip(turned, (queries, keys), strict=True)
    return tuple(torch.cat([part, rest[..., width:]], dim=-1) for part, rest in whole)  # type: ignore[return-value]

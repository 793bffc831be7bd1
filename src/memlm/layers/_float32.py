"""Modules that stay in float32 inside a model of another type."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module that computes in float32 and stays it when the model around it becomes another type."""

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Module:
        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)

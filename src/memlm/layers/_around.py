"""What stands in the place of a feed-forward layer and keeps it, several around one another, and what it adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..models import DecoderLayer


class Around(nn.Module):
    """A module in the place of a feed-forward layer, which it keeps."""

    def kept(self) -> Any:
        """Return what it stands around."""
        raise NotImplementedError

    def keep(self, module: nn.Module) -> None:
        """Stand around another module."""
        raise NotImplementedError


def modules_around(layer: DecoderLayer) -> Iterator[tuple[Callable[[nn.Module], None], Around]]:
    """Yield what stands around a feed-forward, from the outside in, each with what puts another in its place."""
    if layer.feed_forward is None:
        return
    put: Callable[[nn.Module], None] = partial(setattr, layer.module, layer.feed_forward)
    module = getattr(layer.module, layer.feed_forward)
    while isinstance(module, Around):
        yield put, module
        put, module = module.keep, module.kept()


class Float32Module(nn.Module):
    """A module that computes in float32 and stays it when the model around it becomes another type."""

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Module:
        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)

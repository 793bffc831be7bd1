"""What stands in the place of a feed-forward layer and keeps it, several around one another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from ..models import DecoderLayer


class Around(nn.Module, ABC):
    """A module in the place of a feed-forward layer, which it keeps."""

    @abstractmethod
    def kept(self) -> Any:
        """Return what it stands around."""

    @abstractmethod
    def keep(self, module: nn.Module) -> None:
        """Stand around another module."""


def modules_around(layer: DecoderLayer) -> Iterator[tuple[Callable[[nn.Module], None], Around]]:
    """Yield what stands around a feed-forward, from the outside in, each with what puts another in its place."""
    if layer.feed_forward is None:
        return
    put: Callable[[nn.Module], None] = partial(setattr, layer.module, layer.feed_forward)
    module = getattr(layer.module, layer.feed_forward)
    while isinstance(module, Around):
        yield put, module
        put, module = module.keep, module.kept()

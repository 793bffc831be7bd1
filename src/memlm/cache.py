"""The continuous cache: the recent past of the same text as a memory (Grave, Joulin, Usunier 2017, arXiv:1612.04426).

An entry is what the model saw at a place (its key) with the token that came next there. Nothing is stored on disk, and
nothing passes from one document to another.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, KeyOverflow
from .evidence import MOST_ENTRIES, Found

_BLOCK = 512  # queries compared with the past at once


@dataclass(frozen=True)
class Cache:
    """A memory of the last tokens of the text at hand.

    Attributes:
        length: Entries remembered.

    Raises:
        ConfigError: The length is no whole number from 1 to 2²⁰.
    """

    length: int = 1024

    def __post_init__(self) -> None:
        whole = isinstance(self.length, int) and not isinstance(self.length, bool)
        if not whole or not 1 <= self.length <= MOST_ENTRIES:
            given = reprlib.repr(self.length)
            raise ConfigError(
                f"the cache's length is {given}; expected a whole number of tokens, 1 to {MOST_ENTRIES:,}"
            )

    def __len__(self) -> int:
        return self.length

    def recall(
        self, keys: Tensor, tokens: Tensor, first: int = 0, stop: int | None = None, known: Tensor | None = None
    ) -> Found:
        """Return what places of one document find in their past, the most recent entry first.

        Args:
            keys: What the model saw at each place, shape (places, width).
            tokens: The token read at each place, int64, shape (places,); the entry at place i is (key i, token i + 1).
            first: The first place that asks.
            stop: The place after the last that asks; None means to the end.
            known: Bool, shape (places,): False for padding, which is no entry; None means that all are text.

        Returns:
            Negative inner products and ages of shape (stop − first, length); the entry of age a stands a places back.

        Raises:
            KeyOverflow: A key of the text that is looked at is not finite.
        """
        last = len(keys) if stop is None else stop
        keys = keys.float()
        if known is not None:  # what a model makes of padding may be anything
            keys = keys.masked_fill(~keys.isfinite() & ~known[:, None], 0.0)
        if not bool(keys[max(0, first - self.length) : last].isfinite().all()):
            raise KeyOverflow("the model gave keys that are NaN or infinite; check its weights and its dtype")
        ages = torch.arange(1, self.length + 1, device=keys.device, dtype=torch.int32)
        blocks = []
        for start in range(first, last, _BLOCK):
            end = min(start + _BLOCK, last)
            entries = torch.arange(start, end, device=keys.device)[:, None] - ages.long()  # (n, length)
            present = entries >= 0
            if known is not None:  # an entry is a key and the token after it
                present &= known[entries.clamp_min(0)] & known[(entries + 1).clamp_min(0)]
            oldest = max(0, start - self.length)
            products = keys[start:end] @ keys[oldest:end].T  # (n, places looked at)
            distances = -products.gather(1, (entries - oldest).clamp(min=0))
            entries = entries.clamp_min(0)
            blocks.append(
                Found(
                    distances.masked_fill(~present, torch.inf),
                    tokens[(entries + 1).clamp_max(len(tokens) - 1)],  # a single place has nothing after it
                    present,
                    entries,
                    ages.expand_as(entries),
                )
            )
        if not blocks:
            return Found.nothing(0, self.length)._replace(ages=torch.zeros((0, self.length), dtype=torch.int32))
        return Found.joined(blocks)

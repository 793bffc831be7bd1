"""What a model has read so far, for caches and gates: keys and tokens that travel with its own `past_key_values`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache as AnyCache
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..cache import Cache
from ..errors import ModelError
from ..evidence import Found, read_lately


class _MemoryLayer(DynamicLayer):
    """One more layer in the model's cache: our keys (batch, 1, length, width) and token ids (batch, 1, length, 1).

    The model never looks at it; reordering beams, cropping and repeating rows treat it like the others.
    """


class Past(NamedTuple):
    """All that some rows have read, this forward pass included.

    Attributes:
        keys: Shape (batch, length, width).
        tokens: Int64, shape (batch, length).
        known: Bool, shape (batch, length): False for padding.
        before: Places read before this pass.
    """

    keys: Tensor
    tokens: Tensor
    known: Tensor
    before: int

    def recall(self, cache: Cache, kept: Tensor) -> Found:
        """Let the kept places (numbers within this pass, int64, shape (kept,)) of every row look back."""
        first, stop = int(kept.min()), int(kept.max()) + 1
        rows = [
            cache.recall(self.keys[row], self.tokens[row], self.before + first, self.before + stop, self.known[row])
            for row in range(len(self.keys))
        ]
        places = (kept - first).to(self.keys.device)
        return Found.joined([row.each(lambda part: part[places]) for row in rows])

    def read(self, kept: Tensor) -> Tensor:
        """Return the last tokens that were read at the kept places of every row; see `Belief.read`."""
        texts = self.tokens.masked_fill(~self.known, -1)
        places = kept.to(texts.device) + self.before
        return torch.cat([read_lately(text, places) for text in texts])


def past_of(output: Any, kwargs: dict[str, Any], tokens: Tensor, keys: Tensor) -> Past:
    """Put this pass behind what was read before, and leave it in the model's cache for the next one.

    Args:
        output: Of the model.
        kwargs: That it was called with.
        tokens: Its input, int64, shape (batch, width).
        keys: From its key site, shape (batch, width, key width).

    Raises:
        ModelError: The model's cache is of a kind that cannot carry keys, or was filled outside the block.
    """
    cache = kwargs.get("past_key_values")
    if cache is None and isinstance(output, tuple):
        cache = next((item for item in output if isinstance(item, AnyCache)), None)
    elif cache is None:
        cache = getattr(output, "past_key_values", None)
    before = 0
    tokens = tokens.to(keys.device)
    width = tokens.shape[1]
    if isinstance(cache, DynamicCache):
        layer = next((layer for layer in cache.layers if isinstance(layer, _MemoryLayer)), None)
        if layer is None:
            layer = _MemoryLayer()
            cache.layers.append(layer)
        before = layer.get_seq_length()
        if before + width != cache.get_seq_length():
            raise ModelError(
                f"past_key_values holds {cache.get_seq_length() - width} earlier tokens, the memory has seen {before} "
                "of them; let the model read the whole text inside the block"
            )
        whole, ids = layer.update(keys[:, None].float(), tokens[:, None, :, None].float())
        keys, tokens = whole[:, 0], ids[:, 0, :, 0].long()
    elif cache is not None:
        raise ModelError(
            f"a memory of the recent past cannot travel in a {type(cache).__name__}; use the default cache, or "
            "use_cache=False"
        )
    mask = kwargs.get("attention_mask")
    known = torch.ones(tokens.shape, dtype=torch.bool, device=keys.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        known = mask.to(keys.device).bool()
    return Past(keys, tokens, known, before)

"""Reading documents segment by segment with the keys and values of the segments before (Dai et al. 2019,
arXiv:1901.02860, "Transformer-XL", section 3.2), through the model's own cache.

Rotary and ALiBi positions count differences alone, so positions go on through a whole document, however long, and
cached keys stay as they are. Learned positions end where their table ends.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import ConfigError, ModelError, UnsupportedArchitecture

_LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotations that change with the length of what is read


class CarriedCache:
    """Runs a model on the next segment of every row's document; each row sees its earlier segments, without gradient.

    Args:
        model: A decoder with rotary or ALiBi positions, or with learned ones for documents that fit.
        length: Tokens carried, at most; the oldest are dropped.

    Raises:
        ConfigError: `length` is below 1.
        UnsupportedArchitecture: The model does not compute the same in segments as at once: sliding windows, states
        that
            are no keys and values, or rotations that depend on the length.

    Example:
        >>> import memlm
        >>> lm = memlm.reference_lm()
        >>> carried = CarriedCache(lm.model, 256)
        >>> ids = torch.tensor([lm.tokenizer("The rain was on the roof of the house.")["input_ids"]])
        >>> _ = carried(ids[:, :4], torch.tensor([True]))
        >>> in_two = carried(ids[:, 4:], torch.tensor([False])).logits
        >>> torch.allclose(in_two, lm.model(ids).logits[:, 4:], atol=1e-4)
        True
    """

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        if length < 1:
            raise ConfigError(f"length is {length}; expected at least 1, the tokens to be carried")
        self._model, self.length = model, length
        self._takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        self.limit = _position_limit(model)
        self._takes_padding = True
        self.reset()
        self._check()

    def reset(self) -> None:
        """Forget everything; the next batch may have another number of rows."""
        self._cache: DynamicCache | None = None
        self._seen: Tensor | None = None  # bool (rows, cached): what belongs to the row's document
        self._next: Tensor | None = None  # int64 (rows,): the next position
        self._padded: Tensor | None = None  # bool (rows,): whether padding stands within the row's document

    def __call__(self, input_ids: Tensor, begins: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Any:
        """Read the next segment of every row.

        Args:
            input_ids: Int64, shape (rows, n).
            begins: Bool, shape (rows,): whether the row begins another document here.
            attention_mask: Shape (rows, n), 0 for padding, which only what is at the right may be; None: there is none.
            settings: Passed to the model, such as `labels`.

        Returns:
            The model's output for this segment.

        Raises:
            ConfigError: Rows have changed in number, or learned positions are used up.
            ModelError: The model is being trained with gradient checkpointing, which keeps no cache; or a row goes on
                behind padding, in a model that counts distances by places in the cache (MPT, GPT-Neo).
        """
        model, rows = self._model, len(input_ids)
        if model.training and any(getattr(item, "gradient_checkpointing", False) for item in model.modules()):
            raise ModelError("gradient checkpointing keeps no keys and values to carry; disable it")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self._seen is None or self._next is None or bool(begins.all()):
            self._cache = None
            self._seen = torch.zeros((rows, 0), dtype=torch.bool, device=input_ids.device)
            self._next = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
            self._padded = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        if len(self._seen) != rows:
            raise ConfigError(f"the batch has {rows} rows, the one before had {len(self._seen)}; call reset() between")
        begins = begins.to(input_ids.device)
        assert self._padded is not None
        self._padded = self._padded & ~begins
        if not self._takes_padding and bool(self._padded.any()):
            raise ModelError(
                f"{type(model).__name__} counts distances by places in its cache, where padding takes one; carry "
                "segments without padding"
            )
        self._padded = self._padded | (mask == 0).any(dim=1)
        seen = self._seen & ~begins[:, None]
        start = self._next.masked_fill(begins, 0)
        stop = start + mask.sum(dim=1)
        if self.limit is not None and int(stop.max()) > self.limit:
            raise ConfigError(
                f"a document has reached position {int(stop.max())}, and {type(model).__name__} has learned "
                f"{self.limit} positions; cut documents, or use a model with rotary or ALiBi positions"
            )
        if self._takes_positions:  # padding takes a position that exists
            places = start[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
            settings["position_ids"] = places if self.limit is None else places.clamp(max=self.limit - 1)
        seen = torch.cat([seen, mask.bool()], dim=1)
        output = model(
            input_ids=input_ids, attention_mask=seen.long(), past_key_values=self._cache, use_cache=True, **settings
        )
        self._keep(output.past_key_values)
        self._seen, self._next = seen[:, -self.length :], stop
        return output

    def _keep(self, cache: Any) -> None:
        """Keep the latest keys and values, without gradient."""
        if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            raise UnsupportedArchitecture(
                f"{type(self._model).__name__} keeps states that cannot be carried (sliding windows, or no keys and "
                "values at all); expected full attention in every layer"
            )
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.keys = layer.keys[..., -self.length :, :].detach()
            layer.values = layer.values[..., -self.length :, :].detach()
        self._cache = cache

    @torch.no_grad()
    def _check(self) -> None:
        """Refuse a model that reads a few tokens otherwise in two segments than at once."""
        config = self._model.config
        rope = getattr(config, "rope_parameters", None) or {}
        kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
        training, length = self._model.training, self.length
        self._model.eval()
        try:
            self.length = 6
            ids = torch.arange(1, 7, device=self._model.device)[None] % config.vocab_size
            ids = torch.cat([ids, ids.flip(0)])
            whole = self._model(input_ids=ids).logits[:, 4:].float()
            first = torch.ones(2, dtype=torch.bool, device=ids.device)
            self(ids[:, :4], first)
            parts = self(ids[:, 4:], ~first).logits.float()
            padded = torch.cat([ids[:, :4], ids[:, :3]], dim=1)
            self.length = 9
            self(padded, first, (torch.arange(7, device=ids.device) < 4).long().expand(2, -1))
            behind = self(ids[:, 4:], ~first).logits.float()
        finally:
            self._model.train(training)
            self.length = length
            self.reset()
        scale = float(whole.abs().max()) + 1e-6
        self._takes_padding = float((whole - behind).abs().max()) <= 0.03 * scale
        if kind in _LENGTH_DEPENDENT or float((whole - parts).abs().max()) > 0.03 * scale:
            raise UnsupportedArchitecture(
                f"{type(self._model).__name__} does not compute the same in segments as at once; expected full "
                "attention with rotary (not dynamic) or ALiBi positions"
            )


def _position_limit(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has learned; None where it has learned none."""
    tokens = model.get_input_embeddings()
    others = [item for item in model.modules() if isinstance(item, nn.Embedding) and item is not tokens]
    most = getattr(model.config, "max_position_embeddings", None)
    return most if others and most is not None else None

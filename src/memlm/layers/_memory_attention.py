"""The memory of one attention layer: what is learned for it, what it remembers, and how a query reads it."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import ModelError, ShapeError
from ..ops import (
    age_drop_off,
    gate_weight,
    joint_softmax_weight,
    local_log_mass,
    memory_attention,
    mix_attention,
    null_slot_weight,
    recalled_scores,
)
from ._memory_settings import AttentionMemorySettings
from ._ring import KeyValueMemory, Recalled, Ring
from ._rotary import Rotary

_SCALE = 10.0  # of normalized queries and keys: with 1, attention could not be sharp
_NULL = 4.0  # about the log mass of 32 entries that match a little
_FORGETTING = math.log(1e-3)  # of the nats that an entry loses a token; with less, large memories do harm at first


class Local(NamedTuple):
    """What a layer's own attention has computed.

    Attributes:
        output: Shape (batch, tokens, heads, d).
        queries: Rotated, shape (batch, heads, tokens, d).
        keys: Rotated, with those of a carried cache, shape (batch, key heads, seen, d).
        mask: Bool or added to scores, shape (batch or 1, 1 or heads, tokens, seen); None is causal.
        scale: Of products of queries and keys.
        cap: Of scores, or None.
        dropout: Of attention weights.
    """

    output: Tensor
    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    scale: float
    cap: float | None
    dropout: float

    def seen(self) -> Tensor:
        """Return how many keys each query sees, int64, shape (batch, tokens)."""
        batch, _, tokens, _ = self.queries.shape
        if self.mask is None:
            count = torch.arange(1, tokens + 1, device=self.keys.device) + (self.keys.shape[2] - tokens)
            return count.expand(batch, -1)
        mask = self.mask[:, 0]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return mask.sum(dim=-1).expand(batch, -1)


class AttentionMemory(nn.Module):
    """What belongs to the memory of one attention layer.

    What a pass reads was written by passes before it: keys and values of a pass wait, without their gradients, until
    `remember` is called before the next one. So no text finds itself, and a pass that is computed twice, as gradient
    checkpointing does, finds the same.

    Args:
        settings: What kind of memory.
        heads: Of queries.
        width: Of the layer's input …
        head_width: … and of a head.
        rotary: The model's rotary positions; needed if `positions` is not `none`.
    """

    def __init__(
        self, settings: AttentionMemorySettings, heads: int, width: int, head_width: int, rotary: Rotary | None
    ) -> None:
        super().__init__()
        self.settings = settings
        self.store: KeyValueMemory = Ring(settings.size, settings.device)
        self.writes = True
        self.order: Tensor | None = None
        self.known: Tensor | None = None  # which tokens of this pass are text, bool, shape (batch, tokens); None is all
        self._rotary: Any = rotary
        self._waiting: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._begun = False  # a pass that has not left anything yet
        self._cache: weakref.ref[Any] | None = None  # that of the last pass …
        self._length = 0  # … how long it was then …
        self._passed: Tensor | int = 0  # … and how many of its tokens of each row were not remembered
        if settings.combine == "gate":
            self.gate = nn.Parameter(torch.zeros(heads))
        elif settings.combine == "null_slot":
            self.null = nn.Parameter(torch.full((heads,), _NULL))
        if settings.normalize == "l2":
            self.scale = nn.Parameter(torch.full((heads,), _SCALE))
        if settings.drop_off == "age":
            self.forgetting = nn.Parameter(torch.full((heads,), _FORGETTING))
        if settings.projections == "own_queries":
            self.query = nn.Linear(width, heads * head_width, bias=False)
            nn.init.zeros_(self.query.weight)  # it is added to the layer's own

    @property
    def waits(self) -> bool:
        """Whether a pass left something that `remember` will write."""
        return self._waiting is not None

    def begin(self, known: Tensor | None) -> None:
        """Begin a pass, of whose tokens some are text: what the last one left is remembered."""
        self.remember()
        self.known, self._begun = known, True

    def remember(self) -> None:
        """Write what the last pass left."""
        if self._waiting is not None:
            self.store.write(*self._waiting)
            self._waiting = None

    def follow(self, cache: Any, layer: int, tokens: int) -> None:
        """Notice which cache a pass of some tokens goes on with, before it is updated.

        Raises:
            ModelError: Tokens that were remembered have been cut off it.
        """
        if self._cache is None or self._cache() is not cache:
            self._cache, self._length, self._passed = None if cache is None else weakref.ref(cache), 0, 0
        if type(cache) is DynamicCache and self.writes:
            if cache.get_seq_length(layer) < self._length:
                raise ModelError(
                    "past_key_values was cut back, as assisted decoding does, but memory has what was cut off; "
                    "generate inside `with memory.read_only():`"
                )
            self._length = cache.get_seq_length(layer) + tokens

    def leave(self, keys: Tensor, values: Tensor) -> None:
        """Let keys and values, shape (batch, key heads, tokens, d), un-rotated, wait for the next pass.

        Raises:
            ModelError: A pass is computed again, and memory has gone on since.
        """
        begun, self._begun = self._begun, False
        if not begun:  # gradient checkpointing
            self._check_last(keys)
        elif self.writes and self.settings.size:
            self._waiting = keys.detach(), values.detach(), self.known
        elif not self.writes:
            self._passed = self._passed + (keys.shape[2] if self.known is None else self.known.sum(1, True))

    def normalized(self, queries: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return queries and keys whose products, times `scale`, are those of this layer."""
        if self.settings.normalize == "none":
            return queries, keys
        return self._sharp(queries, scale), _unit(keys)

    def own_queries(self, queries: Tensor, hidden: Tensor, scale: float) -> Tensor:
        """Return the queries to memory.

        Args:
            queries: Before normalization and rotation, shape (batch, heads, tokens, d).
            hidden: The layer's input, shape (batch, tokens, width).
            scale: Of products.
        """
        if self.settings.projections == "own_queries":
            queries = queries + self.query(hidden).view(*hidden.shape[:2], *queries.shape[1::2]).transpose(1, 2)
        return queries if self.settings.normalize == "none" else self._sharp(queries, scale)

    def join(self, local: Local, queries: Tensor) -> Tensor:
        """Return the attention to memory and text, shape (batch, tokens, heads, d).

        Entries that local attention still sees, in a carried cache, are not read from memory as well.

        Args:
            local: What the layer's own attention has computed; its output is returned where memory is empty.
            queries: To memory, un-rotated, shape (batch, heads, tokens, d).

        Raises:
            ShapeError: Memory holds another number of rows.
        """
        if not self.settings.size or not self.store.rows:
            return local.output
        batch, _, tokens, _ = queries.shape
        copies = self._copies(batch)
        seen = local.seen()
        ones = torch.ones(batch, tokens, dtype=torch.int64, device=queries.device)
        now = (ones if self.known is None else self.known.long()).cumsum(dim=1)  # of this pass, (batch, tokens)
        written = self.store.written.to(queries.device).repeat_interleave(copies)[:, None]
        placed = self._placed(queries, seen)
        searched = queries if self.settings.positions == "rebased" else placed
        remembered = (seen - now - self._passed).clamp_min(0)  # of what local attention sees, (batch, tokens)
        recalled = self._read(searched, written - remembered, local, copies)
        if recalled is None:
            return local.output
        if self.settings.positions == "rebased":
            recalled = recalled.in_order()
            recalled = recalled._replace(keys=self._rotated(recalled.keys))
        scores = recalled_scores(placed, recalled.keys.to(placed.dtype), local.scale)  # (batch, heads, tokens, k)
        if local.cap is not None:
            scores = local.cap * (scores / local.cap).tanh()
        if self.settings.drop_off == "age":
            ages = (written + now)[:, None, :, None] - 1 - recalled.places
            scores = age_drop_off(scores, ages, self.forgetting.exp())
        values = recalled.values.to(local.output.dtype)
        output, mass = memory_attention(scores, recalled.present, values, local.dropout)
        return mix_attention(local.output.transpose(1, 2), output, self._weight(mass, local)).transpose(1, 2)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.settings).items())

    def _check_last(self, keys: Tensor) -> None:
        if not self.writes or not self.settings.size:
            return
        waiting = None if self._waiting is None else self._waiting[0]
        if waiting is None or waiting.shape != keys.shape or not torch.allclose(waiting, keys, 0.01, 0.01, True):
            raise ModelError(
                "gradient checkpointing computes a pass again whose keys are in memory by now, or are forgotten; call "
                "backward() before the next pass, and before reset() and other uses of the memory"
            )

    def _copies(self, batch: int) -> int:
        """Return how many rows of the batch read each row of memory."""
        rows = self.store.rows
        if batch == rows:
            return 1
        if not self.writes and batch % rows == 0:
            return batch // rows
        raise ShapeError(
            f"the batch has {batch} rows, the memory has {rows}: reset() it for other texts; for beams or several "
            "samples of each row, generate inside `with memory.read_only():`"
        )

    def _read(self, queries: Tensor, before: Tensor, local: Local, copies: int) -> Recalled | None:
        """Search for queries, shape (batch, heads, tokens, d), with `before` of shape (batch, tokens)."""
        (batch, heads, tokens, _), key_heads = queries.shape, local.keys.shape[1]
        # (rows, copies, key heads, groups, tokens): copies, groups and tokens are queries to the same keys
        inner = (batch // copies, copies, key_heads, heads // key_heads, tokens)
        grouped = queries.reshape(*inner, -1).transpose(1, 2)  # (rows, key heads, copies, groups, tokens, d)
        before = before.view(-1, copies, 1, tokens).expand(-1, -1, inner[3], -1)
        fading = None
        if self.settings.drop_off == "age":
            each = (self.forgetting.detach().exp() / local.scale).view(1, key_heads, 1, inner[3], 1)
            fading = each.expand(inner[0], -1, copies, -1, tokens).flatten(2)
        top_k = self.settings.top_k
        found = self.store.read(grouped.flatten(2, 4), before.flatten(1), top_k, self.order, fading)
        if found is None:
            return None
        sizes = (inner[0], key_heads, copies, inner[3], tokens)

        def apart(tensor: Tensor) -> Tensor:
            return tensor.unflatten(2, sizes[2:]).transpose(1, 2).reshape(batch, heads, tokens, *tensor.shape[3:])

        return Recalled(*(apart(tensor) for tensor in found))

    def _placed(self, queries: Tensor, seen: Tensor) -> Tensor:
        """Rotate queries to where they stand, seen from the keys that they find."""
        if self.settings.positions == "none":
            return queries
        room = self.settings.top_k if self.settings.positions == "rebased" else 0
        return self._rotary(queries, (seen - 1).clamp_min(0) + room)

    def _rotated(self, keys: Tensor) -> Tensor:
        """Rotate keys, shape (batch, heads, n, k, d), as the last k of `top_k` that stand before the text."""
        k, room = keys.shape[3], self.settings.top_k
        places = torch.arange(room - k, room, device=keys.device)
        return self._rotary(keys.flatten(1, 2), places[None]).view(keys.shape)

    def _weight(self, mass: Tensor, local: Local) -> Tensor:
        if self.settings.combine == "gate":
            return gate_weight(mass, self.gate)
        if self.settings.combine == "null_slot":
            return null_slot_weight(mass, self.null)
        return joint_softmax_weight(mass, local_log_mass(local.queries, local.keys, local.scale, local.mask, local.cap))

    def _sharp(self, queries: Tensor, scale: float) -> Tensor:
        return _unit(queries) * (self.scale[:, None, None].to(queries.dtype) / scale)


def _unit(tensor: Tensor) -> Tensor:
    return nn.functional.normalize(tensor, dim=-1, eps=1e-6)

"""A reader of external weights: what is trained once, in one layer of a frozen model, so that rows count."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, DatastoreMismatch, ModelError
from ..ops import read_rows
from ._bank import Bank
from ._float32 import Float32Module
from ._rows import Rows

_SCALE = 10.0  # of cosines; 1 cannot be sharp
_THRESHOLD = 0.5  # cosine of a row that weighs as much as nothing


class RowReader(Float32Module):
    """Reads rows beside a feed-forward layer: out(Σ w_i v_i), with w from the cosine of query and key.

    Keys and queries are linear maps of what the feed-forward layer sees, normalized, at a position and at those right
    before it; a value is a linear map of the next token's embedding. Before training, `out` is zero, and so is all that
    is read; without rows it stays so.

    A name of several tokens is not in the state of its last one unless the model has put it there; a window that is as
    long as the name sees all of it. With a window of more than one, generate with `use_cache=False`: what a cache of
    keys and values leaves out, the window would miss.

    Args:
        width: Of the model.
        embedding_width: Of the model's input embeddings.
        key_width: Of queries and keys.
        value_width: Of values: the rank of what can be added.
        top_k: Rows read at each position.
        window: Positions that a key or query is made of: the one itself, and those before it.

    Attributes:
        rows: What is read; None reads nothing.
        amount: What was read in the last pass, 1 − w_0, shape (positions,), detached; for monitoring.
    """

    def __init__(
        self,
        width: int,
        embedding_width: int,
        *,
        key_width: int = 64,
        value_width: int = 64,
        top_k: int = 8,
        window: int = 1,
    ) -> None:
        super().__init__()
        sizes = {"key_width": key_width, "value_width": value_width, "top_k": top_k, "window": window}
        for name, number in sizes.items():
            if number < 1:
                raise ConfigError(f"{name} is {number}; expected a whole number of at least 1")
        self.query = nn.Linear(width * window, key_width, bias=False)
        self.key = nn.Linear(width * window, key_width, bias=False)
        self.value = nn.Linear(embedding_width, value_width, bias=False)
        self.out = nn.Linear(value_width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        self.threshold = nn.Parameter(torch.tensor(_THRESHOLD))
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)  # what was seen before is found from the start
        nn.init.zeros_(self.out.weight)
        self.top_k, self.window = top_k, window
        self.known: Tensor | None = None  # of a batch with padding, which positions are text
        self.rows: Rows | None = None
        self.hook: Any = None  # before the decoder, with a window of more than one
        self.amount: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is to be added to the feed-forward's output.

        Args:
            hidden: Its input, shape (…, width); (texts, length, width) with a window of more than one.
        """
        if self.rows is None:
            return torch.zeros_like(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            queries = F.normalize(self.query(self.windows(hidden)), dim=-1).flatten(0, -2)  # (n, key width)
            found = self.rows.nearest(queries, self.top_k)
            keys, values, present = (item.to(hidden.device) for item in found)
            read, amount = read_rows(queries, keys, values, present, self.log_scale.exp(), self.threshold)
            self.amount = amount.detach()
            return self.out(read).reshape(hidden.shape).to(hidden.dtype)

    def windows(self, hidden: Tensor) -> Tensor:
        """Return what queries and keys are made of: every position beside those before it, each normalized.

        Args:
            hidden: What the feed-forward sees, shape (…, length, width).

        Returns:
            Float32, shape (…, length, window × width), the position itself first; zeros before the text begins.

        Raises:
            ModelError: The window is more than one, and the layer's input has no order.
        """
        normed = F.layer_norm(hidden.float(), hidden.shape[-1:])
        if self.window == 1:
            return normed
        if hidden.ndim < 3:
            raise ModelError("this layer sees tokens without their order; use a window of 1, or another layer")
        if self.known is not None and self.known.shape == hidden.shape[:2]:
            normed = normed * self.known[..., None]
        length = hidden.shape[-2]
        shifted = [F.pad(normed, (0, 0, back, 0))[..., :length, :] for back in range(self.window)]
        return torch.cat(shifted, dim=-1)

    def scores(self, windows: Tensor, keys: Tensor) -> Tensor:
        """Return what decides how much each row is read, for training: the logits of nothing, which is 0, and of all
        rows.

        Args:
            windows: See `windows`, shape (n, window × width).
            keys: Shape (rows, key_width).

        Returns:
            Float32, shape (n, 1 + rows).
        """
        queries = F.normalize(self.query(windows), dim=-1)
        return F.pad(self.log_scale.exp() * (queries @ keys.T - self.threshold), (1, 0))

    def encode(self, windows: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Make rows of a text.

        Args:
            windows: See `windows`, at some positions, shape (n, window × width).
            following: Input embedding of the token after each, shape (n, embedding width).

        Returns:
            Keys, shape (n, key_width), and values, shape (n, value_width); float32.
        """
        following = F.layer_norm(following.float(), following.shape[-1:])
        return F.normalize(self.key(windows), dim=-1), self.value(following)

    def look(self, _decoder: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the decoder, with a window of more than one: which positions are text.

        Raises:
            ModelError: The pass does not have all positions.
        """
        past = kwargs.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise ModelError(
                f"the reader of rows looks at the last {self.window} positions, and a cache of keys and values leaves "
                "earlier ones out; call generate(…, use_cache=False)"
            )
        mask = kwargs.get("attention_mask")
        self.known = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    @contextmanager
    def reading(self, rows: Rows | None) -> Iterator[None]:
        """Read other rows inside the block, or none."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def read_from(self, bank: Bank) -> None:
        """Read a table from now on; raises as `check` does."""
        self.check(bank)
        self.rows = bank

    def check(self, bank: Bank) -> None:
        """Raise `DatastoreMismatch` if another reader made a table's rows."""
        made_by = bank.note.get("reader")
        if made_by != self.fingerprint():
            raise DatastoreMismatch(
                f"the rows of {bank.folder} are those of reader {str(made_by)[:12]}, this one is "
                f"{self.fingerprint()[:12]}: load the reader that was "
                "saved for them, or create a table for this one and write the facts again"
            )

    def fingerprint(self) -> str:
        """Hash what rows depend on: the maps of keys and values."""
        digest = hashlib.sha256()
        for layer in (self.key, self.value):
            digest.update(f"{tuple(layer.weight.shape)}".encode())
            digest.update(layer.weight.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

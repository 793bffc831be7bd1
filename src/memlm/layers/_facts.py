"""Writing by forward pass: a fact's rows are made of its text, inserted, replaced and deleted without a gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..models import KeySite
from ..models._capture import forward_to_site
from ..models._layers import path_of
from ._bank import Bank
from ._beside import Beside
from ._reader import RowReader
from ._rows import TensorRows

_BATCH = 64  # facts a forward pass


def owner_of(name: str) -> int:
    """Return the number under which a table keeps the rows of a fact: 63 bits of the name's SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1 or 1


@torch.no_grad()
def hidden_of(model: Any, reader: RowReader, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Run a model over some texts as far as the reader, which reads nothing, and return what rows are made of.

    Args:
        model: The causal LM that the reader is in.
        reader: Where to stop.
        sequences: Token ids.

    Returns:
        What the reader sees, shape (texts, length − 1, width); the following token's input embedding, shape
        (texts, length − 1, embedding width); and which positions have one, bool, shape (texts, length − 1).
    """
    embedding = model.get_input_embeddings()
    longest = max(map(len, sequences))
    ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = ids.to(embedding.weight.device)
    beside = next(module for module in model.modules() if isinstance(module, Beside) and module.added is reader)
    # what follows a position changes nothing there, so padding at the end needs no mask
    with reader.reading(None):
        hidden = forward_to_site(model, KeySite("reader", path_of(model, beside), "input"), ids)
    known = (torch.arange(1, longest) < lengths[:, None]).to(ids.device)
    return hidden.reshape(*ids.shape, -1)[:, :-1], embedding(ids[:, 1:]), known


def rows_of(model: Any, reader: RowReader, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[TensorRows]:
    """Make the rows of some texts, with gradients to the reader: one for each token but the first ones.

    Args:
        model: The causal LM that the reader is in.
        reader: What makes the rows.
        sequences: Token ids.
        starts: Of each text the first token that gets a row, at least 1.
    """
    hidden, following, known = hidden_of(model, reader, sequences)
    first = torch.tensor(starts, device=known.device)[:, None] - 1
    known = known & (torch.arange(known.shape[1], device=known.device) >= first)
    keys, values = reader.encode(hidden[known], following[known])
    counts = known.sum(dim=1).tolist()
    return [TensorRows(*rows) for rows in zip(keys.split(counts), values.split(counts), strict=True)]


def create_fact_bank(model: Any, reader: RowReader, folder: Any, rows: int, dtype: str = "float32") -> Bank:
    """Make a table for a reader's rows, bound to it; see `Bank.create`."""
    note = {"reader": reader.fingerprint()}
    widths = {"key_width": reader.key.out_features, "value_width": reader.value.out_features}
    return Bank.create(folder, rows=rows, **widths, dtype=dtype, note=note)

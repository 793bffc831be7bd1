"""Writing by forward pass: a fact's rows are made of its text, inserted, replaced and deleted without a gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError
from ..models import KeySite, forward_to_site, path_of
from ._bank import Bank
from ._beside import Beside
from ._reader import RowReader
from ._rows import TensorRows

_BATCH = 64  # facts a forward pass


def owner_of(name: str) -> int:
    """Return the number under which a table keeps the rows of a fact: 63 bits of the name's SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1 or 1


def site_of(model: Any, reader: RowReader) -> KeySite:
    """Return where in a model a reader reads, for `memlm.models.forward_with_keys`."""
    beside = next(module for module in model.modules() if isinstance(module, Beside) and module.added is reader)
    return KeySite("reader", path_of(model, beside), "input")


@torch.no_grad()
def hidden_of(model: Any, reader: RowReader, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Run a model over some texts as far as the reader, which reads nothing, and return what rows are made of.

    Args:
        model: The causal LM that the reader is in.
        reader: Where to stop.
        sequences: Token ids.

    Returns:
        What rows' keys are made of, `RowReader.windows`, shape (texts, length − 1, window × width); the following
        token's input embedding, shape (texts, length − 1, embedding width); and which positions have one, bool, shape
        (texts, length − 1).
    """
    embedding = model.get_input_embeddings()
    longest = max(map(len, sequences))
    ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = ids.to(embedding.weight.device)
    # what follows a position changes nothing there, so padding at the end needs no mask
    with reader.reading(None):
        hidden = forward_to_site(model, site_of(model, reader), ids)
    known = (torch.arange(1, longest) < lengths[:, None]).to(ids.device)
    windows = reader.windows(hidden.reshape(*ids.shape, -1))
    return windows[:, :-1], embedding(ids[:, 1:]), known


def rows_of(
    model: Any, reader: RowReader, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[TensorRows]:
    """Make the rows of some texts, with gradients to the reader: one for each token but the first ones.

    Args:
        model: The causal LM that the reader is in.
        reader: What makes the rows.
        sequences: Token ids.
        starts: Of each text the first token that gets a row, at least 1.
    """
    windows, following, known = hidden_of(model, reader, sequences)
    first = torch.tensor(starts, device=known.device)[:, None] - 1
    known = known & (torch.arange(known.shape[1], device=known.device) >= first)
    keys, values = reader.encode(windows[known], following[known])
    counts = known.sum(dim=1).tolist()
    return [TensorRows(*rows) for rows in zip(keys.split(counts), values.split(counts), strict=True)]


def create_fact_bank(lm: Any, reader: RowReader, folder: str | Path, rows: int, dtype: str = "float32") -> Bank:
    """Make an empty table for the rows that a reader makes of facts, bound to both; see `Bank.create`.

    Args:
        lm: A `LanguageModel`, in whose model the reader is.
        reader: Trained: its rows fit no other one.
        folder: Must not exist, or be empty.
        rows: Room; a fact takes about as many rows as it has tokens.
        dtype: "float32" or "bfloat16".
    """
    widths = {"key_width": reader.key.out_features, "value_width": reader.value.out_features}
    return Bank.create(folder, rows=rows, **widths, dtype=dtype, note={"reader": reader.fingerprint()})


def write_facts(lm: Any, bank: Bank, facts: Mapping[str, str], *, starts: Mapping[str, int] | None = None) -> int:
    """Write facts by a forward pass over each; a fact of the same name is replaced.

    What the rows hold does not depend on what was written before: nothing is read meanwhile. `bank.commit`, or the end
    of a `with` block, makes them last.

    Args:
        lm: A `LanguageModel` with a reader in its model.
        bank: Made by `create_fact_bank`, open for changes.
        facts: Text by name. The first tokens of a text have no row: nothing precedes them.
        starts: Of some facts, the character from which on tokens get rows; 0 is the default. Fewer rows leave other
            text alone; more of them help to find the way through a long fact.

    Returns:
        Rows written.

    Raises:
        ConfigError: A text is too short for a row.
        DatastoreMismatch: Another reader made the table.
    """
    reader = reader_of(lm.model)
    reader.check(bank)
    written = 0
    items = list(facts.items())
    for first in range(0, len(items), _BATCH):
        batch = items[first : first + _BATCH]
        tokens = [_tokens(lm, name, text, (starts or {}).get(name, 0)) for name, text in batch]
        with torch.no_grad():
            found = rows_of(lm.model, reader, *zip(*tokens, strict=True))
        for (name, _), rows in zip(batch, found, strict=True):
            bank.delete(owner_of(name))
            bank.write(owner_of(name), rows.keys, rows.values)
            written += len(rows)
    return written


def delete_facts(bank: Bank, names: Iterable[str]) -> int:
    """Delete facts by name and overwrite their rows; returns the number of rows.

    Raises:
        ConfigError: There is no fact of such a name; those named before it are deleted.
    """
    deleted = 0
    for name in names:
        rows = bank.delete(owner_of(name))
        if not rows:
            raise ConfigError(f"{bank.folder} has no fact {name!r}; expected a name that write_facts was given")
        deleted += rows
    return deleted


def reader_of(model: Any) -> RowReader:
    """Return the reader in a model.

    Raises:
        ModelError: There is none, or more than one.
    """
    found = [module for module in model.modules() if isinstance(module, RowReader)]
    if len(found) != 1:
        raise ModelError(
            f"this {type(model).__name__} has {len(found)} readers of rows; expected one, by add_row_reader"
        )
    return found[0]


def _tokens(lm: Any, name: str, text: str, start: int) -> tuple[list[int], int]:
    """Return token ids with the start of a text, and the number of the first one that gets a row."""
    encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin = [] if lm.tokenizer.bos_token_id is None else [lm.tokenizer.bos_token_id]
    ids = begin + encoded["input_ids"]
    ends = [0] * len(begin) + [end for _, end in encoded["offset_mapping"]]
    first = next((place for place in range(1, len(ids)) if ends[place] > start), None)
    if first is None:
        raise ConfigError(
            f"fact {name!r} has no token to be written after character {start} of {text!r}; expected a sentence, and a "
            "start inside it"
        )
    return ids, first

"""Windows over documents: every token is scored once, with left context, and documents are never mixed.

A document's sequence is [start] text [end]: the start token is the tokenizer's BOS, the end token its EOS, each only if
the tokenizer has one. Everything after the first place is a target: it is stored, scored and generated under the same
rule, so a document's first token is scored only where there is a BOS to score it from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..documents import Document
from ..errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class WindowScheme:
    """How documents are cut.

    Attributes:
        context: Tokens of left context that the first target of a window sees (fewer at a document's start).
        stride: Targets a window.

    Raises:
        ConfigError: Either is below 1.
    """

    context: int
    stride: int

    def __post_init__(self) -> None:
        if self.context < 1 or self.stride < 1:
            raise ConfigError(f"context {self.context} and stride {self.stride}: expected whole numbers of at least 1")

    def windows(self, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, first, stop) over a sequence: inputs are start…stop−2, targets first…stop−1.

        Example:
            >>> list(WindowScheme(context=2, stride=3).windows(6))
            [(0, 1, 4), (2, 4, 6)]
        """
        for first in range(1, length, self.stride):
            yield max(0, first - self.context), first, min(first + self.stride, length)


class TokenizedDocument(NamedTuple):
    """A document as the model sees it.

    Attributes:
        document: The text and its name.
        ids: Int64, shape (length,), start and end tokens included.
        spans: Uint32, shape (length, 2): where each token stands in the text, as character offsets [from, to).
    """

    document: Document
    ids: npt.NDArray[np.int64]
    spans: npt.NDArray[np.uint32]


def tokenize(tokenizer: Any, document: Document) -> TokenizedDocument:
    """Turn a document into its sequence of token ids."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} gives no text offsets; expected a fast tokenizer (tokenizer.json)"
        )
    # split_special_tokens: text that spells out "<|endoftext|>" is text, and ends no document
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = tokenizer(document.text, return_offsets_mapping=True, **options)
    ids, spans = list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    if tokenizer.bos_token_id is not None:
        ids, spans = [tokenizer.bos_token_id, *ids], [(0, 0), *spans]
    if tokenizer.eos_token_id is not None:
        ids, spans = [*ids, tokenizer.eos_token_id], [*spans, (len(document.text), len(document.text))]
    return TokenizedDocument(document, np.array(ids, np.int64), np.array(spans, np.uint32).reshape(-1, 2))


class WindowBatch(NamedTuple):
    """Windows run together.

    Attributes:
        input_ids: Int64, shape (windows, width), padded at the right; a causal model never looks there.
        scored: Bool, shape (windows, width): positions whose next token is a target of its window.
        targets: Int64, shape (scored positions,), in row-major order.
        rows: Int64, same shape: number of each target within the documents given, in their order.
    """

    input_ids: torch.Tensor
    scored: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor


def batch_windows(
    sequences: Iterable[npt.NDArray[np.int64]], scheme: WindowScheme, tokens: int
) -> Iterator[WindowBatch]:
    """Cut sequences into windows and batch them by width, so that little is padded.

    Args:
        sequences: Token ids of the documents, each int64 of shape (length,).
        scheme: Context and stride.
        tokens: Input tokens a batch, about; at least one window.

    Yields:
        Batches in which every target of every sequence occurs once, widest windows first.
    """
    cuts: list[tuple[int, int, int, int, int]] = []  # width, sequence, start, first, row of the first target
    kept = list(sequences)
    row = 0
    for number, ids in enumerate(kept):
        for start, first, stop in scheme.windows(len(ids)):
            cuts.append((stop - 1 - start, number, start, first, row + first - 1))
        row += max(0, len(ids) - 1)
    cuts.sort(key=lambda cut: (-cut[0], cut[1], cut[2]))
    place = 0
    while place < len(cuts):
        width = cuts[place][0]
        batch = cuts[place : place + max(1, tokens // width)]
        place += len(batch)
        yield _make_batch(kept, batch, width)


def _make_batch(
    sequences: list[npt.NDArray[np.int64]], cuts: list[tuple[int, int, int, int, int]], width: int
) -> WindowBatch:
    input_ids = np.zeros((len(cuts), width), np.int64)
    scored = np.zeros((len(cuts), width), bool)
    targets, rows = [], []
    for line, (length, number, start, first, row) in enumerate(cuts):
        ids = sequences[number][start : start + length + 1]
        skipped = first - start - 1  # input positions that are context alone
        input_ids[line, :length] = ids[:-1]
        scored[line, skipped:length] = True
        targets.append(ids[1 + skipped :])
        rows.append(np.arange(row, row + length - skipped))
    return WindowBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(scored),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(rows)),
    )

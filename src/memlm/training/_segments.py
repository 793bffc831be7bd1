"""Documents as segments in an order that gives training memories something to see.

A segment is so many tokens of one document; its last token is the first of the next segment, so that in transformers'
way of counting, in which the last position of a row has no target, every token but a document's first is a target once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError
from ._bm25 import bm25_chain
from ._trime import IGNORED

Ids = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Segments(torch.utils.data.Dataset):
    """Segments in the order of an epoch; take `rows_per_batch` of them at a time, without shuffling.

    An item is a row of a batch: `input_ids` and `labels`, int64, shape (length,), padded at the right by `padding` and
    −100, the first label −100, too; `segment` and `document`, numbers, and `position`, that of the first token in its
    document.

    Attributes:
        documents: Token ids of each document, integers, shape (tokens,).
        cuts: Document and first token of every segment, int64, shape (segments, 2).
        order: Number of the segment in every row of an epoch, int64, shape (rows,); −1 is a row of padding.
        length: Tokens a segment.
        rows_per_batch: Rows that belong together.
        padding: Token id.
    """

    documents: Sequence[Ids]
    cuts: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    length: int
    rows_per_batch: int
    padding: int = 0

    def __len__(self) -> int:
        return len(self.order)

    @property
    def chain(self) -> npt.NDArray[np.int64]:
        """The numbers of the segments in the order in which they come."""
        return self.order[self.order >= 0]

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """How many targets each row has, int64, shape (rows,)."""
        lengths = np.array([len(ids) for ids in self.documents])
        document, first = self.cuts.T
        counts = np.minimum(self.length, lengths[document] - first) - 1
        return np.where(self.order >= 0, counts[self.order], 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.order[index])
        document, first = (int(value) for value in self.cuts[number]) if number >= 0 else (-1, 0)
        ids = self.documents[document][first : first + self.length] if number >= 0 else []
        input_ids, labels = np.full(self.length, self.padding, np.int64), np.full(self.length, IGNORED, np.int64)
        input_ids[: len(ids)] = ids
        labels[1 : len(ids)] = ids[1:]  # the first is nobody's target: who counts labels counts targets
        return {"input_ids": input_ids, "labels": labels, "segment": number, "document": document, "position": first}


def consecutive_segments(
    documents: Sequence[Ids], length: int, *, streams: int = 1, consecutive: int = 1, padding: int = 0
) -> Segments:
    """Batch the segments of documents so that consecutive ones lie together, for `LongTerm`.

    All segments, in the order of the documents, are divided into streams of about equal length. A batch holds, stream
    after stream, the next `consecutive` segments of each; where a document ends, the next begins. Every segment occurs
    once, and rows of padding fill up what is left over.

    Args:
        documents: Token ids of each document, integers, shape (tokens,); those of a single token have no target and are
            left out.
        length: Tokens a segment, at least 2.
        streams: Places in the text at which a batch reads.
        consecutive: Segments that a batch reads at each.
        padding: Token id that fills short segments.

    Raises:
        ConfigError: A number is too small, or there are no two tokens in any document.
    """
    _check(streams=streams, consecutive=consecutive)
    cuts = _cut(documents, length)
    groups = np.full(-(-len(cuts) // consecutive) * consecutive, -1)
    groups[: len(cuts)] = np.arange(len(cuts))
    steps = np.array_split(groups.reshape(-1, consecutive), streams)  # a stream: (batches, consecutive)
    order = np.full((len(steps[0]), streams, consecutive), -1)
    for stream, numbers in enumerate(steps):
        order[: len(numbers), stream] = numbers
    return Segments(documents, cuts, order.reshape(-1), length, streams * consecutive, padding)


def bm25_segments(
    documents: Sequence[Ids],
    length: int,
    *,
    rows: int,
    hits: int = 20,
    across_documents: bool = False,
    seed: int = 0,
    padding: int = 0,
    chain: npt.NDArray[np.int64] | None = None,
    show_progress: bool = False,
) -> Segments:
    """Batch the segments of documents so that similar ones lie together, for `External` (algorithm 1 of the paper).

    Args:
        documents: Token ids of each document, integers, shape (tokens,).
        length: Tokens a segment, at least 2.
        rows: Segments a batch.
        hits: How many of the most similar segments are looked at for the next one.
        across_documents: Let a segment be followed by one of another document, as for `External(own_document=False)`.
        seed: Of the chain.
        padding: Token id that fills short segments.
        chain: That of an earlier call with the same documents and length, to save the search; see `Segments.chain`.
        show_progress: Show rate and time left on stderr.

    Raises:
        ConfigError: A number is too small, or there are no two tokens in any document.
    """
    _check(rows=rows)
    cuts = _cut(documents, length)
    if chain is None:
        texts = [documents[document][first : first + length] for document, first in cuts]
        groups = cuts[:, 0] if across_documents else None
        chain = bm25_chain(texts, hits=hits, seed=seed, groups=groups, show_progress=show_progress)
    order = np.full(-(-len(cuts) // rows) * rows, -1)
    order[: len(chain)] = chain
    return Segments(documents, cuts, order, length, rows, padding)


def _cut(documents: Sequence[Ids], length: int) -> npt.NDArray[np.int64]:
    """Return document and first token of every segment that has a target."""
    if length < 2:
        raise ConfigError(f"segments of {length} tokens have no target; expected a length of at least 2")
    starts = [np.arange(0, len(ids) - 1, length - 1) for ids in documents]
    numbers = np.repeat(np.arange(len(documents)), [len(part) for part in starts])
    if not len(numbers):
        raise ConfigError("no document has two tokens; expected text to train on")
    return np.stack([numbers, np.concatenate(starts)], axis=1)


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected a whole number of at least 1")

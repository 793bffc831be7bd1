"""Segments that bring along their neighbors' next tokens, found once by a frozen encoder, and what came before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..datastore import Datastore
from ..errors import ConfigError
from ..models import LanguageModel
from ..progress import progress
from ._segments import Ids, Segments, consecutive_segments

_TOGETHER = 1 << 13  # queries


@dataclass(frozen=True, eq=False, kw_only=True)
class SpalmSegments(Segments):
    """`Segments` whose rows have `neighbors`, int64, shape (length, k), too; see `SpalmLoss`.

    Attributes:
        neighbors: Next tokens of the neighbors of every target, int32, shape (targets of all documents, k); −1: none.
        carry: Tokens before a segment that come along as `context`; 0 for none.
    """

    neighbors: npt.NDArray[np.int32]
    carry: int = 0

    @cached_property
    def _first(self) -> npt.NDArray[np.int64]:
        """Number of each document's first target."""
        return np.cumsum([0, *(max(0, len(ids) - 1) for ids in self.documents)])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        document, position = row["document"], row["position"]
        found = np.full((self.length, self.neighbors.shape[1]), -1, np.int64)
        context = np.full(self.carry, self.padding, np.int64)
        before: Ids = np.empty(0, np.int64)
        if document >= 0:
            ids = self.documents[document]
            count = min(self.length, len(ids) - position) - 1
            first = self._first[document] + position
            found[:count] = self.neighbors[first : first + count]
            before = ids[max(0, position - self.carry) : position]
            context[: len(before)] = before
        row |= {"neighbors": found}
        return row | {"context": context, "context_tokens": len(before)} if self.carry else row


def spalm_segments(
    documents: Sequence[Ids],
    neighbors: npt.NDArray[np.int32],
    length: int,
    *,
    streams: int = 1,
    carry: int = 0,
    padding: int = 0,
) -> SpalmSegments:
    """Batch segments as `consecutive_segments` does, one of each stream.

    Args:
        documents: Token ids of each document, integers, shape (tokens,).
        neighbors: See `neighbor_tokens`; of the same documents.
        length: Tokens a segment, at least 2.
        streams: Places in the text at which a batch reads.
        carry: Tokens before a segment that come along.
        padding: Token id that fills short segments.

    Raises:
        ConfigError: A number is too small, or there are no two tokens in any document.
    """
    plain = consecutive_segments(documents, length, streams=streams, padding=padding)
    parts = {item.name: getattr(plain, item.name) for item in fields(plain)}
    return SpalmSegments(**parts, neighbors=neighbors, carry=carry)


def neighbor_tokens(
    lm: LanguageModel,
    documents: Sequence[Ids],
    texts: Sequence[str],
    memory: Datastore,
    k: int = 4,
    *,
    own_document: bool = False,
    show_progress: bool = True,
    description: str = "finding neighbors",
) -> npt.NDArray[np.int32]:
    """Return the next tokens of the neighbors of every target, int32, shape (targets of all documents, k), −1 for none.

    Args:
        lm: The encoder that made the datastore.
        documents: Token ids of each document, integers, shape (tokens,).
        texts: Their texts, by which a document that is stored is known.
        memory: Where to search.
        k: Neighbors a target; the paper takes 4.
        own_document: Let a stored document find itself. A model that is trained so learns to copy, and nothing else.
        show_progress: Show rate and time left on stderr.
        description: What to call the work there.

    Raises:
        ConfigError: The datastore is pruned.
        DatastoreMismatch: The datastore was built with another model.
    """
    memory.manifest.check_bound(lm.identity)
    if memory.counts is not None:
        raise ConfigError(
            f"{memory.path} is pruned, and in training a neighbor counts once, whatever was merged into it; train with "
            "a datastore that is not"
        )
    counts = [max(0, len(ids) - 1) for ids in documents]
    owners = np.repeat(np.arange(len(documents)), counts)
    own = np.array([memory.document_range(text) for text in texts]).reshape(-1, 2)
    found = np.full((len(owners), k), -1, np.int32)
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def search() -> None:
        rows = torch.cat([part[0] for part in waiting]).numpy()
        keys = torch.cat([part[1] for part in waiting]).float().cpu().numpy()
        exclude = None if own_document else own[owners[rows]]
        part = memory.lookup(keys, min(k, len(memory)), exclude if exclude is not None and exclude.any() else None)
        found[rows, : part.tokens.shape[1]] = part.tokens.masked_fill(~part.present, -1).numpy()
        waiting.clear()
        advance(len(rows))

    with progress(description, len(owners), show=show_progress) as advance:
        for batch in lm.keys([np.asarray(ids, np.int64) for ids in documents if len(ids) > 1]):
            waiting.append(batch)
            if sum(len(rows) for rows, _ in waiting) >= _TOGETHER:
                search()
        if waiting:
            search()
    return found

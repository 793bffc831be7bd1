"""Which positions of a batch a position may look at while a model is trained (TRIME, Zhong et al. 2022, section 3.2).

An entry of the memory is a position's key with the token that comes next. Training memories are objects in a list, and
the list is their union: `[Local()]`, `[Local(), LongTerm()]`, `[Local(), External()]` are the three of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError


class Places(NamedTuple):
    """Where the targets of a batch stand, all of them in a row; padding and ignored labels are not among them.

    Attributes:
        segments: Number of the segment, int64, shape (n,).
        documents: Number of the document, int64, shape (n,).
        positions: Position in the document, int64, shape (n,).
    """

    segments: Tensor
    documents: Tensor
    positions: Tensor

    def rows(self, rows: slice) -> Places:
        """Return some of the places."""
        return Places(*(part[rows] for part in self))


class TrainingMemory(Protocol):
    """Says what may be seen."""

    def visible(self, queries: Places, entries: Places) -> Tensor:
        """Return whether the target in row i may see the entry in column j, bool, shape (q, n)."""
        ...


@dataclass(frozen=True)
class Local:
    """Earlier positions of the same segment."""

    def visible(self, queries: Places, entries: Places) -> Tensor:
        """Return what each target may see; see `TrainingMemory`."""
        return _in_own_segment(queries, entries) & _is_earlier(queries, entries)


@dataclass(frozen=True)
class LongTerm:
    """Earlier segments of the same document, as far as they are in the batch; see `consecutive_segments`."""

    def visible(self, queries: Places, entries: Places) -> Tensor:
        """Return what each target may see; see `TrainingMemory`."""
        in_document = queries.documents[:, None] == entries.documents
        return in_document & ~_in_own_segment(queries, entries) & _is_earlier(queries, entries)


@dataclass(frozen=True)
class External:
    """All positions of the other segments in the batch, which stand for a datastore; see `bm25_segments`.

    What `Local` shows is near and good, and a model that always has it learns nothing about the rest: it is therefore
    taken away from most segments.

    Attributes:
        drop_own: Share of the segments, drawn anew for every update, that may not look at themselves.
        own_document: Whether other segments of the same document are seen, too, as in the paper. A datastore seldom
            holds the document that is being read, and where documents repeat themselves a model that had its own learns
            to lean on more than it will find.

    Raises:
        ConfigError: The share is not in [0, 1].
    """

    drop_own: float = 0.9
    own_document: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop_own <= 1:
            raise ConfigError(f"drop_own is {self.drop_own}; expected a share between 0 and 1")

    def visible(self, queries: Places, entries: Places) -> Tensor:
        """Return what each target may see; see `TrainingMemory`."""
        if self.own_document:
            return ~_in_own_segment(queries, entries)
        return queries.documents[:, None] != entries.documents

    def drops(self, segments: Tensor, draw: tuple[int, int]) -> Tensor:
        """Return whether the segment of each target may not look at itself, bool, shape (n,).

        Args:
            segments: Numbers, int64, shape (n,).
            draw: Seed and number of the update. A segment's fate depends on these and its number alone, so there is no
                state that a resumed run would have to restore.
        """
        numbers, where = torch.unique(segments, return_inverse=True)
        drawn = [np.random.default_rng((*draw, number)).random() < self.drop_own for number in numbers.tolist()]
        return torch.tensor(drawn, dtype=torch.bool, device=segments.device)[where]


def drops(memories: Sequence[TrainingMemory], segments: Tensor, draw: tuple[int, int] | None) -> Tensor | None:
    """Return whether the segment of each target may not look at itself, bool, shape (n,); None where all may.

    Args:
        memories: As for `visible`.
        segments: Number of the segment of each target, int64, shape (n,).
        draw: Seed and number of the update; None, as in evaluation, drops nothing.
    """
    external = [memory for memory in memories if isinstance(memory, External)]
    if draw is None or not external:
        return None
    return torch.stack([memory.drops(segments, draw) for memory in external]).any(dim=0)


def visible(
    memories: Sequence[TrainingMemory], queries: Places, entries: Places, dropped: Tensor | None = None
) -> Tensor:
    """Return what targets may see of a batch: the union of the memories.

    Args:
        memories: Any number; without one there is nothing to see.
        queries: Where q targets stand.
        entries: Where the n entries stand.
        dropped: Whether the segment of each target may not look at itself, bool, shape (q,); see `drops`.

    Returns:
        Bool, shape (q, n): True where the target in row i may see the entry in column j.
    """
    shape = len(queries.positions), len(entries.positions)
    allowed = torch.zeros(shape, dtype=torch.bool, device=entries.positions.device)
    for memory in memories:
        allowed |= memory.visible(queries, entries)
    if dropped is not None:
        allowed &= ~(dropped[:, None] & _in_own_segment(queries, entries))
    return allowed


def _in_own_segment(queries: Places, entries: Places) -> Tensor:
    return queries.segments[:, None] == entries.segments


def _is_earlier(queries: Places, entries: Places) -> Tensor:
    return entries.positions < queries.positions[:, None]

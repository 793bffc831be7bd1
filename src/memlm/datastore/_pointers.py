"""Pointers: what followed the last neighbors in their documents, in the place of a search (Alon et al. 2022,
arXiv:2201.12431, "RetoMaton", without its clusters).

A neighbor whose value is the token that really came next points to the entry after it, in the same document. Where
enough pointers remain, they are the next neighbors and nothing is searched. Otherwise a search is made, and the k
nearest of what it found and of the pointers are the neighbors. Two differences from the paper: an entry that is both
found and pointed to counts once (there, twice on purpose), since a mixture is over a set of neighbors; and no more than
k are kept, so that pointers beside an exact search change nothing: they add what an approximate one misses. In a pruned
datastore an entry points nowhere where the one after it was merged into another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..evidence import Found
from ..neighbors import Neighbors
from ._datastore import Datastore

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Pointed(NamedTuple):
    """Neighbors of n targets, and which of them were searched for.

    Attributes:
        found: As of a search, shape (n, k), nearest first.
        searched: Bool, shape (n,).
    """

    found: Found
    searched: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pointers:
    """A datastore that is searched only where too few pointers remain; a memory for scoring text in order.

    Attributes:
        memory: The datastore.
        least: Pointers that save a search, the paper's τ; math.inf never saves one.
        stream: Targets, at most, after which a search is made again. A text is cut into streams of this length, and
            all of them advance together: long ones save more searches, short ones are more that share a search.

    Raises:
        ConfigError: A number is below 1, or the stream is no whole number.
    """

    memory: Datastore
    least: float
    stream: int = 16

    def __post_init__(self) -> None:
        for name in ("least", "stream"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not isinstance(self.stream, int):
            raise ConfigError(f"stream is {self.stream}; expected a whole number of targets")

    def __len__(self) -> int:
        return len(self.memory)

    @property
    def metric(self) -> str:
        """What distances are; see `Datastore.metric`."""
        return self.memory.metric

    def lookup(
        self,
        queries: Floats,
        targets: Ints,
        documents: Ints,
        k: int,
        exclude: Ints | None = None,
        wanted: npt.NDArray[np.bool_] | None = None,
    ) -> Pointed:
        """Find the neighbors of consecutive targets.

        Args:
            queries: float32, shape (n, width).
            targets: What came next, int64, shape (n,).
            documents: Number of each target's document, int64, shape (n,); no pointer passes from one to another.
            k: Neighbors a target.
            exclude: See `Datastore.search`.
            wanted: Bool, shape (n,); the others find nothing. None wants all.
        """
        begins = np.flatnonzero(np.diff(documents, prepend=-1))
        lengths = np.diff(begins, append=len(documents))
        pieces = [np.arange(0, length, self.stream) + begin for begin, length in zip(begins, lengths, strict=True)]
        starts = np.concatenate([np.zeros(0, np.int64), *pieces])
        return follow(self.memory, queries, targets, starts, k, least=self.least, exclude=exclude, wanted=wanted)


def follow(
    memory: Datastore,
    queries: Floats,
    targets: Ints,
    starts: Ints,
    k: int,
    *,
    least: float,
    exclude: Ints | None = None,
    wanted: npt.NDArray[np.bool_] | None = None,
) -> Pointed:
    """Find the neighbors of consecutive targets, by pointers where enough remain, otherwise by search.

    Args:
        memory: The datastore.
        queries: float32, shape (n, width).
        targets: What came next, int64, shape (n,).
        starts: Rows at which streams begin, rising from 0, int64; each stream goes on to the next start. The streams
            go on by themselves while pointers last, and wait for one another where they must search, so that a search
            is for many of them.
        k: Neighbors a target.
        least: Pointers that save a search.
        exclude: See `Datastore.search`; pointers do not enter these ranges either.
        wanted: Bool, shape (n,); the others find nothing. None wants all.

    Raises:
        ConfigError: k is larger than the datastore.
        ShapeError: Queries have another width, or are not finite.
    """
    memory.check_search(queries, k)
    found = Neighbors.empty(len(queries), k)
    searched = np.zeros(len(queries), bool)
    wanted = np.ones(len(queries), bool) if wanted is None else wanted
    at, ends = starts.copy(), np.append(starts[1:], len(queries))  # each stream's next row, and where it stops
    moving = np.ones(len(starts), bool)  # the other streams wait for a search
    while (open_ := at < ends).any():
        if (moving & open_).any():
            streams = np.flatnonzero(moving & open_)
            rows = at[streams]
            _follow_pointers(memory, queries, targets, found, rows[(rows > starts[streams]) & wanted[rows]], exclude)
            searched[rows] = wanted[rows] & (found.present[rows].sum(axis=1) < least)
            moving[streams] = ~searched[rows]
            at[streams] += moving[streams]
        else:  # all of them wait: one search for as many as there can be
            rows = at[open_]
            near = memory.search(queries[rows], k, None if exclude is None else exclude[rows])
            near = _union(near, found.rows(rows), memory.slots)
            found.put(rows, near)
            at[open_] += 1
            moving[:] = True
    return Pointed(memory.with_values(found), searched)


def _follow_pointers(
    memory: Datastore, queries: Floats, targets: Ints, found: Neighbors, rows: Ints, exclude: Ints | None
) -> None:
    """Advance those neighbors of the rows before that carry the token which came; write them, nearest first."""
    before = found.entries[rows - 1]  # (rows, k)
    agrees = found.present[rows - 1] & (memory.values[before] == targets[rows - 1, None])
    lines, places = agrees.nonzero()
    entries = before[lines, places]
    allowed = memory.followed[entries]
    entries += 1
    if exclude is not None:
        first, stop = exclude[rows[lines]].T
        allowed &= (entries < first) | (entries >= stop)
    lines, entries = lines[allowed], entries[allowed]
    counts = np.bincount(lines, minlength=len(rows))
    places = np.arange(len(lines)) - (counts.cumsum() - counts)[lines]
    result = Neighbors.empty(len(rows), counts.max(initial=0))
    result.entries[lines, places] = entries
    result.distances[lines, places] = memory.distances(queries[rows], lines, entries)
    result.present[lines, places] = True
    found.put(rows, result.taken(result.distances.argsort(axis=1, kind="stable")))


def _union(near: Neighbors, pointers: Neighbors, size: int) -> Neighbors:
    """Return the k nearest of what a search found and of pointers, none of them twice; no entry is `size`."""
    nearer = pointers.present & (pointers.distances < near.distances[:, -1:])
    lines, places = nearer.nonzero()
    if not len(lines):
        return near
    some = np.flatnonzero(nearer.any(axis=1))
    names = np.where(near.present, near.entries + size * np.arange(len(near.entries))[:, None], -1)[some].ravel()
    names.sort()
    asked = pointers.entries[lines, places] + size * lines
    known = names[np.searchsorted(names, asked).clip(max=len(names) - 1)] == asked
    nearer[lines[known], places[known]] = False
    some = np.flatnonzero(nearer.any(axis=1))
    pointers = Neighbors(pointers.entries, np.where(nearer, pointers.distances, np.inf), nearer)
    both = near.rows(some).beside(pointers.rows(some))
    best = both.taken(both.distances.argsort(axis=1, kind="stable")[:, : near.entries.shape[1]])
    near.put(some, best)
    return near

"""Pruning: entries of a document that are alike become one that counts for all of them, in one commit.

Greedy merging (He, Neubig, Berg-Kirkpatrick 2021, arXiv:2109.04212), with one more condition: both entries belong to
the same document. So a document's entries stand for nothing of another document, and removing it removes all that it
contributed, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import ops
from ..errors import ConfigError, DatastoreCorrupt
from ..evidence import INNER_PRODUCT
from ..progress import progress
from ..text import count
from ._compact import rewrite
from ._manifest import Manifest
from ._part import Part
from ._pruned import MOST_ENTRIES
from ._segment import Segment
from ._stored import Directory
from ._version import Version
from ._writing import writing

Ints = npt.NDArray[np.int64]
_TOGETHER = 1 << 12  # entries whose neighbors are searched for at once
_MOST_NEIGHBORS = 1 << 12


def check_pruning(neighbors: Any, distance: Any, seed: Any, metric: str) -> None:
    """Raise ConfigError unless a datastore of this metric can be pruned so."""
    if type(neighbors) is not int or not 0 <= neighbors <= _MOST_NEIGHBORS:
        raise ConfigError(f"neighbors is {neighbors!r}; expected 0 (only equal keys) to {_MOST_NEIGHBORS:,}")
    if distance is not None and not (isinstance(distance, int | float) and distance >= 0):
        raise ConfigError(f"distance is {distance!r}; expected a squared distance of at least 0")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed is {seed!r}; expected a whole number from 0, below 2⁶³")
    if neighbors and metric == INNER_PRODUCT:
        raise ConfigError(
            f"neighbors is {neighbors}, but keys that are searched by inner product have no near ones; pass 0, which "
            "merges entries with equal keys"
        )


def prune_segments(
    path: Path,
    index_of: Callable[[Manifest], Part | None],
    *,
    neighbors: int,
    distance: float | None,
    seed: int,
    segment_entries: int,
    show_progress: bool,
) -> int:
    """Merge entries, and rewrite what is left as a compaction does; see `Datastore.prune`.

    Args:
        path: The datastore's folder.
        index_of: Builds the index of a version that is not published yet.
        neighbors: As of `owners_of`.
        distance: As of `owners_of`.
        seed: As of `owners_of`.
        segment_entries: Entries a segment, about.
        show_progress: Show rate and time left on stderr.

    Returns:
        How many entries were merged into others.
    """
    with writing(path, "prune") as manifest:
        version = Version(path, manifest, verify=False)
        owners = owners_of(version, neighbors, distance, seed, show_progress=show_progress)
        gone = merged(owners)
        if not gone:
            return 0
        counts = np.bincount(owners, version.counts, minlength=version.slots)
        if counts.max() > MOST_ENTRIES:  # as uint32 it might be 0, and the entry would be gone
            raise DatastoreCorrupt(f"{path} has a document whose entries stand for too many; restore it from a copy")
        counts = counts.astype(np.uint32)
        old = Directory.open(path, manifest, verify=True)
        draft = manifest.following(f"prune {count(gone, 'entry', 'entries')}")
        parts = np.split(counts, version.keys.starts[1:-1])
        rewrite(path, old, draft, index_of, counts=parts, segment_entries=segment_entries, show_progress=show_progress)
        return gone


def merged(owners: Ints) -> int:
    """Return how many entries are merged into others."""
    return int((owners != np.arange(len(owners))).sum())


def owners_of(version: Version, neighbors: int, distance: float | None, seed: int, *, show_progress: bool) -> Ints:
    """Return into which entry each one is merged, itself where it stays, int64, shape (slots,).

    First, entries of a document with the same value and the same key, bit for bit, are merged into the first of them.
    Then those that stay are merged greedily; see `ops.greedy_merging`.

    Args:
        version: The datastore; deleted entries are neither merged nor merged into.
        neighbors: Nearest entries, in the whole datastore, among which each looks for those to take in; 0 for none.
        distance: Largest squared distance of an entry that is taken in; None for any.
        seed: Of the order in which entries are visited.
        show_progress: Show rate and time left on stderr.
    """
    generator = torch.Generator().manual_seed(seed)
    documents = np.full(version.slots, -1)  # of deleted entries: none
    owners = np.arange(version.slots)
    start = 0
    with progress("finding what is alike", len(version), show=show_progress) as advance:
        for segment, live in version.live_documents():
            here = slice(start, start + segment.entries)
            for number in live:
                rows = segment.rows(number)
                entries = np.arange(start + rows.start, start + rows.stop)
                documents[entries] = number  # no neighbor in another segment has the same
                owners[entries] = entries[_first_equal(segment, rows)]
            staying = np.flatnonzero((owners[here] == np.arange(start, here.stop)) & (documents[here] >= 0)) + start
            advance(int((documents[here] >= 0).sum()) - len(staying) * (neighbors > 0))
            pairs = [np.zeros((0, 2), np.int64)]
            for first in range(0, len(staying) if neighbors else 0, _TOGETHER):
                asking = staying[first : first + _TOGETHER]
                pairs.append(_alike(version, owners, documents, here, asking, neighbors, distance))
                advance(len(asking))
            owners[here] = _greedily(owners[here] - start, np.concatenate(pairs) - start, staying - start, generator)
            owners[here] += start
            start = here.stop
    return owners


def _first_equal(segment: Segment, rows: slice) -> Ints:
    """Return, for every entry of a document, the first with the same value and key."""
    keys = segment.keys[rows].contiguous().view(torch.uint8).numpy()
    values = segment.values[rows].astype(np.uint32)[:, None].view(np.uint8)
    both = np.ascontiguousarray(np.concatenate([keys, values], axis=1))
    _, first, which = np.unique(both.view(f"V{both.shape[1]}").ravel(), return_index=True, return_inverse=True)
    return first[which]


def _alike(
    version: Version,
    owners: Ints,
    documents: Ints,
    here: slice,
    asking: Ints,
    neighbors: int,
    distance: float | None,
) -> Ints:
    """Return pairs of entries that may be merged, (asking, near), int64, shape (pairs, 2), the asking ones rising."""
    k = min(neighbors + 1, len(version))  # an entry finds itself, too
    found = version.index.search(version.keys.gather_keys(asking).numpy(), k, (0, 0))
    other = found.present & (found.entries != asking[:, None])
    other &= other.cumsum(axis=1) <= neighbors
    near = found.entries
    alike = other & (near >= here.start) & (near < here.stop)
    alike &= (documents[near] == documents[asking, None]) & (version.values[near] == version.values[asking, None])
    if distance is not None:
        alike &= found.distances <= distance
    rows, places = alike.nonzero()
    return np.stack([asking[rows], owners[near[rows, places]]], axis=1)


def _greedily(owners: Ints, pairs: Ints, staying: Ints, generator: torch.Generator) -> Ints:
    """Return the owners within a segment after greedy merging of those that stay."""
    numbers = np.searchsorted(staying, pairs)  # among those that stay
    order = torch.randperm(len(staying), generator=generator)
    entries, neighbors = torch.from_numpy(numbers).T.contiguous()
    into = ops.greedy_merging(order, entries, neighbors).numpy()
    result = owners.copy()
    result[staying] = staying[into]
    return result[result]  # what equals an entry that was merged goes where that went

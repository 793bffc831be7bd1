"""Batched search of inverted lists: one list after another, each for all queries that probe it.

FAISS scans the lists of one query after the other and reads their keys from memory every time. For thousands of queries
the other order is several times faster: the distances of a list to its queries are one matrix product, of float32
numbers relative to the list's centroid, so that large norms cancel nothing. Each query keeps a reservoir of candidates
that is cut back to its k nearest whenever it is full.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

import faiss  # isort: skip

from ..neighbors import Neighbors

_GROUP = 4096  # queries searched together, at most
_SHORTEST = 8  # queries a list, on average, from which this order pays
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def pays(ivf: Any, queries: int) -> bool:
    """Tell whether so many queries are searched faster here than by FAISS, and whether this index allows it."""
    return _key_dtype(ivf) is not None and 0 < _SHORTEST * ivf.nlist <= queries * ivf.nprobe


def search_lists(ivf: Any, queries: Floats, k: int, exclude: tuple[int, int]) -> Neighbors:
    """Search as `ivf.search` does, in its nprobe nearest lists; entries of the range [from, to) are not found.

    Args:
        ivf: A FAISS index with inverted lists of keys in their stored type.
        queries: float32, shape (n, width).
        k: Neighbors a query.
        exclude: Range of entries.
    """
    result = Neighbors.empty(len(queries), k)
    probed = ivf.quantizer.search(queries, min(ivf.nprobe, ivf.nlist))[1]  # (n, nprobe), list numbers
    threads = torch.get_num_threads()
    size = min(_GROUP, max(_GROUP // 4, -(-len(queries) // threads)))
    groups = [slice(start, start + size) for start in range(0, len(queries), size)]
    # One thread a group: most of the work is too small to be divided. set_num_threads also acts on threads yet to come.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            parts = pool.map(lambda group: _search_group(ivf, queries[group], probed[group], k, exclude), groups)
            for group, found in zip(groups, parts, strict=True):
                for whole, part in zip(result, found, strict=True):
                    whole[group] = part
        finally:
            torch.set_num_threads(threads)
    return result


def _search_group(ivf: Any, queries: Floats, probed: Ints, k: int, exclude: tuple[int, int]) -> Neighbors:
    order = probed.ravel().argsort(kind="stable")
    bounds = np.searchsorted(probed.ravel()[order], np.arange(ivf.nlist + 1))
    order //= probed.shape[1]  # queries, in the order of their lists
    capacity = 2 * k + 8
    distances = np.empty((len(queries), capacity), np.float32)
    entries = np.empty((len(queries), capacity), np.int64)
    counts = np.zeros(len(queries), np.int64)
    limits = np.full(len(queries), np.inf, np.float32)
    vectors = torch.from_numpy(queries)
    for number in range(ivf.nlist):
        rows = order[bounds[number] : bounds[number + 1]]
        ids, stored = _list(ivf, number)
        if not len(rows) or not len(ids):
            continue
        centroid = torch.from_numpy(ivf.quantizer.reconstruct(number))
        keys = stored.float() - centroid  # (length, width)
        asking = vectors[torch.from_numpy(rows)] - centroid  # (m, width)
        # ‖q − k‖² = ‖q‖² + (‖k‖² − 2 q·k), all relative to the centroid
        tile = torch.addmm(keys.square().sum(dim=1), asking, keys.T, alpha=-2)  # (m, length)
        if exclude[0] < exclude[1]:
            tile[:, torch.from_numpy((ids >= exclude[0]) & (ids < exclude[1]))] = torch.inf
        norms = asking.square().sum(dim=1)
        _offer(tile.numpy(), norms.numpy(), rows, ids, distances, entries, counts, limits, k)
    return _nearest(distances, entries, counts, k)


def _key_dtype(ivf: Any) -> torch.dtype | None:
    """Return the type in which the lists hold keys as they were stored; None where they hold something else."""
    if isinstance(ivf, faiss.IndexIVFFlat):
        return torch.float32
    if isinstance(ivf, faiss.IndexIVFScalarQuantizer) and not ivf.by_residual:
        types = {faiss.ScalarQuantizer.QT_fp16: torch.float16, faiss.ScalarQuantizer.QT_bf16: torch.bfloat16}
        return types.get(ivf.sq.qtype)
    return None


def _list(ivf: Any, number: int) -> tuple[Ints, torch.Tensor]:
    """Return the entries of a list, int64 (length,), and their keys (length, width), without copying."""
    length, dtype = ivf.invlists.list_size(number), _key_dtype(ivf)
    assert dtype is not None  # `pays` has asked
    if not length:
        return np.empty(0, np.int64), torch.empty((0, ivf.d))
    codes = faiss.rev_swig_ptr(ivf.invlists.get_codes(number), length * ivf.code_size)
    keys = torch.from_numpy(codes).view(dtype).view(length, ivf.d)
    return faiss.rev_swig_ptr(ivf.invlists.get_ids(number), length), keys


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call; keep the machine code where there is a place for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor a home can be written to
        return njit(nogil=True)(function)


@_compiled
def _offer(
    tile: Floats,
    norms: Floats,
    rows: Ints,
    ids: Ints,
    distances: Floats,
    entries: Ints,
    counts: Ints,
    limits: Floats,
    k: int,
) -> None:
    """Put every entry nearer than its query's limit into the query's reservoir."""
    for line in range(len(rows)):
        row = rows[line]
        near, found = distances[row], entries[row]
        count, norm = counts[row], norms[line]
        limit = limits[row] - norm
        for column in range(tile.shape[1]):
            if tile[line, column] < limit:
                near[count], found[count] = max(tile[line, column] + norm, np.float32(0.0)), ids[column]
                count += 1
                if count == len(near):
                    count, limits[row] = _cut(near, found, count, k, k // 8)
                    limit = limits[row] - norm
        counts[row] = count


@_compiled
def _cut(distances: Floats, entries: Ints, count: int, k: int, slack: int) -> tuple[int, float]:
    """Keep the k nearest of a reservoir and at most `slack` more; return their number and the distance to beat.

    The limit is found by bisection: counting is quicker than sorting.
    """
    low, high = distances[0], distances[0]
    for place in range(count):
        low, high = min(low, distances[place]), max(high, distances[place])
    high = np.nextafter(high, np.float32(np.inf))
    for _ in range(40):
        middle = np.float32(0.5) * (low + high)
        nearer = 0
        for place in range(count):
            nearer += distances[place] < middle
        if nearer < k:
            low = middle
        else:
            high = middle
            if nearer <= k + slack:
                break
    sure = 0
    for place in range(count):
        sure += distances[place] < low
    ties = k + slack - sure  # room for what lies from low to high
    kept = 0
    for place in range(count):
        distance = distances[place]
        if distance < low or (distance < high and ties > 0):
            ties -= distance >= low
            distances[kept], entries[kept] = distance, entries[place]
            kept += 1
    return kept, high


@_compiled
def _cut_all(distances: Floats, entries: Ints, counts: Ints, packed: Ints, k: int) -> None:
    """Write the k nearest of every reservoir into `packed`: distance in the upper, entry in the lower 32 bits."""
    for row in range(len(counts)):
        if counts[row] > packed.shape[1]:
            counts[row], _ = _cut(distances[row], entries[row], counts[row], k, packed.shape[1] - k)
        bits = distances[row].view(np.int32)
        for place in range(counts[row]):
            packed[row, place] = (np.int64(bits[place]) << 32) | entries[row, place]


def _nearest(distances: Floats, entries: Ints, counts: Ints, k: int) -> Neighbors:
    """Sort the reservoirs. A distance is not negative, so its bits sort as it does."""
    packed = np.full((len(counts), k + k // 8), np.iinfo(np.int64).max)  # (n, a little over k)
    _cut_all(distances, entries, counts, packed, k)
    packed.sort(axis=1)
    packed = packed[:, :k]
    present = packed != np.iinfo(np.int64).max
    return Neighbors(
        np.where(present, packed & 0xFFFFFFFF, 0),
        np.where(present, (packed >> 32).astype(np.int32).view(np.float32), np.inf),
        present,
    )

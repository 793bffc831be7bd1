"""Batched search of inverted lists: one list after another, each for all queries that probe it.

FAISS scans the lists of one query after the other and reads their keys from memory every time. For thousands of queries
the other order is several times faster: the distances of a list to its queries are one matrix product (several, where
the list is long), of float32 numbers relative to the list's center, so that large norms cancel nothing. Each query
keeps a reservoir of candidates that is cut back to its k nearest whenever it is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

import faiss  # isort: skip

from ..neighbors import Neighbors

_GROUP = 4096  # queries searched together, at most
_SHORTEST = 8  # queries a list, on average, from which this order pays
_TILE = 1 << 23  # float32 numbers that a thread computes at once: distances and keys of a piece of a list
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def pays(ivf: Any, queries: int) -> bool:
    """Tell whether so many queries are searched faster here than by FAISS, and whether this index allows it.

    Not by inner product: reservoirs are sorted by the bits of distances, none of which may be negative.
    """
    allowed = ivf.metric_type == faiss.METRIC_L2 and _stored_keys(ivf) is not None
    return allowed and 0 < _SHORTEST * ivf.nlist <= queries * ivf.nprobe


def search_lists(
    ivf: Any, queries: Floats, k: int, exclude: tuple[int, int], live: npt.NDArray[np.bool_] | None = None
) -> Neighbors:
    """Search as `ivf.search` does, in its nprobe nearest lists; entries of the range [from, to) are not found.

    Args:
        ivf: A FAISS index with inverted lists of keys in their stored type.
        queries: float32, shape (n, width).
        k: Neighbors a query.
        exclude: Range of entries.
        live: Whether an entry may be found, shape (entries of the index,); None allows all.
    """
    result = Neighbors.empty(len(queries), k)
    probed = ivf.quantizer.search(queries, min(ivf.nprobe, ivf.nlist))[1]  # (n, nprobe), list numbers
    threads = torch.get_num_threads()
    size = min(_GROUP, max(_GROUP // 4, -(-len(queries) // threads)))
    groups = [slice(start, start + size) for start in range(0, len(queries), size)]
    with ThreadPoolExecutor(threads, initializer=_divide_nothing) as pool:
        parts = pool.map(lambda group: _search_group(ivf, queries[group], probed[group], k, exclude, live), groups)
        for group, found in zip(groups, parts, strict=True):
            for whole, part in zip(result, found, strict=True):
                whole[group] = part
    return result


def _divide_nothing() -> None:
    """Keep OpenMP from dividing the work of this thread, most of which is too small; other threads keep their number.

    Not by torch.set_num_threads, which also decides for all threads yet to come. Where torch brings a runtime other
    than FAISS's, it goes on dividing its own part, the conversion of keys.
    """
    torch.get_num_threads()  # a thread takes torch's number over when it first uses torch; that must not come later
    faiss.omp_set_num_threads(1)


def _search_group(
    ivf: Any, queries: Floats, probed: Ints, k: int, exclude: tuple[int, int], live: npt.NDArray[np.bool_] | None
) -> Neighbors:
    order = probed.ravel().argsort(kind="stable")
    bounds = np.searchsorted(probed.ravel()[order], np.arange(ivf.nlist + 1))
    order //= probed.shape[1]  # queries, in the order of their lists
    capacity = 2 * k + 8
    distances = np.empty((len(queries), capacity), np.float32)
    entries = np.empty((len(queries), capacity), np.int64)
    counts = np.zeros(len(queries), np.int64)
    limits = np.full(len(queries), np.inf, np.float32)
    for number in range(ivf.nlist):
        rows = order[bounds[number] : bounds[number + 1]]
        if not len(rows):
            continue
        for ids, keys in _pieces(ivf, number, max(1, _TILE // (len(rows) + ivf.d))):
            center = _center(ivf, number, keys)
            keys -= center
            tile = faiss.pairwise_distances(queries[rows] - center, keys)  # (m, length)
            if exclude[0] < exclude[1]:
                tile[:, (ids >= exclude[0]) & (ids < exclude[1])] = np.inf
            if live is not None:
                tile[:, ~live[ids]] = np.inf
            _offer(tile, rows, ids, distances, entries, counts, limits, k)
    return _nearest(distances, entries, counts, k)


def _stored_keys(ivf: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what makes keys, float32 (n, d), of the codes of a list, uint8 (n, code size); None where they are coded
    in a way that is not known here.
    """
    if type(ivf) is faiss.IndexIVFFlat:  # its subclasses lay out their lists in other ways
        return lambda codes: codes.view(torch.float32).clone()
    if type(ivf) is not faiss.IndexIVFScalarQuantizer or ivf.by_residual:
        return None
    types = {faiss.ScalarQuantizer.QT_fp16: torch.float16, faiss.ScalarQuantizer.QT_bf16: torch.bfloat16}
    if (dtype := types.get(ivf.sq.qtype)) is not None:
        return lambda codes: codes.view(dtype).float()
    if ivf.sq.qtype != faiss.ScalarQuantizer.QT_8bit:
        return None
    low, width = torch.from_numpy(faiss.vector_to_array(ivf.sq.trained)).view(2, -1)
    first, step = low + width / 510, width / 255
    return lambda codes: torch.addcmul(first, codes.float(), step)


def _pieces(ivf: Any, number: int, most: int) -> Iterator[tuple[Ints, Floats]]:
    """Yield the entries of a list, int64 (length,), and a copy of their keys (length, width); so many at most."""
    length, keys_of = ivf.invlists.list_size(number), _stored_keys(ivf)
    assert keys_of is not None  # `pays` has asked
    if not length:
        return
    codes = torch.from_numpy(faiss.rev_swig_ptr(ivf.invlists.get_codes(number), length * ivf.code_size))
    codes, ids = codes.view(length, -1), faiss.rev_swig_ptr(ivf.invlists.get_ids(number), length)
    for start in range(0, length, most):
        yield ids[start : start + most], keys_of(codes[start : start + most]).numpy()


def _center(ivf: Any, number: int, keys: Floats) -> Floats:
    """Return a place in the midst of some keys of a list: the list's centroid, or their mean."""
    try:
        return ivf.quantizer.reconstruct(number)
    except RuntimeError:  # not every coarse quantizer has its centroids at hand
        return keys.mean(axis=0)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call; keep the machine code where there is a place for it."""
    plain = njit(nogil=True)(function)
    try:
        chosen = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor a home can be written to
        return plain

    @wraps(function)
    def call(*arguments: Any) -> Any:
        nonlocal chosen
        try:
            return chosen(*arguments)
        except Exception:  # a full disk, a damaged file, whatever unpickling that raises: the function has not begun
            chosen = plain
            return chosen(*arguments)

    return call


@_compiled
def _offer(
    tile: Floats, rows: Ints, ids: Ints, distances: Floats, entries: Ints, counts: Ints, limits: Floats, k: int
) -> None:
    """Put every entry nearer than its query's limit into the query's reservoir."""
    for line in range(len(rows)):
        row = rows[line]
        near, found = distances[row], entries[row]
        count, limit = counts[row], limits[row]
        for column in range(tile.shape[1]):
            if tile[line, column] < limit:
                near[count], found[count] = max(tile[line, column], np.float32(0.0)), ids[column]
                count += 1
                if count == len(near):
                    count, limit = _cut(near, found, count, k, k // 8)
        counts[row], limits[row] = count, limit


@njit(nogil=True)  # becomes part of the functions that call it, which are kept
def _cut(distances: Floats, entries: Ints, count: int, k: int, slack: int) -> tuple[int, np.float32]:
    """Keep the k nearest of a reservoir and at most `slack` more; return their number and the distance to beat.

    The limit is found by bisection: counting is quicker than sorting. A distance is not negative, so its bits sort as
    it does, and bisecting them is exact however far apart distances are.
    """
    bits = distances.view(np.int32)
    low, high = np.int64(bits[0]), np.int64(bits[0])
    for place in range(count):
        low, high = min(low, np.int64(bits[place])), max(high, np.int64(bits[place]))
    high += 1
    nearer = count  # than high
    while nearer > k + slack and high - low > 1:
        middle = np.int32((low + high) // 2)
        below = 0
        for place in range(count):
            below += bits[place] < middle
        if below < k:
            low = np.int64(middle)
        else:
            high, nearer = np.int64(middle), below
    sure = 0
    for place in range(count):
        sure += bits[place] < low
    ties = k + slack - sure  # room for what lies from low to high
    kept = 0
    for place in range(count):
        if bits[place] < low or (bits[place] < high and ties > 0):
            ties -= bits[place] >= low
            distances[kept], entries[kept] = distances[place], entries[place]
            kept += 1
    return kept, np.int32(high).view(np.float32)


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

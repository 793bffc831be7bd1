"""Putting similar segments next to one another by BM25 (TRIME, Zhong et al. 2022, arXiv:2205.12674, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..progress import progress

_QUERIES = 256  # searched for at once


def bm25_chain(
    segments: Sequence[npt.NDArray[np.integer]],
    *,
    hits: int = 20,
    seed: int = 0,
    groups: npt.NDArray[np.integer] | None = None,
    show_progress: bool = False,
) -> npt.NDArray[np.int64]:
    """Order segments so that each is followed by one that is like it.

    The chain starts at a random segment. The next is the unused one that scores highest among the best hits of the
    last, the last as the query and its tokens as the terms; a random unused one where all hits are used.

    Args:
        segments: Token ids of each, integers, shape (tokens,).
        hits: How many of the best are looked at.
        seed: Of the random choices.
        groups: Number of the group of each segment, such as its document, shape (segments,): the next one is of another
            group than the last. None groups nothing.
        show_progress: Show rate and time left on stderr.

    Returns:
        Every number from 0 to the number of segments once, int64, shape (segments,).
    """
    count = len(segments)
    near = _nearest(segments, min(hits + 1, count), show_progress)  # the best hit of a segment is itself
    generator = np.random.default_rng(seed)
    unused = np.ones(count, bool)
    spare = iter(generator.permutation(count).tolist())  # in which order random ones are taken
    chain = np.empty(count, np.int64)
    for place in range(count):
        candidates = near[chain[place - 1]] if place else near[:0, 0]
        fresh = candidates[unused[candidates]]
        if groups is not None and place:
            fresh = fresh[groups[fresh] != groups[chain[place - 1]]]
        chain[place] = fresh[0] if len(fresh) else next(number for number in spare if unused[number])
        unused[chain[place]] = False
    return chain


def _nearest(segments: Sequence[npt.NDArray[np.integer]], k: int, show: bool) -> npt.NDArray[np.int32]:
    """Return the k best hits of every segment, best first, shape (segments, k)."""
    import bm25s

    tokens, flat = np.unique(np.concatenate(segments), return_inverse=True)
    ids = [part.tolist() for part in np.split(flat, np.cumsum([len(segment) for segment in segments])[:-1])]
    index = bm25s.BM25(backend="numpy")  # compiling for numba takes longer than it saves below some 20,000 segments
    index.index((ids, {str(token): number for number, token in enumerate(tokens)}), show_progress=False)
    terms = [sorted(set(segment)) for segment in ids]
    found = []
    with progress("ordering by BM25", len(terms), "segments", show=show) as advance:
        for first in range(0, len(terms), _QUERIES):
            some = terms[first : first + _QUERIES]
            found.append(index.retrieve(some, k=k, return_as="documents", show_progress=False))
            advance(len(some))
    return np.concatenate(found)

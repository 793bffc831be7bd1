"""Search by a FAISS index, with distances of the stored keys.

An index proposes entries. Where it holds the keys as they are stored, its distances are final; otherwise twice as many
proposals as asked for are ranked again by exact distances, computed from the datastore's own keys.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

import faiss  # isort: skip

from ..errors import IndexError_
from ..neighbors import Neighbors
from ..progress import progress
from ._exact import ExactIndex
from ._metric import FAISS_METRICS, as_distances, distances
from ._protocol import Index, Keys

if TYPE_CHECKING:
    from ..datastore._part import Part

_TRAINING_KEYS_A_LIST = 48  # FAISS warns below 39
_TARGET_RECALL = 0.985
_SAMPLE = 256  # queries on which recall is measured
_RERANK_FACTOR = 2
_DETAILS = {"factory": str, "lists": int, "recall": (int, float), "recall_k": int, "recall_queries": int}
HOW = "by `memlm compact DATASTORE --index auto`"
_FETCHED_AT_ONCE = 1 << 24  # proposals of one search without selector
# Not their subclasses, which may compute distances in ways of their own
_STORES_KEYS = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexHNSWFlat, faiss.IndexNSGFlat)


# Types of FAISS's scalar quantizer whose codes are the stored keys themselves; on a grid, where it is the keys' own
_SAME_TYPES = {
    "float16": faiss.ScalarQuantizer.QT_fp16,
    "bfloat16": faiss.ScalarQuantizer.QT_bf16,
    "int8": faiss.ScalarQuantizer.QT_8bit,
}


class FaissIndex:
    """A FAISS index over the first entries of a datastore, opened for searching.

    Args:
        keys: The version of the datastore.
        folder: Where indexes lie.
        part: The index.
        known: An open index that may be the same part, and is then used.
    """

    def __init__(self, keys: Keys, folder: Path, part: Part, known: Index | None = None) -> None:
        self.details = part.details
        self.part = part
        self._keys = keys
        if isinstance(known, FaissIndex) and known.part == part:
            self._faiss = known._faiss
            _set_nprobe(self._faiss, part.details["nprobe"])
            return
        try:
            nprobe = int(part.details["nprobe"])
            if nprobe < 1 or not isinstance(part.details["stores_keys"], bool) or "index.faiss" not in part.files:
                raise ValueError("the manifest describes it wrongly")
            self._faiss = faiss.read_index(str(folder / part.name / "index.faiss"))
            if self._faiss.ntotal != part.details["entries"] or self._faiss.d != keys.width:
                raise ValueError(f"it holds {self._faiss.ntotal} keys of width {self._faiss.d}")
            if self._faiss.metric_type != FAISS_METRICS[keys.metric]:
                raise ValueError(f"it does not search by {keys.metric}")
            ivf = faiss.try_extract_index_ivf(self._faiss)
            lists = ivf.invlists if ivf is not None else None
            if lists is not None and isinstance(faiss.downcast_InvertedLists(lists), faiss.OnDiskInvertedLists):
                raise ValueError("its lists lie in another file, which no checksum covers")
            for name, kind in _DETAILS.items():
                if not isinstance(part.details[name], kind):
                    raise TypeError(f"its {name} is {str(part.details[name])[:40]!r}")
            _set_nprobe(self._faiss, nprobe)
        except (RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
            where = folder / part.name
            raise IndexError_(f"the index {where} does not fit its datastore: {error}; rebuild it {HOW}") from error
        except MemoryError as error:
            where = folder / part.name
            raise IndexError_(f"the index {where} wants more memory than there is; rebuild it {HOW}") from error

    @property
    def entries(self) -> int:
        """How many entries it holds, from the first."""
        return self.part.details["entries"]

    def visit(self, lists: int) -> None:
        """Visit so many lists a query from now on, here alone: fewer are faster, and miss more neighbors.

        `details` then name them, and no recall, which was measured with another number.

        Raises:
            IndexError_: The index has not so many lists, or none.
        """
        ivf = faiss.try_extract_index_ivf(self._faiss)
        most = ivf.nlist if ivf is not None else 0
        if not 1 <= lists <= most:
            raise IndexError_(f"{lists} lists to visit, but this index has {most}; expected 1 to so many")
        _set_nprobe(self._faiss, lists)
        kept = {name: value for name, value in self.details.items() if not name.startswith("recall")}
        self.details = {**kept, "nprobe": lists}

    def search(self, queries: npt.NDArray[np.float32], k: int, exclude: tuple[int, int]) -> Neighbors:
        """See `Index.search`."""
        fetch = min(k if self.details["stores_keys"] else _RERANK_FACTOR * k, self._faiss.ntotal)
        live = None if self._keys.live is None else self._keys.live[: self._faiss.ntotal]
        try:
            found = propose(self._faiss, queries, fetch, exclude, live)
            return found if self.details["stores_keys"] else rerank(self._keys, queries, found, k)
        except (RuntimeError, IndexError) as error:  # it names lists or entries that are not there
            raise IndexError_(f"the index cannot be searched: {_reason(error)}; rebuild it {HOW}") from error


def build_faiss(keys: Keys, folder: Path, factory: str, name: str, *, show_progress: bool) -> Part:
    """Train, fill, tune and measure a FAISS index; on any error nothing of it is left.

    `nprobe` is raised until recall@k, measured against exact search with stored keys as queries, reaches 0.985; what
    was reached goes into the manifest.
    """
    from ..datastore._part import Part

    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        index, stores_keys = _train(keys, factory)  # must be kept: parts of it do not own their memory
        with progress("building index", keys.slots, "keys", show=show_progress) as advance:
            for _, block in keys.key_blocks():
                index.add(block)
                advance(len(block))
        details = {"kind": "faiss", "entries": keys.slots, "factory": factory, "stores_keys": stores_keys}
        details |= _tune(keys, index, stores_keys)
        faiss.write_index(index, str(target / "index.faiss"))
        return Part.describe(folder, name, details)
    except RuntimeError as error:
        _remove(target)
        raise IndexError_(
            f"FAISS cannot build {factory!r} over {keys.slots} keys of width {keys.width}: {_reason(error)}; name "
            "another factory, or 'auto'"
        ) from error
    except BaseException:
        _remove(target)
        raise


def _remove(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    if not any(target.parent.iterdir()):
        target.parent.rmdir()


def propose(
    index: Any,
    queries: npt.NDArray[np.float32],
    k: int,
    exclude: tuple[int, int],
    live: npt.NDArray[np.bool_] | None = None,
) -> Neighbors:
    """Ask for k entries outside a range: FAISS, or for many queries at once the batched search of its lists.

    Args:
        index: A FAISS index.
        queries: float32, shape (n, width).
        k: Entries a query.
        exclude: Range of entries [from, to).
        live: Whether an entry may be found, shape (entries of the index,); None allows all.
    """
    from ._lists import pays, search_lists  # compiles, so it is loaded only where there is something to search

    lists = faiss.downcast_index(index)
    if isinstance(lists, faiss.IndexIVF) and pays(lists, len(queries)):
        return search_lists(lists, queries, k, exclude, live)
    if exclude[0] >= exclude[1] and live is None:
        return _searched(index, queries, k)
    allowed = np.ones(index.ntotal, bool) if live is None else live.copy()
    allowed[exclude[0] : exclude[1]] = False
    if isinstance(lists, faiss.IndexIVF):
        parameters: Any = faiss.SearchParametersIVF
        bitmap: Any = faiss.IDSelectorBitmap
        selector = bitmap(np.packbits(allowed, bitorder="little"))
        try:
            found = _searched(index, queries, k, allowed, params=parameters(sel=selector, nprobe=lists.nprobe))
        except RuntimeError as error:
            raise IndexError_(
                f"this kind of index cannot leave out a document: {_reason(error)}; rebuild it {HOW}"
            ) from error
        return _sorted(found)
    return _widened(index, queries, k, allowed)


def _widened(index: Any, queries: npt.NDArray[np.float32], k: int, allowed: npt.NDArray[np.bool_]) -> Neighbors:
    """Ask an index that takes no selector for more and more, until enough of what is found is allowed."""
    result = Neighbors.empty(len(queries), k)
    wanted, fetch = np.arange(len(queries)), min(index.ntotal, 2 * k)
    while len(wanted):
        short = []
        step = max(1, _FETCHED_AT_ONCE // fetch)
        for start in range(0, len(wanted), step):
            rows = wanted[start : start + step]
            found = _searched(index, queries[rows], fetch, allowed)
            result.put(rows, found.taken(np.argsort(found.distances, axis=1, kind="stable")[:, :k]))
            short.append(rows[found.present.sum(axis=1) < k])
        wanted = np.concatenate(short) if fetch < index.ntotal else wanted[:0]
        fetch = min(index.ntotal, 4 * fetch)
    return result


def _searched(
    index: Any,
    queries: npt.NDArray[np.float32],
    k: int,
    allowed: npt.NDArray[np.bool_] | None = None,
    **settings: Any,
) -> Neighbors:
    """Let FAISS search, and take out what is not allowed: not every kind heeds its selector."""
    scores, rows = index.search(queries, k, **settings)
    if allowed is not None:
        rows = np.where((rows >= 0) & allowed[np.maximum(rows, 0)], rows, -1)
    return Neighbors.from_search(rows, as_distances(scores, index.metric_type))


def _sorted(found: Neighbors) -> Neighbors:
    """Put absent neighbors last."""
    return found.taken(np.argsort(found.distances, axis=1, kind="stable"))


def rerank(keys: Keys, queries: npt.NDArray[np.float32], found: Neighbors, k: int) -> Neighbors:
    """Replace an index's distances by those to the stored keys, in float32, and keep the k nearest."""
    exact = np.full(found.distances.shape, np.inf, np.float32)
    step = max(1, (1 << 24) // max(1, found.entries.shape[1] * keys.width))
    for start in range(0, len(queries), step):
        entries = found.entries[start : start + step]  # (n, fetched)
        stored = keys.gather_keys(entries.ravel()).reshape(*entries.shape, keys.width)
        asked = torch.from_numpy(queries[start : start + step, None])
        exact[start : start + step] = distances(asked, stored, keys.metric).numpy()
    exact[~found.present] = np.inf
    order = np.argsort(exact, axis=1, kind="stable")[:, :k]
    return found._replace(distances=exact).taken(order)


def empty_index(factory: str, width: int, metric: str) -> Any:
    """Make a FAISS index, not yet trained.

    Raises:
        IndexError_: FAISS does not know the factory string, or it does not go with this width or metric.
    """
    try:
        index = faiss.index_factory(width, factory, FAISS_METRICS[metric])
    except RuntimeError as error:
        raise IndexError_(
            f"FAISS does not take {factory!r} for keys of width {width}: {_reason(error)}; expected 'auto', 'exact' or "
            f"a factory string such as 'IVF1024,SQ8' of an index that can search by {metric}"
        ) from error
    if index.metric_type != FAISS_METRICS[metric]:
        raise IndexError_(f"FAISS has no {factory!r} that searches by {metric}; name another factory, or 'auto'")
    return index


def _reason(error: Exception) -> str:
    """Return what FAISS complains of, without the place in its source."""
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", str(error).strip().splitlines()[0])


def _train(keys: Keys, factory: str) -> tuple[Any, bool]:
    """Make an empty, trained index; tell whether it will hold the keys unchanged."""
    index = empty_index(factory, keys.width, keys.metric)
    ivf = faiss.try_extract_index_ivf(index)
    kind = faiss.downcast_index(index)  # what stands before it, such as a PCA, changes distances
    stores_keys = type(kind) in _STORES_KEYS
    if type(kind) is faiss.IndexIVFScalarQuantizer and kind.sq.qtype == _SAME_TYPES[keys.key_dtype]:
        kind.by_residual = False  # the codes are then the stored keys themselves
        stores_keys = True
    if index.is_trained:
        return index, stores_keys
    size = min(keys.slots, max(1 << 16, _TRAINING_KEYS_A_LIST * (ivf.nlist if ivf is not None else 256)))
    chosen = np.sort(np.random.default_rng(0).choice(keys.slots, size, replace=False))
    index.train(keys.gather_keys(chosen).numpy())
    if stores_keys and keys.grid is not None and type(kind) is faiss.IndexIVFScalarQuantizer:
        low, step = keys.grid  # code c of FAISS stands for low + (c + 1/2) / 255 · width
        faiss.copy_array_to_vector(torch.cat([low - step / 2, 255 * step]).numpy(), kind.sq.trained)
    return index, stores_keys


def _tune(keys: Keys, index: Any, stores_keys: bool) -> dict[str, Any]:
    """Find the smallest nprobe that reaches the recall wanted; return it with the recall measured."""
    k = min(1024, keys.slots)
    sample = np.random.default_rng(1).choice(keys.slots, min(_SAMPLE, keys.slots), replace=False)
    queries = keys.gather_keys(np.sort(sample)).numpy()
    truth = ExactIndex(keys).search(queries, k, (0, 0))
    ivf = faiss.try_extract_index_ivf(index)
    lists = ivf.nlist if ivf is not None else 1
    nprobe, measured = 1, 0.0
    steps = sorted({min(lists, round(4 * 2 ** (step / 4))) for step in range(80)})
    for nprobe in steps if ivf is not None else [1]:
        _set_nprobe(index, nprobe)
        found = propose(index, queries, k if stores_keys else min(_RERANK_FACTOR * k, keys.slots), (0, 0), keys.live)
        if not stores_keys:
            found = rerank(keys, queries, found, k)
        measured = recall(found, truth)
        if measured >= _TARGET_RECALL:
            break
    measurement = {"recall": round(measured, 4), "recall_k": k, "recall_queries": len(queries)}
    return {"nprobe": nprobe, "lists": lists, **measurement}


def recall(found: Neighbors, truth: Neighbors) -> float:
    """Return the share of the true neighbors that were found; both of shape (n, k)."""
    rows = zip(found.entries, found.present, truth.entries, truth.present, strict=True)
    hits = sum(len(np.intersect1d(mine[here], true[there])) for mine, here, true, there in rows)
    return float(hits / max(1, truth.present.sum()))


def _set_nprobe(index: Any, nprobe: int) -> None:
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = int(nprobe)

"""Search by a FAISS index, with distances of the stored keys.

An index proposes entries. Where it holds the keys as they are stored, its distances are final; otherwise twice as many
proposals as asked for are ranked again by exact distances, computed from the datastore's own keys.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

import faiss  # isort: skip

from ..errors import IndexError_
from ..neighbors import Neighbors
from ._exact import ExactIndex
from ._protocol import Keys

if TYPE_CHECKING:
    from ..datastore._manifest import Part

_TRAINING_KEYS_A_LIST = 48  # FAISS warns below 39
_TARGET_RECALL = 0.99
_SAMPLE = 256  # queries on which recall is measured
_RERANK_FACTOR = 2


class FaissIndex:
    """A FAISS index over a datastore, opened for searching."""

    def __init__(self, keys: Keys, folder: Path, part: Part) -> None:
        self.details = part.details
        self._keys = keys
        try:
            self._faiss = faiss.read_index(str(folder / part.name / "index.faiss"))
            if self._faiss.ntotal != len(keys) or self._faiss.d != keys.width:
                raise ValueError(f"it holds {self._faiss.ntotal} keys of width {self._faiss.d}")
            _set_nprobe(self._faiss, part.details["nprobe"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise IndexError_(f"the index {folder / part.name} does not fit its datastore: {error}; rebuild it") from error

    def search(self, queries: npt.NDArray[np.float32], k: int, exclude: tuple[int, int]) -> Neighbors:
        """See `Index.search`."""
        fetch = min(k if self.details["stores_keys"] else _RERANK_FACTOR * k, len(self._keys))
        found = propose(self._faiss, queries, fetch, exclude)
        return found if self.details["stores_keys"] else rerank(self._keys, queries, found, k)


def build_faiss(keys: Keys, folder: Path, factory: str, name: str) -> Part:
    """Train, fill, tune and measure a FAISS index; on any error nothing of it is left.

    `nprobe` is raised until recall@k, measured against exact search with stored keys as queries, reaches 0.99; what was
    reached goes into the manifest.
    """
    from ..datastore._manifest import Part

    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        index, stores_keys = _train(keys, factory)
        for _, block in keys.key_blocks():
            index.add(block)
        details = {"kind": "faiss", "factory": factory, "stores_keys": stores_keys, **_tune(keys, index, stores_keys)}
        faiss.write_index(index, str(target / "index.faiss"))
        return Part.describe(folder, name, details)
    except RuntimeError as error:
        shutil.rmtree(target, ignore_errors=True)
        reason = str(error).splitlines()[0].split("Error: ")[-1]
        raise IndexError_(f"FAISS cannot build {factory!r} over {len(keys)} keys of width {keys.width}: {reason}") from error
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def propose(index: Any, queries: npt.NDArray[np.float32], k: int, exclude: tuple[int, int]) -> Neighbors:
    """Ask FAISS for k entries outside a range."""
    if exclude[0] >= exclude[1]:
        distances, rows = index.search(queries, k)
        return Neighbors.from_search(rows, distances)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None and isinstance(faiss.downcast_index(index), faiss.IndexIVF):
        allowed = faiss.IDSelectorNot(faiss.IDSelectorRange(exclude[0], exclude[1]))
        distances, rows = index.search(queries, k, params=faiss.SearchParametersIVF(sel=allowed, nprobe=ivf.nprobe))
        return Neighbors.from_search(rows, distances)
    # Other kinds take no selector: ask for so many that enough remain when the range is dropped by number.
    distances, rows = index.search(queries, min(index.ntotal, k + exclude[1] - exclude[0]))
    rows = np.where((rows >= exclude[0]) & (rows < exclude[1]), -1, rows)
    found = Neighbors.from_search(rows, distances)
    order = np.argsort(found.distances, axis=1, kind="stable")[:, :k]
    return Neighbors(*(np.take_along_axis(part, order, axis=1) for part in found))


def rerank(keys: Keys, queries: npt.NDArray[np.float32], found: Neighbors, k: int) -> Neighbors:
    """Replace an index's distances by those to the stored keys, in float32, and keep the k nearest."""
    exact = np.full(found.distances.shape, np.inf, np.float32)
    step = max(1, (1 << 24) // max(1, found.entries.shape[1] * keys.width))
    for start in range(0, len(queries), step):
        entries = found.entries[start : start + step]  # (n, fetched)
        stored = keys.gather_keys(entries.ravel()).float().reshape(*entries.shape, keys.width)
        differences = stored.sub_(torch.from_numpy(queries[start : start + step, None]))
        exact[start : start + step] = differences.square_().sum(dim=-1).numpy()
    exact[~found.present] = np.inf
    order = np.argsort(exact, axis=1, kind="stable")[:, :k]
    ranked = Neighbors(found.entries, exact, found.present)
    return Neighbors(*(np.take_along_axis(part, order, axis=1) for part in ranked))


def _train(keys: Keys, factory: str) -> tuple[Any, bool]:
    """Make an empty, trained index; tell whether it will hold the keys unchanged."""
    index = faiss.index_factory(keys.width, factory)
    ivf = faiss.try_extract_index_ivf(index)
    stores_keys = "Flat" in factory.split(",") and "," not in factory.replace("IVF", "").split("Flat")[-1]
    wanted = "SQbf16" if keys.key_dtype == "bfloat16" else "SQfp16"
    inner = faiss.downcast_index(ivf) if ivf is not None else None
    if isinstance(inner, faiss.IndexIVFScalarQuantizer) and factory.endswith(wanted):
        inner.by_residual = False  # the codes are then the stored keys themselves
        stores_keys = len(factory.split(",")) == 2
    if index.is_trained:
        return index, stores_keys
    size = min(len(keys), max(1 << 16, _TRAINING_KEYS_A_LIST * (ivf.nlist if ivf is not None else 256)))
    chosen = np.sort(np.random.default_rng(0).choice(len(keys), size, replace=False))
    index.train(keys.gather_keys(chosen).float().numpy())
    return index, stores_keys


def _tune(keys: Keys, index: Any, stores_keys: bool) -> dict[str, Any]:
    """Find the smallest nprobe that reaches the recall wanted; return it with the recall measured."""
    k = min(1024, len(keys))
    sample = np.random.default_rng(1).choice(len(keys), min(_SAMPLE, len(keys)), replace=False)
    queries = keys.gather_keys(np.sort(sample)).float().numpy()
    truth = ExactIndex(keys).search(queries, k, (0, 0))
    ivf = faiss.try_extract_index_ivf(index)
    lists = ivf.nlist if ivf is not None else 1
    nprobe, measured = 1, 0.0
    steps = sorted({min(lists, round(4 * 2 ** (step / 2))) for step in range(40)})
    for nprobe in steps if ivf is not None else [1]:
        _set_nprobe(index, nprobe)
        found = propose(index, queries, k if stores_keys else min(_RERANK_FACTOR * k, len(keys)), (0, 0))
        if not stores_keys:
            found = rerank(keys, queries, found, k)
        measured = recall(found, truth)
        if measured >= _TARGET_RECALL:
            break
    return {"nprobe": nprobe, "lists": lists, "recall": round(measured, 4), "recall_k": k, "recall_queries": len(queries)}


def recall(found: Neighbors, truth: Neighbors) -> float:
    """Return the share of the true neighbors that were found; both of shape (n, k)."""
    hits = [len(np.intersect1d(a[m], b[p])) for a, m, b, p in zip(found.entries, found.present, truth.entries, truth.present, strict=True)]  # fmt: skip
    return float(sum(hits) / max(1, truth.present.sum()))


def _set_nprobe(index: Any, nprobe: int) -> None:
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = int(nprobe)

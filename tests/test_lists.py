"""The batched search of inverted lists against brute force and against FAISS."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm  # noqa: F401

import torch  # isort: skip

import faiss  # isort: skip

from memlm.index import _lists

WIDTH = 16


def clustered(n: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(20, WIDTH)) * 3 * scale
    return (centers[generator.integers(20, size=n)] + generator.normal(size=(n, WIDTH)) * scale).astype(np.float32)


def index_of(keys: np.ndarray, factory: str = "IVF32,SQfp16", nprobe: int = 32) -> faiss.Index:
    index = faiss.index_factory(WIDTH, factory)
    if isinstance(index, faiss.IndexIVFScalarQuantizer):
        index.by_residual = False
    index.train(keys)
    index.add(keys)
    index.nprobe = nprobe
    return index


def brute_force(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return ((keys[None].astype(np.float64) - queries[:, None]) ** 2).sum(axis=2)  # (n, entries)


@pytest.mark.parametrize("k", [1, 7, 64, 500])
@pytest.mark.parametrize("factory", ["IVF32,SQfp16", "IVF32,SQbf16", "IVF32,Flat"])
def test_all_lists_give_the_true_neighbors(factory, k):
    stored = {"IVF32,SQfp16": torch.float16, "IVF32,SQbf16": torch.bfloat16, "IVF32,Flat": torch.float32}[factory]
    keys = torch.from_numpy(clustered(3000)).to(stored).float().numpy()
    queries = clustered(200, seed=1)
    found = _lists.search_lists(index_of(keys, factory), queries, k, (0, 0))
    distances = brute_force(keys, queries)
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :k], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(distances, found.entries, axis=1), found.distances, rtol=1e-5, atol=1e-5
    )
    assert found.present.all()
    assert all(len(set(row)) == k for row in found.entries)


def test_some_lists_give_what_faiss_gives():
    keys = clustered(3000).astype(np.float16).astype(np.float32)
    queries = clustered(200, seed=1)
    index = index_of(keys, nprobe=3)
    distances, entries = index.search(queries, 40)
    found = _lists.search_lists(index, queries, 40, (0, 0))
    np.testing.assert_allclose(found.distances, distances, rtol=1e-4)
    assert np.mean([len(np.intersect1d(a, b)) for a, b in zip(found.entries, entries, strict=True)]) > 39.9


def test_large_norms_cancel_nothing():
    keys = clustered(3000) + 1000  # ‖k‖² is 16 million, distances are about 10
    queries = clustered(100, seed=1) + 1000
    found = _lists.search_lists(index_of(keys, "IVF32,Flat"), queries, 5, (0, 0))
    np.testing.assert_allclose(
        found.distances, np.sort(brute_force(keys, queries), axis=1)[:, :5], rtol=1e-4, atol=1e-3
    )


def test_excluded_entries_are_not_found():
    keys = clustered(3000).astype(np.float16).astype(np.float32)
    queries = keys[1000:1200]
    index = index_of(keys)
    found = _lists.search_lists(index, queries, 50, (900, 1300))
    assert not ((found.entries >= 900) & (found.entries < 1300) & found.present).any()
    assert found.present.all()
    with_own = _lists.search_lists(index, queries, 50, (0, 0))
    assert (with_own.entries[:, 0] == np.arange(1000, 1200)).mean() > 0.95  # so the exclusion above did something


def test_places_that_no_entry_fills_are_absent():
    keys = clustered(300).astype(np.float16).astype(np.float32)
    found = _lists.search_lists(index_of(keys, nprobe=1), clustered(100, seed=1), 250, (0, 0))
    assert 0 < found.present.sum() < found.present.size
    assert np.isinf(found.distances[~found.present]).all()
    assert (found.entries[~found.present] == 0).all()
    assert (np.diff(found.present.astype(int), axis=1) <= 0).all()  # absent ones are last


def test_equal_keys_are_each_found_once():
    keys = np.repeat(clustered(40), 100, axis=0)  # every key a hundred times: no limit can tell them apart
    found = _lists.search_lists(index_of(keys, "IVF4,Flat", nprobe=4), keys[::40], 130, (0, 0))
    expected = np.sort(brute_force(keys, keys[::40]), axis=1)[:, :130]
    np.testing.assert_allclose(found.distances, expected, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == 130 for row in found.entries)


def test_groups_and_threads_change_nothing(monkeypatch):
    keys, queries = clustered(2000).astype(np.float16).astype(np.float32), clustered(700, seed=1)
    index = index_of(keys)
    whole = _lists.search_lists(index, queries, 20, (0, 0))
    threads = torch.get_num_threads()
    monkeypatch.setattr(_lists, "_GROUP", 64)
    parts = _lists.search_lists(index, queries, 20, (0, 0))
    assert torch.get_num_threads() == threads
    np.testing.assert_allclose(whole.distances, parts.distances, rtol=1e-5, atol=1e-5)


def test_it_is_used_for_many_queries_of_lists_that_hold_keys_alone():
    keys = clustered(3000)
    assert _lists.pays(index_of(keys, "IVF32,SQfp16", nprobe=8), 100)
    assert not _lists.pays(index_of(keys, "IVF32,SQfp16", nprobe=8), 3)
    assert not _lists.pays(index_of(keys, "IVF32,SQ8", nprobe=8), 100)
    residual = index_of(keys, "IVF32,SQfp16", nprobe=8)
    residual.by_residual = True
    assert not _lists.pays(residual, 100)


def test_an_index_read_from_disk_is_searched_here(monkeypatch, tmp_path):
    from memlm.index._faiss import propose

    faiss.write_index(index_of(clustered(3000), nprobe=8), str(tmp_path / "index.faiss"))
    index = faiss.read_index(str(tmp_path / "index.faiss"))
    index.nprobe = 8
    called = []
    monkeypatch.setattr(_lists, "search_lists", lambda *arguments: called.append(arguments))
    propose(index, clustered(100), 5, (0, 0))
    assert called
    assert propose(index, clustered(2), 5, (0, 0)).present.all()  # too few: FAISS itself
    assert len(called) == 1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(0, 20), st.integers(1, 8), st.integers(0, 10**6))
def test_a_reservoir_keeps_the_nearest(k, slack, levels, seed):
    generator = np.random.default_rng(seed)
    count = 2 * k + 8 + int(generator.integers(20))
    distances = generator.integers(levels, size=count).astype(np.float32) * np.float32(generator.random())
    before, entries = distances.copy(), np.arange(count)
    kept, limit = _lists._cut(distances, entries, count, k, slack)
    assert k <= kept <= k + slack
    assert (before[entries[:kept]] == distances[:kept]).all()
    assert len(set(entries[:kept])) == kept
    assert (np.sort(distances[:kept])[:k] == np.sort(before)[:k]).all()
    assert limit > np.sort(before)[k - 1]  # nothing as near as the k-th is refused later

"""The batched search of inverted lists against brute force and against FAISS."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor

import numba
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


@pytest.mark.parametrize("factory", ["IVF32,SQfp16", "IVF32,Flat"])
def test_a_distance_to_itself_is_never_negative(factory):
    keys = clustered(3000).astype(np.float16).astype(np.float32)
    found = _lists.search_lists(index_of(keys, factory), keys, 30, (0, 0))
    assert (found.distances >= 0).all()
    assert (np.diff(found.distances, axis=1) >= 0).all()
    assert (found.entries[:, 0] == np.arange(3000)).mean() > 0.99
    np.testing.assert_allclose(found.distances[:, 0], 0, atol=1e-4)


def test_a_key_far_away_hides_no_others():
    keys, queries = clustered(3000), clustered(200, seed=1)
    index = index_of(keys, "IVF8,Flat", nprobe=8)
    keys[:100] *= 1e9  # first in lists of others, so that the first reservoirs hold some
    index.reset()
    index.add(keys)
    distances, _ = index.search(queries, 16)
    found = _lists.search_lists(index, queries, 16, (0, 0))
    np.testing.assert_allclose(found.distances, distances, rtol=1e-4)


@pytest.mark.parametrize("factory", ["IVF32,FlatPanorama4", "IVF32,FlatDedup"])
def test_lists_of_another_layout_are_left_to_faiss(factory):
    from memlm.index._faiss import propose

    keys, queries = clustered(3000), clustered(200, seed=1)
    index = index_of(keys, factory)
    assert not _lists.pays(faiss.downcast_index(index), 10**6)
    expected = np.sort(brute_force(keys, queries), axis=1)[:, :20]
    np.testing.assert_allclose(propose(index, queries, 20, (0, 0)).distances, expected, rtol=1e-4, atol=1e-4)


def test_a_coarse_quantizer_may_not_know_its_centroids():
    keys, queries = clustered(3000) + 1000, clustered(200, seed=1) + 1000
    index = index_of(keys, "IVF32(IVF4,Flat),Flat", nprobe=8)
    with pytest.raises(RuntimeError, match="direct map"):
        index.quantizer.reconstruct(0)
    distances, _ = index.search(queries, 5)
    found = _lists.search_lists(index, queries, 5, (0, 0))
    np.testing.assert_allclose(found.distances, distances, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("factory", ["IVF32,SQfp16", "IVF32,Flat"])
def test_a_long_list_is_searched_in_pieces(monkeypatch, factory):
    keys, queries = clustered(3000).astype(np.float16).astype(np.float32), clustered(200, seed=1)
    keys[:2000] = (keys[0] + clustered(2000, scale=0.01)).astype(np.float16)
    index, own = index_of(keys, factory), (500, 1500)
    whole = _lists.search_lists(index, queries, 30, own)
    offer, computed = _lists._offer, []

    def counted(tile, *arguments):
        computed.append(tile.size + tile.shape[1] * WIDTH)
        offer(tile, *arguments)

    monkeypatch.setattr(_lists, "_offer", counted)
    monkeypatch.setattr(_lists, "_TILE", 5000)
    parts = _lists.search_lists(index, queries, 30, own)
    assert 4000 < max(computed) <= 5000
    np.testing.assert_allclose(parts.distances, whole.distances, rtol=1e-4, atol=1e-4)
    assert not ((parts.entries >= own[0]) & (parts.entries < own[1]) & parts.present).any()


@pytest.fixture
def three_threads():
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


def in_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.mark.parametrize(("queries", "sizes"), [(0, []), (20, [16, 4]), (90, [30] * 3), (200, [64] * 3 + [8])])
def test_queries_are_searched_in_groups(monkeypatch, three_threads, queries, sizes):
    keys, queries = clustered(2000).astype(np.float16).astype(np.float32), clustered(queries, seed=1)
    index = index_of(keys)
    whole = _lists.search_lists(index, queries, 20, (0, 0))
    search, groups = _lists._search_group, []

    def watched(ivf, group, *arguments):
        groups.append(len(group))
        return search(ivf, group, *arguments)

    monkeypatch.setattr(_lists, "_GROUP", 64)
    monkeypatch.setattr(_lists, "_search_group", watched)
    parts = _lists.search_lists(index, queries, 20, (0, 0))
    assert sorted(groups) == sorted(sizes)
    np.testing.assert_allclose(whole.distances, parts.distances, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_other_threads_keep_their_number_of_threads(monkeypatch, three_threads, fails):
    search, seen = _lists._search_group, []

    def watched(*arguments):
        found = search(*arguments)
        torch.get_num_threads()  # as any larger operation of torch would, this may bring its number into the thread
        seen.append((faiss.omp_get_max_threads(), in_new_thread(torch.get_num_threads)))
        if fails:
            raise MemoryError
        return found

    monkeypatch.setattr(_lists, "_GROUP", 64)
    monkeypatch.setattr(_lists, "_search_group", watched)
    index, faiss_threads = index_of(clustered(2000)), faiss.omp_get_max_threads()
    if fails:
        with pytest.raises(MemoryError):
            _lists.search_lists(index, clustered(200, seed=1), 20, (0, 0))
    else:
        _lists.search_lists(index, clustered(200, seed=1), 20, (0, 0))
    assert set(seen) == {(1, 3)}  # a thread that searches, a thread begun meanwhile
    assert torch.get_num_threads() == in_new_thread(torch.get_num_threads) == 3
    assert faiss.omp_get_max_threads() == faiss_threads


def test_several_threads_may_search_at_once(monkeypatch, three_threads):
    monkeypatch.setattr(_lists, "_GROUP", 64)
    index, queries = index_of(clustered(3000)), [clustered(300, seed=seed) for seed in range(8)]

    def search(own):
        return _lists.search_lists(index, own, 20, (0, 0)), torch.get_num_threads()

    expected = [search(own)[0] for own in queries]
    with ThreadPoolExecutor(4) as pool:
        for (found, threads), alone in zip(pool.map(search, queries), expected, strict=True):
            np.testing.assert_allclose(found.distances, alone.distances, rtol=1e-5, atol=1e-5)
            assert threads == 3
    assert torch.get_num_threads() == in_new_thread(torch.get_num_threads) == 3


def double(number):
    return 2 * number


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_what_numba_kept_may_be_damaged(monkeypatch, tmp_path, suffix, content):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert _lists._compiled(double)(2) == 4
    (file,) = tmp_path.rglob(f"*.{suffix}")
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2] if content is None else content)
    again = _lists._compiled(double)
    assert [again(3), again(4), again(0.5)] == [6, 8, 1]


def test_what_numba_compiles_may_find_the_disk_full(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    function = _lists._compiled(double)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        assert [function(2), function(3)] == [4, 6]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_search_does_without_what_numba_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    keys = clustered(300)
    index = index_of(keys, "IVF4,Flat", nprobe=4)
    for _ in range(2):
        monkeypatch.setattr(_lists, "_offer", _lists._compiled(_lists._offer.__wrapped__))
        monkeypatch.setattr(_lists, "_cut_all", _lists._compiled(_lists._cut_all.__wrapped__))
        assert (_lists.search_lists(index, keys, 3, (0, 0)).entries[:, 0] == np.arange(300)).all()
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert len(files) == 4  # an index and the code of both
        for file in files:
            file.write_bytes(b"")


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(0, 20), st.integers(1, 8), st.integers(0, 38), st.integers(0, 10**6))
def test_a_reservoir_keeps_the_nearest(k, slack, levels, magnitudes, seed):
    generator = np.random.default_rng(seed)
    count = 2 * k + 8 + int(generator.integers(20))
    distances = generator.integers(levels, size=count).astype(np.float32) * np.float32(generator.random())
    distances *= np.float32(10) ** generator.integers(-magnitudes, magnitudes + 1, size=count).astype(np.float32)
    distances = np.minimum(distances, np.finfo(np.float32).max)
    before, entries = distances.copy(), np.arange(count)
    kept, limit = _lists._cut(distances, entries, count, k, slack)
    assert k <= kept <= k + slack
    assert (before[entries[:kept]] == distances[:kept]).all()
    assert len(set(entries[:kept])) == kept
    assert (np.sort(distances[:kept])[:k] == np.sort(before)[:k]).all()
    assert limit > np.sort(before)[k - 1]  # nothing as near as the k-th is refused later

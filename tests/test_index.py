"""Search: exact against brute force, FAISS against exact, own documents left out, absent neighbors."""

import shutil

import numpy as np
import pytest

from fake_encoder import FakeEncoder, random_documents
from memlm import Datastore, KnnMixture
from memlm.errors import ConfigError, IndexError_, ShapeError
from memlm.evidence import Evidence
from memlm.index import _exact, _faiss

DOCUMENTS = random_documents(12, 130)
FACTORIES = [
    "exact",
    "Flat",
    "SQfp16",
    "IVF8,Flat",
    "IVF8,SQfp16",
    "IVF8,SQ8",
    "IVF8,FlatPanorama2",
    "IVF8,FlatDedup",
    "IVF8(IVF2,Flat),Flat",
    "HNSW16_FlatPanorama2",
    "HNSW16",
    "PCA4,Flat",
    "PCA4,IVF8,SQ8",
    "OPQ4,IVF8,PQ4x4",
    "IVF8,PQ4x4fs",
    "IVF8,RaBitQ",
    "IVF8,RaBitQfs",
    "IVF8,PQ4x4,RFlat",
]
# Kinds whose own distances are those of the stored keys; all others must be ranked again
KEEPS_KEYS = {"Flat", "IVF8,Flat", "IVF8,SQfp16", "IVF8(IVF2,Flat),Flat", "HNSW16"}

# At 8 numbers a key these say little of where a key is
LOSSY = {
    "PCA4,Flat",
    "PCA4,IVF8,SQ8",
    "OPQ4,IVF8,PQ4x4",
    "IVF8,PQ4x4fs",
    "IVF8,RaBitQ",
    "IVF8,RaBitQfs",
    "IVF8,PQ4x4,RFlat",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "memory"
    return Datastore.build(FakeEncoder(), DOCUMENTS, path, index="exact", segment_entries=500, show_progress=False)


@pytest.fixture(scope="module")
def indexed(base, tmp_path_factory):
    """Return a function that opens a copy of the datastore with some index."""
    made = {}

    def make(factory):
        if factory not in made:
            path = shutil.copytree(base.path, tmp_path_factory.mktemp("indexed") / "memory")
            Datastore(path).build_index(factory)
            made[factory] = Datastore(path)
        return made[factory]

    return make


@pytest.fixture(scope="module")
def keys(base):
    return base.keys.gather_keys(np.arange(len(base))).double().numpy()


@pytest.fixture(scope="module")
def queries(keys):
    chosen = np.random.default_rng(0).integers(0, len(keys), 60)
    return (keys[chosen] + np.random.default_rng(1).normal(size=(60, 8)) * 0.1).astype(np.float32)


def brute_force(queries, keys):
    return np.square(queries[:, None].astype(np.float64) - keys[None]).sum(axis=2)


def test_exact_search_is_brute_force(base, keys, queries):
    distances = brute_force(queries, keys)
    for k in (1, 7, len(base)):
        found = base.search(queries, k)
        assert found.present.all()
        np.testing.assert_allclose(found.distances, np.sort(distances)[:, :k], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            found.distances, np.take_along_axis(distances, found.entries, 1), rtol=1e-4, atol=1e-4
        )
        assert all(len(set(row)) == k for row in found.entries.tolist())


def test_keys_that_do_not_stay_in_memory_are_searched_block_by_block(base, queries, monkeypatch):
    expected = base.search(queries, 20, np.tile([100, 700], (60, 1)))
    monkeypatch.setattr(_exact, "_RESIDENT", 0)
    found = Datastore(base.path).search(queries, 20, np.tile([100, 700], (60, 1)))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("factory", FACTORIES)
def test_distances_are_those_of_the_stored_keys(indexed, base, keys, queries, factory):
    memory = indexed(factory)
    found, exact = memory.search(queries, 12), base.search(queries, 12)
    true = np.take_along_axis(brute_force(queries, keys), found.entries, axis=1)
    np.testing.assert_allclose(found.distances[found.present], true[found.present], rtol=1e-5, atol=1e-5)
    assert (np.diff(found.distances, axis=1) >= 0).all()
    recall = _faiss.recall(found, exact)
    assert recall > (0.25 if factory in LOSSY else 0.85)
    if factory != "exact":
        assert memory.index.details["stores_keys"] == (factory in KEEPS_KEYS)
        assert memory.index.details["factory"] == factory


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_own_document_is_left_out_by_number(indexed, base, keys, queries, factory):
    memory = indexed(factory)
    ranges = np.array([memory.document_range(DOCUMENTS[number % 12].text) for number in range(60)])
    assert (ranges[:, 1] - ranges[:, 0] == 131).all()
    ranges[::7] = 0  # some queries leave nothing out
    found, exact = memory.search(queries, 12, ranges), base.search(queries, 12, ranges)
    first, stop = ranges[:, :1], ranges[:, 1:]
    assert not (found.present & (found.entries >= first) & (found.entries < stop)).any()
    distances = brute_force(queries, keys)
    columns = np.arange(len(keys))
    distances[(columns >= first) & (columns < stop)] = np.inf
    np.testing.assert_allclose(exact.distances, np.sort(distances)[:, :12], rtol=1e-4, atol=1e-4)
    assert _faiss.recall(found, exact) > (0.25 if factory in LOSSY else 0.85)
    if factory in {"exact", "Flat", "HNSW16", "PCA4,Flat"}:
        assert found.present.all()  # those left out were replaced by others


def test_leaving_out_does_not_depend_on_how_many_are_asked_at_once(indexed, queries, monkeypatch):
    memory = indexed("HNSW16")
    ranges = np.tile([131, 262], (60, 1))
    expected = memory.search(queries, 5, ranges)
    monkeypatch.setattr(_faiss, "_FETCHED_AT_ONCE", 1000)
    for mine, theirs in zip(memory.search(queries, 5, ranges), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def all_absent_last(found):
    assert (found.entries[~found.present] == 0).all()
    assert np.isinf(found.distances[~found.present]).all()
    assert not (np.diff(found.present.astype(int), axis=1) > 0).any()


def test_neighbors_that_were_not_found_are_absent(indexed, queries):
    for factory in ("IVF8,Flat", "IVF8,SQ8"):
        memory = Datastore(indexed(factory).path)
        memory.index._faiss.nprobe = 1  # one list of eight cannot hold everything
        found = memory.search(queries, len(memory))
        assert found.present.any(axis=1).all()
        assert not found.present.all(axis=1).any()
        all_absent_last(found)
        looked_up = memory.lookup(queries, len(memory))
        assert looked_up.tokens.min() >= 0
        mixture = KnnMixture(interpolation_weight=0.9, temperature=1.0, k=len(memory))
        lm = looked_up.distances.new_zeros(60, 200).log_softmax(dim=-1)
        probabilities = mixture.log_probs(lm, Evidence((looked_up,))).exp()
        assert probabilities.sum(dim=1).numpy() == pytest.approx(np.ones(60), abs=1e-5)


@pytest.mark.parametrize("factory", ["IVF8,SQfp16", "IVF8(IVF2,Flat),Flat"])
def test_fewer_lists_can_be_visited(indexed, queries, factory):
    memory = Datastore(indexed(factory).path)
    asked, before = queries[:5], dict(memory.index.details)
    found = {}
    for lists in (8, 1):
        memory.index.visit(lists)
        found[lists] = memory.search(asked, 60)
        details = memory.index.details
        assert details["nprobe"] == lists
        assert not {"recall", "recall_k", "recall_queries"} & set(details)
    assert (found[1].distances >= found[8].distances).all()
    assert (found[1].distances > found[8].distances).any()
    assert Datastore(memory.path).index.details == before, "nothing is written"
    for wrong in (0, 9, -1):
        with pytest.raises(IndexError_, match=f"{wrong} lists to visit, but this index has 8"):
            memory.index.visit(wrong)


def test_an_index_without_lists_visits_none(indexed):
    with pytest.raises(IndexError_, match="this index has 0"):
        Datastore(indexed("HNSW16").path).index.visit(1)


@pytest.mark.parametrize("factory", ["exact", "IVF8,Flat", "IVF8,SQ8", "HNSW16", "PCA4,Flat"])
def test_where_everything_is_left_out_nothing_is_found(indexed, queries, factory):
    memory = indexed(factory)
    found = memory.search(queries, 5, np.tile([0, len(memory)], (60, 1)))
    assert not found.present.any()
    assert found.entries.shape == (60, 5)
    all_absent_last(found)


@pytest.mark.parametrize("k", [0, -1, 10**6])
def test_k_must_fit_the_datastore(base, queries, k):
    with pytest.raises(ConfigError, match=f"k is {k}; expected 1 to {len(base)}, the number of entries in "):
        base.search(queries, k)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda queries: queries[:, :7], r"queries have shape \(60, 7\); expected \(n, 8\)"),
        (lambda queries: queries[0], r"queries have shape \(8,\); expected \(n, 8\)"),
        (lambda queries: np.where(queries > 1, np.nan, queries), "queries hold NaN or infinite numbers"),
        (lambda queries: np.where(queries > 1, np.inf, queries), "queries hold NaN or infinite numbers"),
    ],
)
def test_queries_must_be_finite_keys(base, queries, make, message):
    with pytest.raises(ShapeError, match=message):
        base.search(make(queries), 5)


def test_no_queries_find_nothing(base):
    assert base.search(np.zeros((0, 8), np.float32), 5).entries.shape == (0, 5)

"""Datastores searched by inner product: against NumPy, in exact search, in FAISS, by pointers, and on disk."""

import json
import math
import shutil

import faiss
import numpy as np
import pytest

from fake_encoder import FakeEncoder, random_documents
from memlm import Datastore
from memlm.datastore import Pointers
from memlm.datastore._pointers import follow
from memlm.errors import ConfigError, DatastoreCorrupt, IndexError_
from memlm.index import FaissIndex, _exact, _faiss, _lists
from memlm.index._faiss import propose

DOCUMENTS = random_documents(12, 130)
FACTORIES = ["exact", "Flat", "SQfp16", "IVF8,Flat", "IVF8,SQfp16", "IVF8,SQ8", "HNSW16", "PCA4,Flat", "IVF8,RaBitQ"]
KEEPS_KEYS = {"Flat", "IVF8,Flat", "IVF8,SQfp16", "HNSW16"}
LOSSY = {"PCA4,Flat", "IVF8,RaBitQ"}
K = 12


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """A datastore by inner product; its index is replaced by tests."""
    path = tmp_path_factory.mktemp("products") / "memory"
    settings = {"index": "exact", "metric": "inner_product", "segment_entries": 500, "show_progress": False}
    return Datastore.build(FakeEncoder(), DOCUMENTS, path, **settings)


@pytest.fixture(scope="module")
def keys(memory):
    return memory.keys.gather_keys(np.arange(len(memory))).double().numpy()


@pytest.fixture(scope="module")
def queries(keys):
    return (keys[::30] + np.random.default_rng(1).normal(size=keys[::30].shape) * 0.1).astype(np.float32)


@pytest.fixture(scope="module", params=FACTORIES)
def indexed(request, memory):
    memory.build_index(request.param)
    opened = Datastore(memory.path)
    assert opened.metric == "inner_product"
    return request.param, opened


def test_the_nearest_have_the_largest_products(indexed, keys, queries):
    factory, memory = indexed
    found, products = memory.search(queries, K), queries.astype(np.float64) @ keys.T
    true = np.take_along_axis(products, found.entries, axis=1)
    np.testing.assert_allclose(-found.distances[found.present], true[found.present], rtol=1e-5, atol=1e-5)
    assert (np.diff(found.distances, axis=1) >= 0).all()
    expected = np.argsort(-products, axis=1)[:, :K]
    recall = np.mean([len(set(mine) & set(theirs)) / K for mine, theirs in zip(found.entries, expected, strict=True)])
    assert recall > (0.4 if factory in LOSSY else 0.95)
    if factory in {"exact", "Flat"}:
        np.testing.assert_allclose(-found.distances, -np.sort(-products, axis=1)[:, :K], rtol=1e-5, atol=1e-5)
    if factory != "exact":
        details = memory.index.details
        assert details["stores_keys"] == (factory in KEEPS_KEYS)
        k = details["recall_k"]
        sample = keys[np.sort(np.random.default_rng(1).choice(len(keys), 256, replace=False))].astype(np.float32)
        truth = np.argsort(-(sample.astype(np.float64) @ keys.T), axis=1)[:, :k]
        again = memory.search(sample, k)
        hits = [len(np.intersect1d(a[b], c)) for a, b, c in zip(again.entries, again.present, truth, strict=True)]
        assert details["recall"] == pytest.approx(sum(hits) / truth.size, abs=2e-3), "the recall in the manifest"


def test_an_own_document_is_left_out(indexed, keys, queries):
    factory, memory = indexed
    ranges = np.array([memory.document_range(DOCUMENTS[number % 12].text) for number in range(len(queries))])
    found = memory.search(queries, K, ranges)
    first, stop = ranges[:, :1], ranges[:, 1:]
    assert not (found.present & (found.entries >= first) & (found.entries < stop)).any()
    products = queries.astype(np.float64) @ keys.T
    columns = np.arange(len(keys))
    products[(columns >= first) & (columns < stop)] = -np.inf
    expected = np.argsort(-products, axis=1)[:, :K]
    recall = np.mean([len(set(mine) & set(theirs)) / K for mine, theirs in zip(found.entries, expected, strict=True)])
    assert recall > (0.4 if factory in LOSSY else 0.9)


def test_keys_that_do_not_stay_in_memory_are_searched_block_by_block(memory, queries, monkeypatch):
    memory.build_index("exact")
    expected = memory.search(queries, K)
    monkeypatch.setattr(_exact, "_RESIDENT", 0)
    found = Datastore(memory.path).search(queries, K)
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-6)
    assert all(len(set(row)) == K for row in found.entries.tolist())


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,SQfp16"])
def test_many_queries_at_once_are_left_to_faiss(memory, keys, factory):
    memory.build_index(factory)
    index = faiss.downcast_index(memory.index._faiss)
    assert not _lists.pays(index, 10**6)
    many = keys.astype(np.float32)
    found = propose(index, many, K, (0, 0))
    true = np.take_along_axis(many.astype(np.float64) @ keys.T, found.entries, axis=1)
    np.testing.assert_allclose(-found.distances, true, rtol=1e-4, atol=1e-4)


def test_an_index_of_another_metric_is_refused(memory, tmp_path):
    settings = {"index": "IVF8,Flat", "segment_entries": 500, "show_progress": False}
    by_distance = Datastore.build(FakeEncoder(), DOCUMENTS, tmp_path / "distances", **settings)
    with pytest.raises(IndexError_, match="does not search by inner_product; rebuild it"):
        FaissIndex(memory.keys, by_distance.path / "index", by_distance.manifest.index)


def test_a_factory_that_knows_no_inner_product_stops_the_build(tmp_path):
    encoder = FakeEncoder(change=lambda *_: pytest.fail("keys were computed"))
    with pytest.raises(IndexError_, match="an index that can search by inner_product"):
        Datastore.build(encoder, DOCUMENTS, tmp_path / "m", index="LSH", metric="inner_product", show_progress=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("metric", ["cosine", "", "inner-product", None])
def test_a_metric_that_is_not_known_is_refused(tmp_path, metric):
    with pytest.raises(ConfigError, match="expected squared_l2 or inner_product"):
        Datastore.build(FakeEncoder(), DOCUMENTS, tmp_path / "m", metric=metric, show_progress=False)
    assert not (tmp_path / "m").exists()


def test_the_metric_is_in_the_manifest_and_under_its_checksum(memory, tmp_path):
    newest = max(memory.path.glob("manifest-*.json"))
    content = json.loads(newest.read_text())
    assert content["metric"] == memory.info()["metric"] == "inner_product"
    (tmp_path / newest.name).write_text(json.dumps({**content, "metric": "squared_l2"}) + "\n")
    shutil.copy(memory.path / "current.json", tmp_path)
    with pytest.raises(DatastoreCorrupt, match="checksum"):
        Datastore(tmp_path)
    plain = Datastore.build(FakeEncoder(), DOCUMENTS, tmp_path / "plain", show_progress=False)
    assert plain.metric == "squared_l2"


def test_pointers_measure_by_the_same_metric(memory, keys):
    """Whatever the pointers add to an exact search changes nothing; without a search they are measured alike."""
    memory.build_index("exact")
    first, stop = memory.document_range(DOCUMENTS[3].text)
    asked, targets = keys[first:stop].astype(np.float32), memory.values[first:stop].astype(np.int64)
    searched = memory.lookup(asked, K)
    pointed = Pointers(memory, math.inf).lookup(asked, targets, np.zeros(len(asked), np.int64), K)
    np.testing.assert_allclose(pointed.found.distances, searched.distances, rtol=1e-5, atol=1e-5)
    few = follow(memory, asked, targets, np.array([0]), K, least=1)
    assert not few.searched.all()
    found = few.found
    true = np.take_along_axis(asked.astype(np.float64) @ keys.T, found.entries.numpy(), axis=1)
    present = found.present.numpy()
    np.testing.assert_allclose(-found.distances.numpy()[present], true[present], rtol=1e-5, atol=1e-5)
    assert Pointers(memory, 3).metric == "inner_product"


def test_distances_are_ranked_again_by_products(memory, keys, queries):
    """Proposals in a wrong order, with wrong distances."""
    everything = np.tile(np.arange(len(keys)), (len(queries), 1))
    proposals = _faiss.Neighbors.from_search(everything, np.zeros(everything.shape, np.float32))
    found = _faiss.rerank(memory.keys, queries, proposals, K)
    products = queries.astype(np.float64) @ keys.T
    np.testing.assert_allclose(-found.distances, -np.sort(-products, axis=1)[:, :K], rtol=1e-5, atol=1e-5)
    true = np.take_along_axis(products, found.entries, axis=1)
    np.testing.assert_allclose(-found.distances, true, rtol=1e-5, atol=1e-5)

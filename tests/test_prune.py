"""Pruned datastores: what is merged, against NumPy in float64; p_kNN; and life after `prune`."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fake_encoder import FakeEncoder, Tokenized, random_documents
from memlm import Datastore, Document, KnnMixture, evaluate, explain
from memlm.datastore import Export, Manifest, Pointers, audit, verify
from memlm.datastore._part import Part
from memlm.errors import ConfigError, DatastoreCorrupt, DatastoreError
from memlm.evaluation import overlap
from memlm.evidence import Evidence
from memlm.models import attach

QUIET = {"show_progress": False}
QUERIES = np.random.default_rng(3).normal(size=(20, 8)).astype(np.float32)
GENERATED = {"max_new_tokens": 6, "do_sample": False}


class ByLetter(FakeEncoder):
    """Keys that depend on one letter alone, and a little on the place: what follows a letter twice is near or equal."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.noise = noise

    def keys(self, sequences):
        keys = []
        for ids in sequences:
            for stop in range(1, len(ids)):
                letter, place = np.random.default_rng(int(ids[stop - 1])), np.random.default_rng([stop, *ids[:stop]])
                keys.append(letter.normal(size=8) + self.noise * place.normal(size=8))
        yield torch.arange(len(keys)), torch.tensor(np.array(keys).reshape(-1, 8), dtype=torch.float32)


EQUAL, NEAR = ByLetter(), ByLetter(noise=0.3)
DOCUMENTS = random_documents(8, 60)


def build(path, encoder=EQUAL, source=DOCUMENTS, **settings):
    return Datastore.build(encoder, source, path, **QUIET | {"index": "exact", "segment_entries": 130} | settings)


@pytest.fixture
def memory(tmp_path):
    return build(tmp_path / "memory")


@pytest.fixture
def near(tmp_path):
    return build(tmp_path / "near", NEAR)


def content(memory):
    """Everything that a reader can learn, by document."""
    rows = {}
    for item in memory.documents():
        first, stop = item["entries"]
        keys = memory.keys.gather_keys(np.arange(first, stop)).numpy()
        counts = np.ones(stop - first, int) if memory.counts is None else memory.counts[first:stop]
        places = memory.positions(first, stop)
        spans = [(origin.start, origin.token) for origin in map(memory.provenance, range(first, stop))]
        rows[item["id"]] = (item["text"], str(item["metadata"]), memory.values[first:stop].tolist(), spans)
        rows[item["id"]] += (keys.tolist(), counts.tolist(), places.tolist())
    return rows


def p_knn(memory, queries=QUERIES, k=None, temperature=3.0):
    """p_kNN over all entries, of the letters, float64."""
    found = memory.lookup(queries, k or len(memory))
    mixture = KnnMixture(interpolation_weight=1.0, temperature=temperature, k=k or len(memory))
    shares = mixture.mix(Evidence((found,))).log_shares[0].double().exp().numpy()
    result = np.zeros((len(queries), 128))
    np.add.at(result, (np.arange(len(queries))[:, None], found.tokens.numpy()), shares)
    return result


# What is merged


def oracle(memory, neighbors, distance=None, seed=0):
    """Greedy merging as the paper has it, within a document, in float64: the entries left and what they count."""
    keys = memory.keys.gather_keys(np.arange(memory.slots)).double().numpy()
    documents = np.repeat(np.arange(memory.manifest.documents), [b - a for a, b in memory.entry_ranges()])
    alike = (documents[:, None] == documents) & (memory.values[:, None] == memory.values)
    far = np.square(keys[:, None] - keys).sum(axis=2)
    counts, generator, start = np.ones(memory.slots, int), torch.Generator().manual_seed(seed), 0
    for part in memory.manifest.segments:
        here = range(start, start + part.details["entries"])
        for entry in here:  # equal ones first
            equal = [other for other in here if other > entry and alike[entry, other] and far[entry, other] == 0]
            for other in equal if counts[entry] else []:
                counts[entry], counts[other] = counts[entry] + counts[other], 0
        staying, took_in = [entry for entry in here if counts[entry]], set()
        for place in torch.randperm(len(staying), generator=generator).tolist():
            entry = staying[place]
            nearest = [other for other in far[entry].argsort(kind="stable") if other != entry][:neighbors]
            for other in nearest:
                within = distance is None or far[entry, other] <= distance
                if counts[entry] and counts[other] and alike[entry, other] and within and other not in took_in:
                    counts[entry], counts[other] = counts[entry] + counts[other], 0
                    took_in.add(entry)
        start = here.stop
    return np.flatnonzero(counts), counts[counts > 0]


@pytest.mark.parametrize("index", ["exact", "Flat", "IVF1,SQfp16"])
@pytest.mark.parametrize(("neighbors", "distance", "seed"), [(0, None, 0), (1, None, 0), (7, None, 3), (7, 1.0, 0)])
def test_what_is_merged_is_what_the_oracle_merges(near, index, neighbors, distance, seed):
    near.build_index(index)
    left, counts = oracle(near, neighbors, distance, seed)
    keys, values = near.keys.gather_keys(left).numpy(), near.values[left]
    before, version = len(near), near.manifest.version
    settings = {"distance": distance, "seed": seed, **QUIET}
    assert near.prune(neighbors, dry_run=True, **settings) == before - len(left)
    assert (len(near), near.manifest.version) == (before, version)
    assert near.prune(neighbors, **settings) == before - len(left)
    assert (len(left) < before) == (neighbors > 0)
    assert near.values.tolist() == values.tolist()
    assert near.keys.gather_keys(np.arange(len(near))).numpy().tolist() == keys.tolist()
    assert (np.ones(len(near), int) if near.counts is None else near.counts).tolist() == counts.tolist()
    assert near.index.details.get("factory", "exact") == index
    assert near.info()["merged"] == before - len(left)
    assert verify(near.path) == []


def test_equal_keys_are_merged_whoever_is_near(memory):
    """An entry may have more equals than neighbors are looked at; all of them become one."""
    left, counts = oracle(memory, 0)
    assert counts.max() > 2
    gone = memory.prune(0, **QUIET)
    assert (gone, len(memory)) == (counts.sum() - len(left), len(left))
    assert sorted(memory.counts) == sorted(counts)
    assert memory.prune(0, **QUIET) == memory.prune(1, distance=0.0, **QUIET) == 0  # nothing is written
    assert len(memory.history()) == 1


def test_another_order_merges_other_entries(near, tmp_path):
    other = Datastore(shutil.copytree(near.path, tmp_path / "other"))
    again = Datastore(shutil.copytree(near.path, tmp_path / "again"))
    for memory, seed in ((near, 0), (other, 1), (again, 0)):
        memory.prune(4, seed=seed, **QUIET)
    assert content(near) == content(again) != content(other)


def test_documents_without_entries_stay(tmp_path):
    encoder = ByLetter()
    encoder.identity["tokenizer"]["start"] = None
    encoder.tokenize = lambda document: Tokenized(
        document, np.array([*map(ord, document.text)]), np.zeros((len(document.text), 2), np.uint32)
    )
    texts = ["a", "abababab", "b"]  # a document of one token has no entry
    memory = build(tmp_path / "memory", encoder, [Document(text, text) for text in texts])
    ranges = [item["entries"] for item in memory.documents()]
    assert [memory.positions(*item).tolist() for item in ranges] == [[], list(range(7)), []]
    assert memory.prune(0) == 5
    assert [memory.positions(*item["entries"]).tolist() for item in memory.documents()] == [[], [0, 1], []]
    assert memory.remove(["abababab"]) == ["abababab"]
    assert (memory.prune(3), len(memory)) == (0, 0)


def test_nothing_is_merged_into_another_document(tmp_path):
    """The same text under two names: every entry has an equal in the other document, and none in its own."""
    memory = build(tmp_path / "memory", source=[Document("one", "xabcdefg"), Document("two", "xabcdefg")])
    assert memory.prune(8, dry_run=True) == 0
    joined = build(tmp_path / "joined", source=[Document("both", "xabcdefgxabcdefg")])
    assert joined.prune(0) == 7


# What it does to p_kNN


@pytest.mark.parametrize("index", ["exact", "IVF1,SQfp16"])
def test_merging_equal_keys_leaves_p_knn_as_it_was(memory, index):
    memory.build_index(index)
    before = p_knn(memory)
    assert memory.prune(0, **QUIET) > 100
    np.testing.assert_allclose(p_knn(memory), before, atol=1e-5)
    memory.counts = None  # the test can fail: without what entries count for it is another distribution
    assert np.abs(p_knn(memory) - before).max() > 0.01


def test_p_knn_is_that_of_the_weights_in_float64(near):
    near.prune(5, **QUIET)
    assert near.counts.max() > 1
    keys = near.keys.gather_keys(np.arange(len(near))).double().numpy()
    for k in (3, len(near)):
        distances = np.square(QUERIES[:, None].astype(np.float64) - keys).sum(axis=2)
        expected = np.zeros((len(QUERIES), 128))
        for row, order in enumerate(distances.argsort(axis=1)[:, :k]):
            weights = near.counts[order] * np.exp(-distances[row, order] / 3.0)
            np.add.at(expected[row], near.values[order], weights / weights.sum())
        np.testing.assert_allclose(p_knn(near, k=k), expected, atol=1e-5)


def test_merging_near_keys_changes_p_knn_little(tmp_path):
    near = build(tmp_path / "near", ByLetter(noise=0.1))
    before, entries = p_knn(near), len(near)
    assert near.prune(32, **QUIET) > entries / 5
    assert np.abs(p_knn(near) - before).max() < 0.02
    near.counts = None
    assert np.abs(p_knn(near) - before).max() > 0.03


def test_keys_searched_by_inner_product_are_merged_where_they_are_equal(tmp_path):
    memory = build(tmp_path / "memory", metric="inner_product")
    before = memory.lookup(QUERIES, len(memory))
    with pytest.raises(ConfigError, match=r"neighbors is 8, but keys that are searched by inner product.*pass 0"):
        memory.prune(**QUIET)
    memory.prune(0, **QUIET)
    found = memory.lookup(QUERIES, len(memory))
    whole = (-before.distances).logsumexp(dim=1)
    torch.testing.assert_close((found.log_counts - found.distances).logsumexp(dim=1), whole)


# Life after it


def test_removing_a_document_removes_what_it_contributed_and_nothing_else(memory, tmp_path):
    other = Datastore(shutil.copytree(memory.path, tmp_path / "other"))
    memory.prune(0, **QUIET)
    held = content(memory)
    memory.remove(["d1", "d5"])
    assert content(memory) == {name: row for name, row in held.items() if name not in ("d1", "d5")}
    other.remove(["d1", "d5"])
    np.testing.assert_allclose(p_knn(memory), p_knn(other), atol=1e-5)
    memory.compact(**QUIET)
    other.compact(**QUIET)
    other.prune(0, **QUIET)
    assert content(memory) == content(other)
    assert audit(memory.path, "d1", DOCUMENTS[1].text) == []


def test_what_was_removed_leaves_the_disk_and_is_not_merged_into(memory):
    memory.remove(["d2"])
    memory.prune(0, **QUIET)
    assert "d2" not in content(memory)
    assert audit(memory.path, "d2", DOCUMENTS[2].text) == []
    assert memory.live is None
    assert memory.info()["merged"] + len(memory) == 7 * 61


def test_life_goes_on(memory, tmp_path):
    opened = Datastore(memory.path)
    before = content(opened)
    memory.prune(0, **QUIET)
    assert content(opened) == before  # a reader keeps its version
    opened.refresh()
    held = content(opened)
    assert held == content(memory) != before
    new = [Document("new", "xaab aab aab"), Document("d2", "xin the place of another")]
    assert memory.add(EQUAL, new, replace=True) == (2, 1)
    assert memory.counts.tolist()[-len("xaab aab aab") :] == [1] * 12  # what is added is not pruned
    whole = build(tmp_path / "whole", source=[*DOCUMENTS[:2], *DOCUMENTS[3:], *new])
    np.testing.assert_allclose(p_knn(memory), p_knn(whole), atol=1e-5)
    memory.rollback(memory.manifest.version - 1)
    assert content(memory) == held
    memory.add(EQUAL, new, replace=True)
    memory.build_index("IVF1,SQfp16")
    np.testing.assert_allclose(p_knn(memory), p_knn(whole), atol=1e-5)
    assert memory.prune(0, **QUIET) > 0  # the new ones, too
    whole.prune(0, **QUIET)
    assert sorted(content(memory).items()) == sorted(content(whole).items())
    assert verify(memory.path) == []


def test_pruned_ones_are_merged_with_others(memory, tmp_path):
    memory.prune(0, **QUIET)
    held = content(memory)
    other = build(tmp_path / "other", source=[Document("new", "xaab aab")])
    assert memory.merge(other.path, **QUIET) == (1, 0)
    assert content(memory) == held | content(other)
    assert other.merge(memory.path, **QUIET) == (8, 0)
    assert content(other) == content(memory)
    assert other.info()["merged"] == memory.info()["merged"] > 0


def test_compression_keeps_what_entries_count(memory):
    memory.prune(0, **QUIET)
    before, held = p_knn(memory), content(memory)
    memory.compress(8, "float16")
    np.testing.assert_allclose(p_knn(memory), before, atol=2e-3)
    assert {name: row[5:] for name, row in content(memory).items()} == {name: row[5:] for name, row in held.items()}
    assert memory.prune(2, **QUIET) >= 0  # keys in the smaller space
    assert verify(memory.path) == []


def test_compressed_ones_are_pruned(near):
    near.compress(4, index="IVF1,SQ8")
    before, entries = p_knn(near), len(near)
    left, _ = oracle(near, 6)
    assert near.prune(6, **QUIET) == entries - len(left) > 0
    assert near.manifest.codec is not None
    assert near.index.details["factory"] == "IVF1,SQ8"
    assert np.abs(p_knn(near) - before).max() < 0.1
    near.add(NEAR, [Document("new", "xnew")])
    assert verify(near.path) == []


def test_documents_that_are_not_pruned_any_more_are_stored_as_ever(memory, tmp_path):
    plain = Datastore(shutil.copytree(memory.path, tmp_path / "plain"))
    memory.prune(0, **QUIET)
    memory.add(EQUAL, [Document(item.id, item.text + " ") for item in DOCUMENTS], replace=True)
    memory.compact(**QUIET)
    plain.add(EQUAL, [Document(item.id, item.text + " ") for item in DOCUMENTS], replace=True)
    plain.compact(**QUIET)
    assert memory.counts is None
    assert memory.manifest.content_sha256 == plain.manifest.content_sha256


@pytest.mark.parametrize("keys", [True, False])
def test_exports_know_what_is_pruned(memory, tmp_path, keys):
    memory.prune(0, **QUIET)
    memory.add(EQUAL, [Document("new", "xaab aab")], segment_entries=10)
    memory.to_parquet(tmp_path / "memory.parquet", keys=keys)
    if keys:
        other = Datastore.from_parquet(tmp_path / "memory.parquet", tmp_path / "other", **QUIET)
        assert content(other) == content(memory)
        assert other.manifest.content_sha256 == memory.manifest.content_sha256
    else:
        other = Datastore.from_parquet(tmp_path / "memory.parquet", tmp_path / "other", EQUAL, **QUIET)
        assert other.counts is None  # built again, of the text
        assert len(other) == memory.info()["merged"] + len(memory)


@pytest.mark.parametrize(
    ("column", "last"),
    [("counts", [0]), ("counts", [1 << 31] * 2), ("positions", [2]), ("positions", [(1 << 32) - 1])],
)
def test_damaged_exports_are_refused(memory, tmp_path, column, last):
    import pyarrow
    import pyarrow.parquet as parquet

    memory.prune(0, **QUIET)
    file = tmp_path / "memory.parquet"
    memory.to_parquet(file, keys=True)
    opened = parquet.ParquetFile(file)
    groups = [opened.read_row_group(group) for group in range(opened.num_row_groups)]
    with parquet.ParquetWriter(file, opened.schema_arrow, use_dictionary=False, write_page_checksum=True) as writer:
        for table in groups:
            lists = table[column].to_pylist()
            lists[0][-len(last) :] = last
            place = table.schema.get_field_index(column)
            kind = table.schema.field(column)
            table = table.set_column(place, kind, pyarrow.array(lists, kind.type))
            writer.write_table(table, row_group_size=len(table))
        writer.add_key_value_metadata(opened.metadata.metadata)
    with pytest.raises(DatastoreCorrupt, match="entries of 'd0' have positions or counts that cannot be"):
        Datastore.from_parquet(file, tmp_path / "other", **QUIET)
    assert Export(file).documents == 8


def test_provenance_and_what_follows(memory):
    whole = {item["id"]: item["text"] for item in memory.documents()}
    memory.prune(0, **QUIET)
    for item in memory.documents():
        first, stop = item["entries"]
        places = memory.positions(first, stop).tolist()
        for entry, place in zip(range(first, stop), places, strict=True):
            origin = memory.provenance(entry)
            assert (origin.position, origin.document) == (place, item["id"])
            assert origin.token == whole[item["id"]][place] == chr(memory.values[entry])
        expected = [after == before + 1 for before, after in pairwise(places)] + [False]
        assert memory.followed[first:stop].tolist() == expected[: stop - first]


class ByWord(ByLetter):
    """A token a word, known by its first letter; as with some tokenizers, white space is in no span."""

    def tokenize(self, document):
        words = list(re.finditer(r"\S+", document.text))
        spans = [(0, 0), *(word.span() for word in words)]
        ids = np.array([0, *(ord(word[0][0]) for word in words)])
        return Tokenized(document, ids, np.array(spans, np.uint32))


def test_white_space_stays_with_its_token(tmp_path):
    memory = build(tmp_path / "memory", ByWord(), [Document("one", "a  bat can  bat  dig can bat can  a")])
    before = {memory.provenance(entry).position: memory.provenance(entry) for entry in range(len(memory))}
    assert [item.token for item in before.values()][:4] == ["a", "  bat", " can", "  bat"]
    assert memory.prune(0) == 2  # bat after can, and can after bat
    after = [memory.provenance(entry) for entry in range(len(memory))]
    assert after == [before[item.position] for item in after]
    assert not all(memory.followed[:-1])


def test_pointers_end_where_the_next_entry_was_merged(near):
    near.prune(8, **QUIET)
    assert not near.followed.all()
    targets = near.values[:20].astype(np.int64)
    pointed = Pointers(near, math.inf).lookup(QUERIES, targets, np.zeros(20, np.int64), 5)
    found = near.lookup(QUERIES, 5)  # beside an exact search they change nothing
    for name in ("distances", "tokens", "entries", "log_counts"):
        torch.testing.assert_close(getattr(pointed.found, name), getattr(found, name), rtol=1e-4, atol=1e-4)
    alone = Pointers(near, 1).lookup(QUERIES, targets, np.zeros(20, np.int64), 5)
    some = alone.found.entries[1:][alone.found.present[1:] & ~torch.from_numpy(alone.searched[1:, None])].numpy()
    assert len(some)
    assert near.followed[some - 1].all()


def test_frequencies_count_what_was_merged(memory):
    before = memory.statistics()
    memory.prune(0, **QUIET)
    after = memory.statistics()
    frequency, known = after[:, 0].exp() - 1, before[:, 0].exp() - 1
    assert float((frequency - known).abs().max()) <= 8 + 1e-3  # a document whose last entry was merged: one off
    assert bool((after[:, 1] <= before[:, 1] + 1e-6).all())


def test_all_that_a_last_entry_stands_for_but_one_is_followed(tmp_path):
    memory = build(tmp_path / "memory", source=[Document("one", "a" * 60)])
    before = memory.statistics()
    assert (memory.prune(8, **QUIET), len(memory)) == (59, 1)
    torch.testing.assert_close(memory.statistics()[:, 0], before[:, 0])


# With a language model


@pytest.fixture
def stored(tiny_lm, documents, tmp_path):
    """A model whose keys see one token, so that many are equal; the datastore as built, and pruned."""
    lm = tiny_lm(context=1, stride=1)
    memory = Datastore.build(lm, documents, tmp_path / "memory", **QUIET)
    pruned = Datastore(shutil.copytree(memory.path, tmp_path / "pruned"))
    assert pruned.prune(0) > 10
    return lm, memory, pruned


def test_text_is_scored_explained_and_written_as_before(stored):
    lm, memory, pruned = stored
    text = [Document("new", "the cat was on the roof and the letter was in the box")]
    mixtures = [KnnMixture(interpolation_weight=0.7, temperature=0.5, k=len(item)) for item in (memory, pruned)]
    one, other = (evaluate(lm, text, *with_).results[1] for with_ in zip((memory, pruned), mixtures, strict=True))
    assert other.perplexity == pytest.approx(one.perplexity, rel=1e-4)
    explained = [explain(lm, text[0].text, *with_) for with_ in zip((memory, pruned), mixtures, strict=True)]
    for mine, theirs in zip(*(item.tokens for item in explained), strict=True):
        assert mine.mixture == pytest.approx(theirs.mixture, rel=1e-3)
        assert max(source.share for source in theirs.sources) >= max(source.share for source in mine.sources) - 1e-5
    ids = torch.tensor([lm.tokenizer("the cat was")["input_ids"]])
    written = []
    for item, mixture in zip((memory, pruned), mixtures, strict=True):
        with attach(lm.model, item, mixture):
            written.append(lm.model(ids).logits)
            written.append(lm.model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATED))
    torch.testing.assert_close(written[0], written[2], rtol=1e-3, atol=1e-3)
    assert written[1].equal(written[3])
    pruned.counts = None
    assert evaluate(lm, text, pruned, mixtures[1]).results[1].perplexity != pytest.approx(one.perplexity, rel=3e-4)


def test_a_stored_text_leaves_its_own_entries_out(stored, documents):
    lm, memory, pruned = stored
    results = []
    for item in (memory, pruned):
        item.remove("unicode")
        mixture = KnnMixture(interpolation_weight=0.7, temperature=0.5, k=len(item))
        results.append(evaluate(lm, documents[:1], item, mixture).results[1].perplexity)
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_overlap_looks_at_the_text(stored, documents):
    lm, memory, pruned = stored
    assert overlap(lm, documents[:2], pruned, n=3) == overlap(lm, documents[:2], memory, n=3)


def test_training_refuses_it(stored, documents):
    from memlm.training._spalm_data import neighbor_tokens

    lm, _, pruned = stored
    with pytest.raises(ConfigError, match="is pruned, and in training a neighbor counts once"):
        neighbor_tokens(lm, [np.array([1, 2, 3])], ["x"], pruned, 4)


# What cannot be


@pytest.mark.parametrize(
    ("neighbors", "distance", "words"),
    [
        (-1, None, r"neighbors is -1; expected 0 \(only equal keys\) to 4,096"),
        (5000, None, "neighbors is 5000; expected 0"),
        (2.5, None, r"neighbors is 2.5; expected 0"),
        (True, None, "neighbors is True; expected 0"),
        (8, -1.0, "distance is -1.0; expected a squared distance of at least 0"),
        (8, math.nan, "distance is nan; expected a squared distance of at least 0"),
        (8, "near", "distance is 'near'; expected a squared distance of at least 0"),
    ],
)
def test_what_cannot_be_is_refused(memory, neighbors, distance, words):
    with pytest.raises(ConfigError, match=words):
        memory.prune(neighbors, distance=distance)
    for seed in (-1, 1 << 63, 0.5):
        with pytest.raises(ConfigError, match=r"seed is .*expected a whole number from 0"):
            memory.prune(0, seed=seed)
    assert len(memory.history()) > 1


def test_only_one_writes(memory):
    from memlm.datastore._writing import writing

    with writing(memory.path, "something"), pytest.raises(DatastoreError, match="is being written to by"):
        memory.prune(0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"counts": [0]}, "has entries that stand for none"),
        ({"counts": None}, "holds other tensors than its manifest says"),
        ({"positions": None}, "holds other tensors than its manifest says"),
        ({"counts": np.ones(3, np.uint32)}, "holds other tensors than its manifest says"),
    ],
)
def test_tensors_that_cannot_be_are_refused_though_their_checksum_is_right(memory, change, words):
    memory.prune(0, **QUIET)
    rewrite(memory.path, change)
    with pytest.raises(DatastoreCorrupt, match=words):
        Datastore(memory.path)


@pytest.mark.parametrize("change", [{"positions": [7, 7]}, {"counts": [1 << 31, 1 << 31]}, {"positions": [0, 1, 60]}])
def test_positions_and_counts_that_cannot_be_are_found(tmp_path, change):
    """Out of order; more than a document can have; a place behind the last one."""
    memory = build(tmp_path / "memory", source=[Document("one", "ab" * 30)])
    assert (memory.prune(0, **QUIET), len(memory)) == (57, 3)
    rewrite(memory.path, change)
    assert [line.split(": ")[1] for line in verify(memory.path)] == [
        "entries of document 0 have positions or counts that cannot be; restore it from a copy"
    ]


def test_counts_that_overflow_lose_no_entry(memory):
    """Two that are merged would count 2³² or more, and as a uint32 perhaps 0."""
    memory.prune(0, **QUIET)
    rewrite(memory.path, {"counts": np.full(len(memory._segments[0].values), (1 << 32) - 1, np.uint32)})
    memory = Datastore(memory.path)
    before = content(memory)
    with pytest.raises(DatastoreCorrupt, match="has a document whose entries stand for too many; restore it"):
        memory.prune(4096, **QUIET)
    assert content(Datastore(memory.path)) == before


def rewrite(path, change):
    """Change tensors of the first segment: None drops one, a list replaces its beginning."""
    manifest = Manifest.load(path)
    name = manifest.segments[0].name
    file = path / "segments" / name / "entries.safetensors"
    tensors = load_file(file)
    for tensor, value in change.items():
        if value is None:
            del tensors[tensor]
        elif isinstance(value, list):
            tensors[tensor] = np.concatenate([np.array(value, np.uint32), tensors[tensor][len(value) :]])
        else:
            tensors[tensor] = value
    save_file(tensors, file)
    segment = Part.describe(path / "segments", name, manifest.segments[0].details)
    replace(manifest, segments=(segment, *manifest.segments[1:])).publish(path)

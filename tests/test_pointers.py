"""Pointers against the definition, token by token, and in scoring."""

import math

import numpy as np
import pytest
import torch

from fake_encoder import FakeEncoder, random_documents
from memlm import Datastore, KnnMixture, attach, evaluate, explain
from memlm.cache import Cache
from memlm.datastore import Pointers, follow
from memlm.errors import ConfigError, ModelError, ShapeError
from memlm.evaluation._retrieval import Text, retrieve
from memlm.neighbors import Neighbors
from oracle import stored_entries
from tiny_memories import TEXTS, documents, lm_of, store

K, LENGTH = 20, 90
STARTS = np.array([0, 7, 8, 40])


class Half:
    """A search that misses every second entry."""

    details: dict = {"kind": "half"}  # noqa: RUF012

    def __init__(self, folder, step=2):
        self.keys = stored_entries(folder)[0]
        self.step = step

    def search(self, queries, k, exclude):
        distances = np.square(queries[:, None].astype(float) - self.keys).sum(axis=2)
        distances[:, exclude[0] : exclude[1]] = np.inf
        distances[:, 1 :: self.step] = np.inf
        order = distances.argsort(axis=1)[:, :k]
        near = np.take_along_axis(distances, order, axis=1)
        return Neighbors(np.where(near < np.inf, order, 0), near.astype(np.float32), near < np.inf)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pointers") / "memory"
    # no two keys are the same, so that no order is left to chance
    encoder = FakeEncoder(
        change=lambda batch, keys: keys + torch.randn(keys.shape, generator=torch.Generator().manual_seed(batch)) / 9
    )
    Datastore.build(encoder, random_documents(), path, index="exact", segment_entries=250, show_progress=False)
    return path


@pytest.fixture
def memory(folder):
    return Datastore(folder)


def questions(memory, seed=0):
    """Random queries; what came next is what some stored entry says."""
    generator = np.random.default_rng(seed)
    queries = generator.normal(size=(LENGTH, memory.width)).astype(np.float32)
    return queries, memory.values[generator.integers(len(memory), size=LENGTH)].astype(np.int64)


def by_definition(folder, ranges, queries, targets, least, exclude, step=1):
    """Follow pointers one target after the other, in float64; return each one's neighbors, and whether it searched."""
    keys, values = stored_entries(folder)
    seen = [entry for entry in range(len(keys)) if step == 1 or entry % step == 0]
    document = np.concatenate([np.full(stop - first, number) for number, (first, stop) in enumerate(ranges)])
    neighbors, searched = [], []
    for row, query in enumerate(queries):
        distances = np.square(query.astype(float) - keys).sum(axis=1)
        pointers = set()
        if row not in STARTS:
            pointers = {
                entry + 1
                for entry in neighbors[-1]
                if values[entry] == targets[row - 1]
                and entry + 1 < len(keys)
                and document[entry] == document[entry + 1]
                and not exclude[row, 0] <= entry + 1 < exclude[row, 1]
            }
        searched.append(len(pointers) < least)
        if searched[-1]:
            allowed = [entry for entry in seen if not exclude[row, 0] <= entry < exclude[row, 1]]
            pointers |= set(sorted(allowed, key=lambda entry: distances[entry])[:K])
        neighbors.append(sorted(pointers, key=lambda entry: distances[entry])[:K])
    return neighbors, searched


@pytest.mark.parametrize("least", [1, 2, 4, math.inf])
@pytest.mark.parametrize("step", [1, 2])
def test_as_defined(folder, memory, least, step):
    if step == 2:
        memory.index = Half(folder)
    assert len(memory.manifest.segments) > 1
    ranges = list(memory.entry_ranges())
    exclude = np.zeros((LENGTH, 2), np.int64)
    exclude[8:40] = ranges[2]
    exclude[60:70] = 100, 110  # neither a whole document nor a whole stream
    queries, targets = questions(memory)
    found, searched = follow(memory, queries, targets, STARTS, K, least=least, exclude=exclude)
    neighbors, asked = by_definition(folder, ranges, queries, targets, least, exclude, step)
    assert searched.tolist() == asked
    assert searched[STARTS].all()
    assert (~searched).any() == (least < math.inf)
    keys, values = stored_entries(folder)
    for row, wanted in enumerate(neighbors):
        present = found.present[row].numpy()
        entries = found.entries[row].numpy()[present]
        assert entries.tolist() == wanted
        assert len(set(wanted)) == len(wanted)
        assert present[: len(wanted)].all(), "absent places come last"
        exact = np.square(queries[row].astype(float) - keys[wanted]).sum(axis=1)
        np.testing.assert_allclose(found.distances[row].numpy()[present], exact, rtol=1e-5)
        assert found.tokens[row].numpy()[present].tolist() == values[wanted].tolist()


def test_no_search_saved_is_plain_search(memory):
    queries, targets = questions(memory)
    plain = memory.lookup(queries, K)
    pointed = Pointers(memory, math.inf).lookup(queries, targets, np.zeros(LENGTH, np.int64), K)
    assert pointed.searched.all()
    for one, other in zip(pointed.found[:4], plain[:4], strict=True):
        assert one.tolist() == other.tolist()


def test_pointers_end_with_the_document_and_the_stream(memory):
    ranges = list(memory.entry_ranges())
    last = np.array([stop - 1 for _, stop in ranges])
    assert memory.last_of_document.nonzero()[0].tolist() == last.tolist()
    keys, values = stored_entries(memory.path)
    entries = np.arange(ranges[1][0] + 90, ranges[1][1] + 5)  # over the end of a document: a copy of the store itself
    queries, targets = keys[entries].astype(np.float32), values[entries]
    pointed = Pointers(memory, 1, stream=6).lookup(queries, targets, np.zeros(len(entries), np.int64), 1)
    after = entries == ranges[2][0]
    assert pointed.searched.tolist() == ((np.arange(len(entries)) % 6 == 0) | after).tolist()
    assert pointed.found.entries[:, 0].tolist() == entries.tolist()
    documents = (np.arange(len(entries)) > 2).astype(np.int64)
    assert Pointers(memory, 1).lookup(queries, targets, documents, 1).searched[3]


def test_rows_that_are_not_wanted_find_nothing(memory):
    queries, targets = questions(memory)
    wanted = np.arange(LENGTH) % 3 > 0
    found, searched = follow(memory, queries, targets, STARTS, K, least=1, wanted=wanted)
    assert (found.present.any(dim=1).numpy() == wanted).all()
    assert searched[~wanted].sum() == 0
    assert searched[1::3].all(), "nothing points to them"


def test_empty_and_bad_input(memory):
    none = np.zeros(0, np.int64)
    found, searched = Pointers(memory, 1).lookup(np.zeros((0, memory.width), np.float32), none, none, K)
    assert found.entries.shape == (0, K)
    assert len(searched) == 0
    assert len(Pointers(memory, 1)) == len(memory)
    for settings in ({"least": 0}, {"least": math.nan}, {"least": 1, "stream": 0}):
        with pytest.raises(ConfigError, match="expected at least 1"):
            Pointers(memory, **settings)
    for stream in (1.5, math.inf):
        with pytest.raises(ConfigError, match="expected a whole number of targets"):
            Pointers(memory, 1, stream)
    queries, targets = questions(memory)
    with pytest.raises(ConfigError, match="k is 10000"):
        follow(memory, queries, targets, STARTS, 10_000, least=1)
    queries[50] = np.nan
    with pytest.raises(ShapeError, match="NaN"):
        follow(memory, queries, targets, STARTS, K, least=1)


WORDS = list({word: 1 for text in TEXTS for word in text.split()})
MIXTURE = KnnMixture(interpolation_weight=0.9, temperature=0.05, k=8)


def prose(seed, words=150):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model, a memory of twelve texts, and a text made of three stretches copied from them."""
    lm = lm_of("llama")
    stored = [prose(seed) for seed in range(12)]
    memory = store(lm, stored, tmp_path_factory.mktemp("planted") / "memory")
    return lm, memory, " ".join([stored[2][:500], prose(99, 10), stored[5][:500], stored[8][:500]]), stored


def test_copies_save_most_searches(planted):
    lm, memory, text, _ = planted
    plain = evaluate(lm, documents([text]), memory, MIXTURE, show_progress=False)
    pointed = evaluate(lm, documents([text]), Pointers(memory, 2), MIXTURE, show_progress=False)
    assert plain.results[1].perplexity < 0.5 * plain.results[0].perplexity
    assert pointed.settings["searched"] < 0.5
    assert pointed.results[1].perplexity < 1.1 * plain.results[1].perplexity
    assert pointed.settings["memories"][0] == {**plain.settings["memories"][0], "pointers": 2, "stream": 16}
    explained = explain(lm, text, Pointers(memory, 2), MIXTURE)
    assert explained.tokens[100].sources[0].document.startswith("document")


def test_own_document_stays_left_out(planted):
    lm, memory, _, stored = planted
    first, stop = memory.document_range(stored[3])
    for leave_out in (True, False):
        text = Text(lm, documents([stored[3], stored[4]]))
        settings = {"leave_out_own": leave_out, "show_progress": False}
        (batch,) = retrieve(lm, text, Pointers(memory, 1), [8], **settings)
        mine = batch.rows < len(text.ids[0]) - 1
        entries = batch.found.entries[mine][batch.found.present[mine]]
        assert ((entries >= first) & (entries < stop)).any() != leave_out
        assert batch.searched < 1


def test_searches_of_several_datastores_are_all_counted(planted):
    lm, memory, text, _ = planted
    pointers = Pointers(memory, 2)

    def searched(*memories):
        (batch,) = retrieve(lm, Text(lm, documents([text])), memories, [8] * len(memories), show_progress=False)
        return batch.searched

    alone = searched(pointers)
    assert 0 < alone < 0.5
    for memories in ((pointers, memory), (memory, pointers), (memory, Cache(9), pointers)):
        assert searched(*memories) == pytest.approx((1 + alone) / 2)
    assert searched(pointers, pointers) == pytest.approx(alone)


def test_not_for_generating(planted):
    lm, memory, _, _ = planted
    with (
        pytest.raises(ModelError, match="expected a Datastore or a Cache"),
        attach(lm.model, Pointers(memory, 1), MIXTURE),
    ):
        pass

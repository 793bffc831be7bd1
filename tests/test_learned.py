"""Learned weight: λ before any search, searches that are left out, and what the datastore knows of its tokens."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm import Datastore, KnnMixture, attach, evaluate, ops
from memlm.errors import ConfigError
from memlm.evaluation._retrieval import Text, gather, retrieve
from memlm.evidence import Belief, Evidence
from memlm.mixtures import HeldOut, LearnedMixture, fit, skipping_curve
from memlm.mixtures._fit import gain
from memlm.mixtures._fit_learned import _curve, _ratio, fit_learned
from memlm.mixtures._learned import context_features
from planted import KEY_WIDTH, belief, held_out, indifferent, memory, network, rising, shuffled_weights
from test_mixtures import VOCABULARY, evidence, rows, temperatures
from tiny_memories import TEXTS, documents, ids_of, lm_of, store

NEW = ["the letter was in the house and it was the morning", "x", "rain was on the bird and the cat is in a box"]


def table(vocabulary=VOCABULARY):
    return torch.rand(vocabulary, 2, generator=torch.Generator().manual_seed(0))


def learned(temperature=2.0, k=9, seed=0, threshold=0.0, statistics=None, width=KEY_WIDTH):
    statistics = table() if statistics is None else statistics
    settings = {"temperature": temperature, "k": k, "threshold": threshold, "statistics": statistics}
    return LearnedMixture(network=network(width + 4, 1, seed), **settings)


@settings(max_examples=25)
@given(rows(), temperatures, st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0]))
def test_it_is_a_distribution(case, temperature, seed, threshold):
    lm, mixture = case[0], learned(temperature, seed=seed, threshold=threshold)
    asked = evidence(*case[1:])._replace(belief=belief(lm))
    mixed = mixture.log_probs(lm, asked)
    np.testing.assert_allclose(mixed.double().exp().sum(dim=1), 1, atol=1e-5)
    alone = ~case[3].any(dim=1) | (mixture.predicted(asked.belief) < threshold)
    assert mixed[alone].equal(lm[alone])
    assert bool((mixture.weights(asked)[~alone] > 0).all())
    for target in range(VOCABULARY):
        one = mixture.target_log_probs(lm[:, target], torch.full((len(lm),), target), asked)
        np.testing.assert_allclose(one.exp(), mixed[:, target].exp(), rtol=1e-4, atol=1e-6)


def test_features_are_the_key_the_model_s_beliefs_and_the_last_token_s_statistics():
    zeros = torch.zeros(3)
    thinks = Belief(
        torch.arange(6.0).reshape(3, 2), torch.tensor([0, 2, 99]), zeros.long(), zeros - 1, zeros + 2, zeros
    )
    statistics = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    expected = [[0, 1, -1, 2, 0.1, 0.2], [2, 3, -1, 2, 0.5, 0.6], [4, 5, -1, 2, 0.5, 0.6]]
    np.testing.assert_allclose(context_features(thinks, statistics), expected)


@given(st.integers(0, 50), st.floats(0, 1))
def test_what_is_wanted_is_what_has_a_weight(seed, threshold):
    lm = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(seed)).log_softmax(dim=1)
    mixture = learned(seed=seed, threshold=threshold, k=1)
    found = memory(torch.zeros(40, 1).long(), torch.ones(40, 1))
    asked = Evidence((found,), belief(lm, seed))
    wanted = mixture.wanted(asked.belief)
    assert (wanted is None) == (threshold == 0)
    assert mixture.skips == (threshold > 0)
    if wanted is not None:
        assert wanted.equal(mixture.weights(asked) > 0)
        assert wanted.equal(mixture.predicted(asked.belief) >= threshold)


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """A language model, a datastore, and a mixture that wants about half of the searches in `NEW`."""
    lm = lm_of("llama")
    memory = store(lm, TEXTS, tmp_path_factory.mktemp("learned") / "memory")
    mixture = learned(10.0, 8, statistics=memory.statistics(), width=memory.width)
    everything = gather(list(retrieve(lm, Text(lm, documents(NEW)), memory, [8], beliefs=True, show_progress=False)))
    predicted = mixture.predicted(everything.evidence.belief)
    assert predicted.min() + 0.1 < predicted.max()
    return lm, memory, dataclasses.replace(mixture, threshold=float(predicted.quantile(0.5))), everything


@pytest.fixture
def searches(monkeypatch):
    """The queries of every search of a datastore."""
    seen, lookup = [], Datastore.lookup
    monkeypatch.setattr(Datastore, "lookup", lambda self, *given: seen.append(given[0]) or lookup(self, *given))
    return seen


def test_what_is_not_wanted_is_not_searched_and_changes_nothing(skipping, searches):
    lm, memory, mixture, everything = skipping
    held = HeldOut(everything.targets, everything.lm_log_probs, everything.evidence, np.arange(len(everything.rows)))
    wanted = mixture.wanted(everything.evidence.belief)
    assert 0.3 < float(wanted.float().mean()) < 0.7
    result = evaluate(lm, documents(NEW), memory, mixture, show_progress=False)
    assert sum(len(queries) for queries in searches) == int(wanted.sum())
    apart = torch.cdist(torch.from_numpy(np.concatenate(searches)), everything.evidence.belief.keys)
    assert apart[:, wanted].amin(dim=1).max() < 1e-2
    assert result.settings["searched"] == pytest.approx(float(wanted.float().mean()))
    np.testing.assert_allclose(result.log_probs, held.log_probs(mixture), atol=1e-4)
    skipped = ~wanted.numpy()
    assert (result.log_probs[skipped] == result.lm_log_probs[skipped]).all()
    assert abs(result.log_probs[~skipped] - result.lm_log_probs[~skipped]).min() > 1e-3


def test_nothing_is_searched_where_nothing_is_wanted(skipping, searches):
    lm, memory, mixture, _ = skipping
    result = evaluate(lm, documents(NEW), memory, dataclasses.replace(mixture, threshold=1.0), show_progress=False)
    assert (searches, result.settings["searched"]) == ([], 0)
    assert (result.log_probs == result.lm_log_probs).all()


def test_a_stored_document_does_not_find_itself_when_searches_are_skipped(skipping):
    lm, memory, mixture, _ = skipping
    text = Text(lm, documents(TEXTS[1:2]))
    first, stop = memory.document_range(TEXTS[1])
    options = {"beliefs": True, "wanted": mixture.wanted, "show_progress": False}
    found = gather(list(retrieve(lm, text, memory, [8], **options))).found
    assert found.present.any(dim=1).float().mean() < 1
    nearest = found.entries[found.present.any(dim=1), 0]
    assert len(nearest) > 0
    assert not ((nearest >= first) & (nearest < stop)).any()


def test_an_attached_model_searches_for_what_is_wanted_alone(skipping, searches):
    lm, memory, mixture, _ = skipping
    ids = ids_of(NEW[0])
    result = evaluate(lm, documents(NEW[:1]), memory, mixture, show_progress=False)
    number = sum(len(queries) for queries in searches)
    searches.clear()
    with attach(lm.model, memory, mixture), torch.no_grad():
        mixed = lm.model(ids).logits[0].log_softmax(dim=-1)
    assert 0 < sum(len(queries) for queries in searches) <= number < ids.shape[1]
    targets = torch.from_numpy(result.targets)[: ids.shape[1] - 1, None]
    np.testing.assert_allclose(mixed[:-1].gather(1, targets)[:, 0], result.log_probs[:-1], atol=1e-4)


def test_statistics_are_counts_within_documents(tmp_path):
    texts = ["c", "b", "a b a b a", "d", "a b a c"]
    lm = lm_of("llama")
    memory = store(lm, texts, tmp_path / "memory", segment_entries=6)
    assert memory.manifest.documents > len(memory.manifest.segments) > 1
    seen, followers = Counter(), set()
    for document in documents(texts):
        ids = lm.tokenize(document).ids[1:].tolist()  # the start token is stored nowhere
        for before, after in pairwise(ids):
            seen[before] += 1
            followers.add((before, after))
    fertility = Counter(before for before, _ in followers)
    size = memory.manifest.tokenizer["vocab_size"]
    expected = [[math.log1p(seen[token]), math.log1p(fertility[token])] for token in range(size)]
    assert seen != fertility
    assert max(fertility.values()) > 2
    np.testing.assert_allclose(memory.statistics(), expected, rtol=1e-6)


def planted(n=2000, k=4, seed=0):
    """The memory is right where the key's first number is positive, and the model elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(50, (n,), generator=generator)
    thinks = indifferent(n)._replace(keys=torch.randn(n, KEY_WIDTH, generator=generator))
    right = thinks.keys[:, 0] > 0
    tokens = (targets[:, None] + torch.where(right, 0, 1)[:, None]).repeat(1, k) % 50
    found = memory(tokens, rising(torch.ones(n), k, generator))
    return held_out(targets, torch.where(right, 0.05, 0.5).log(), [found], thinks, table(50))


BASE = KnnMixture(interpolation_weight=0.5, temperature=1.0, k=4)


@pytest.fixture(scope="module")
def fitted():
    return fit_learned(planted(), BASE)


def test_the_fit_finds_where_the_memory_is_right_and_skips_the_rest(fitted):
    test = planted(seed=1)
    best = fit("knn", test, BASE)
    score, fixed = float(test.log_probs(fitted).mean()), float(test.log_probs(best).mean())
    assert score > fixed + 0.2
    found = test.evidence.memories[0]
    log_probs = ops.knn_target_log_probs(fitted.mix(test.evidence).log_shares[0], found.tokens, test.targets)
    assert shuffled_weights(test, fitted, log_probs) < fixed
    wanted, right = fitted.wanted(test.evidence.belief), test.evidence.belief.keys[:, 0] > 0
    assert wanted is not None
    assert float((wanted == right).float().mean()) > 0.9
    always = float(test.log_probs(dataclasses.replace(fitted, threshold=0.0)).mean())
    assert score > always - 0.02, "skipping costs about as much as it may"


def test_without_tolerance_nothing_is_skipped():
    assert not fit_learned(planted(200), BASE, tolerance=0.0).skips


def test_the_curve_is_the_perplexity_of_every_threshold(fitted):
    test = planted(seed=1)
    curve = skipping_curve(test, fitted)
    shares = [row["skipped"] for row in curve]
    assert shares == sorted(set(shares))
    assert (shares[0], shares[-1]) == (0.0, pytest.approx(0.95))
    predicted = [0.0, *fitted.predicted(test.evidence.belief).sort().values.tolist()]
    compared = 0
    for row in curve:
        place = round(row["skipped"] * len(test)) + 1
        if predicted[place - 1] < predicted[place]:  # where λ are equal no threshold divides them
            log_probs = test.log_probs(dataclasses.replace(fitted, threshold=predicted[place]))
            assert row["perplexity"] == pytest.approx(math.exp(-float(log_probs.mean())), rel=1e-4)
            compared += 1
    assert compared > 15
    late = [row["perplexity"] for row in curve if row["skipped"] > 0.55]  # there, what is skipped would have helped
    assert late == sorted(late)
    assert late[-1] > 1.5 * curve[0]["perplexity"]


@pytest.mark.parametrize("distinct", [1, 2, 7])
def test_targets_of_one_weight_are_skipped_together_or_not_at_all(distinct):
    """The order of targets says nothing: it must not decide which of them the curve skips."""
    test = planted(400)
    weight = torch.linspace(0.1, 0.9, distinct, dtype=torch.float64)[torch.arange(400) % distinct]
    ratio = _ratio(test, 1.0, 4)
    curve = _curve(test, ratio, weight)
    assert [row["skipped"] for row in curve] == pytest.approx(
        [float((weight < w).double().mean()) for w in weight.unique()]
    )
    for row, least in zip(curve, weight.unique(), strict=True):
        log_probs = test.lm_log_probs.double() + gain(ratio, weight) * (weight >= least)
        assert row["perplexity"] == pytest.approx(math.exp(-float(log_probs.mean())))


@pytest.mark.parametrize(
    "make",
    [
        lambda: learned(threshold=1.5),
        lambda: learned(statistics=torch.zeros(3, 3)),
        lambda: learned(statistics=torch.zeros(0, 2)),
        lambda: learned(statistics=torch.full((3, 2), math.nan)),
        lambda: LearnedMixture(temperature=1.0, network=network(7, 2), statistics=table()),
        lambda: learned(width=5).log_probs(torch.zeros(1, 3), Evidence((memory(*[torch.zeros(1, 2).long()] * 2),))),
        lambda: fit_learned(dataclasses.replace(planted(50), statistics=None), BASE),
        lambda: learned(width=5).weights(planted(5).evidence),
    ],
)
def test_what_cannot_work_is_refused(make):
    with pytest.raises(ConfigError):
        make()

"""Several memories under one gate: a distribution, a fit that knows whom to trust, weights that are reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm import KnnMixture, attach, evaluate, explain
from memlm.cache import Cache
from memlm.errors import ConfigError, ModelError
from memlm.evidence import Evidence
from memlm.mixtures import CacheMixture, ExponentialMixture, GateMixture, fit, fit_gate
from memlm.mixtures._gate import gate_features, gate_weights, member_mixes
from planted import belief, held_out, indifferent, memory, network, rising
from test_mixtures import VOCABULARY, rows
from tiny_memories import TEXTS, documents, ids_of, lm_of, store

MEMBERS = (
    KnnMixture(interpolation_weight=0.4, temperature=2.0, k=9),
    ExponentialMixture(scale=0.8, length=10.0, temperature=5.0, k=6),
    CacheMixture(interpolation_weight=0.2, scale=1.0, length=8),
)


def gate(members, evidence, seed=0, size=0.5):
    """A gate of random weights."""
    inputs = gate_features(members, member_mixes(members, evidence), evidence).shape[1]
    return GateMixture(members=members, network=network(inputs, len(members) + 1, seed, size))


def three(case, absent):
    """Two datastores and a cache, with those that are absent empty."""
    lm, *parts = case
    first = memory(parts[1], parts[0])._replace(present=parts[2])
    second = memory((parts[1] + 3) % VOCABULARY, parts[0] + 1)
    recalled = Cache(8).recall(belief(lm).keys, belief(lm).last)
    memories = [
        found._replace(present=found.present & (not gone))
        for found, gone in zip((first, second, recalled), absent, strict=True)
    ]
    return Evidence(tuple(memories), belief(lm))


@settings(max_examples=30)
@given(rows(), st.tuples(st.booleans(), st.booleans(), st.booleans()), st.integers(0, 5))
def test_it_is_a_distribution_whatever_is_absent(case, absent, seed):
    lm, evidence = case[0], three(case, absent)
    mixture = gate(MEMBERS, evidence, seed)
    mixed = mixture.log_probs(lm, evidence)
    np.testing.assert_allclose(mixed.double().exp().sum(dim=1), 1, atol=1e-5)
    for target in range(VOCABULARY):
        one = mixture.target_log_probs(lm[:, target], torch.full((len(lm),), target), evidence)
        np.testing.assert_allclose(one.exp(), mixed[:, target].exp(), rtol=1e-4, atol=1e-6)
    evidence = evidence.nearest(mixture.ks)
    weights, shares = mixture.mix(evidence)
    for place, found in enumerate(evidence.memories):
        assert (weights[:, place] > 0).equal(found.present.any(dim=1))
    assert weights.sum(dim=1).max() < 1
    if all(absent):
        assert mixed.equal(lm)
    named = [
        torch.zeros_like(lm).scatter_add_(1, found.tokens, share.exp()) * weights[:, [place]]
        for place, (share, found) in enumerate(zip(shares, evidence.memories, strict=True))
    ]
    expected = sum(named) + (1 - weights.sum(dim=1, keepdim=True)) * lm.exp()
    np.testing.assert_allclose(mixed.exp(), expected, rtol=1e-3, atol=1e-6)


def test_weights_are_a_softmax_over_those_that_found_something():
    said, own = torch.tensor([[1.0, 2.0, 0.5]] * 3), torch.tensor([[0.3, -1.0]] * 3)
    weights = gate_weights(said, own, torch.tensor([[True, True], [False, True], [False, False]]))
    numbers = np.exp([1.3, 1.0, 0.5]) * [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    expected = numbers[:, :2] / numbers.sum(axis=1, keepdims=True) * (1 - 1e-4)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_a_network_that_says_nothing_leaves_a_memory_to_its_own_mixture():
    (train, _), base = planted(n=50), KnnMixture(interpolation_weight=0.3, temperature=1.0, k=4)
    alone = train.memory(0)
    own = fit("exponential", alone, base)
    mixture = gate((own,), alone.evidence, size=0.0)
    np.testing.assert_allclose(alone.log_probs(mixture), alone.log_probs(own), atol=2e-4)


def planted(n=2500, k=4, seed=0):
    """Two datastores, each right on half of the targets, where it is the nearer one; the model knows little."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(50, (n,), generator=generator)
    first = torch.rand(n, generator=generator) < 0.5
    memories = []
    for right in (first, ~first):
        near = torch.where(right, 1.0, 20.0) + 5 * torch.rand(n, generator=generator)
        tokens = (targets[:, None] + torch.where(right, 0, 1)[:, None]).repeat(1, k) % 50
        memories.append(memory(tokens, rising(near, k, generator)))
    return held_out(targets, torch.full((n,), 0.1).log(), memories, indifferent(n)), first


def test_a_fitted_gate_beats_each_memory_alone_and_any_constant_weights():
    (train, _), (test, first) = planted(), planted(seed=1)
    base = KnnMixture(interpolation_weight=0.3, temperature=1.0, k=4)
    members = tuple(fit("exponential", train.memory(place), base) for place in (0, 1))
    alone = [float(test.memory(place).log_probs(member).mean()) for place, member in enumerate(members)]
    mixture = fit_gate(train, members)
    assert float(test.log_probs(mixture).mean()) > max(alone) + 0.5
    constant = np.log(0.5 * (1 - 1e-4) + 0.1 * 1e-4)  # half to each memory is the best that does not look
    assert float(test.log_probs(mixture).mean()) > constant + 0.4
    weights = mixture.mix(test.evidence).weights
    assert weights[first].mean(dim=0).tolist() == pytest.approx([1, 0], abs=0.1)
    assert weights[~first].mean(dim=0).tolist() == pytest.approx([0, 1], abs=0.1)


def test_where_one_memory_is_missing_the_other_is_trusted():
    (train, _), (test, first) = planted(), planted(seed=1)
    base = KnnMixture(interpolation_weight=0.3, temperature=1.0, k=4)
    mixture = fit_gate(train, (base, base))
    missing, other = test.evidence.memories
    missing = missing._replace(present=torch.zeros_like(missing.present))
    evidence = test.evidence._replace(memories=(missing, other))
    weights = mixture.mix(evidence).weights
    assert (weights[:, 0] == 0).all()
    mixed = mixture.target_log_probs(test.lm_log_probs, test.targets, evidence)
    assert mixed.isfinite().all()
    assert float(mixed[~first].mean()) > float(test.lm_log_probs.mean()) + 1


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A language model, a datastore, another one and a cache, and a gate over them."""
    lm = lm_of("llama")
    folder = tmp_path_factory.mktemp("gate")
    memories = [store(lm, TEXTS[:2], folder / "one"), store(lm, TEXTS[2:], folder / "other"), Cache(40)]
    members = (
        KnnMixture(interpolation_weight=0.4, temperature=10.0, k=9),
        KnnMixture(interpolation_weight=0.2, temperature=20.0, k=5),
        CacheMixture(interpolation_weight=0.3, scale=0.1, forgetting=0.05, length=30),
    )
    found = [item.lookup(np.zeros((2, item.width), np.float32), 5) for item in memories[:2]]
    recalled = Cache(40).recall(torch.zeros(2, 3), torch.zeros(2).long())
    return lm, memories, gate(members, Evidence((*found, recalled), belief(torch.zeros(2, 5))), size=0.2)


def test_weights_and_sources_of_every_memory_are_reported(several):
    lm, memories, mixture = several
    text = "the cat was in the box and the cat was in the box"
    explanation = explain(lm, text, memories, mixture, sources=40)
    result = evaluate(lm, documents([text]), memories, mixture, show_progress=False)
    tokens = explanation.tokens
    assert "".join(token.text for token in tokens) == text
    np.testing.assert_allclose([np.log(token.mixture) for token in tokens], result.log_probs[:-1], atol=1e-4)
    assert len({token.weights for token in tokens}) > 5
    for place, token in enumerate(tokens):
        assert len(token.weights) == 3
        assert token.weight == pytest.approx(sum(token.weights), abs=1e-6)
        assert min(token.weights[:2]) > 0
        assert (token.weights[2] > 0) == (place > 0), "the first token has no past"
        expected = token.weight * token.memory + (1 - token.weight) * token.lm
        assert token.mixture == pytest.approx(expected, rel=1e-3)
        shares = {name: 0.0 for name in ("document 0", "document 1", "this text")}
        for source in token.sources:
            shares[source.document] += source.share
        assert sum(shares.values()) == pytest.approx(1, abs=0.02)
        assert shares["this text"] * token.weight == pytest.approx(token.weights[2], abs=0.02)
    named = {source.document for token in tokens for source in token.sources}
    assert named == {"document 0", "document 1", "this text"}
    texts = [token.text for token in tokens]
    past = [("".join(texts[:place])[-60:], text) for place, text in enumerate(texts)]
    for place, token in enumerate(tokens):
        read = {(source.before, source.token) for source in token.sources if source.document == "this text"}
        assert read <= set(past[:place])
        assert past[place - 1] in read or not place, "the most recent one weighs something"
    agreeing = tokens[-1].support
    assert agreeing["this text"] > 0
    assert explanation.settings["mixture"] == mixture.describe()
    assert "the last 40 tokens" in str(explanation.settings["memory"])


def test_memories_are_told_apart(several):
    """The order matters: each member shares out the neighbors of its own memory."""
    lm, memories, mixture = several
    ids = ids_of(TEXTS[0])
    with torch.no_grad():
        with attach(lm.model, memories, mixture):
            mixed = lm.model(ids).logits
        with attach(lm.model, [memories[1], memories[0], memories[2]], mixture):
            assert not torch.allclose(lm.model(ids).logits, mixed, atol=1e-2)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_another_number_of_memories_is_refused(several, number):
    lm, memories, mixture = several
    given = [*memories, Cache(5)][:number]
    with pytest.raises(ConfigError, match=f"for 3 memories, {number} are given"):
        evaluate(lm, documents(TEXTS), given, mixture, show_progress=False)
    with pytest.raises(ConfigError, match=f"for 3 memories, {number} are given"):
        explain(lm, TEXTS[0], given, mixture)
    with pytest.raises(ModelError, match=f"for 3 memories, {number} are given"), attach(lm.model, given, mixture):
        pass


def test_what_is_no_memory_is_refused(several):
    lm, _, mixture = several
    for wrong, said in ((["memory"] * 3, "expected a Datastore, a Cache"), ([], "no memory in the list")):
        with pytest.raises(ConfigError, match=said):
            evaluate(lm, documents(TEXTS), wrong, mixture, show_progress=False)


def test_members_that_do_not_fit_are_refused(several):
    _, _, mixture = several
    for members in (mixture.members[:2], (*mixture.members[:2], mixture)):
        with pytest.raises(ConfigError, match="needs a member for each"):
            GateMixture(members=members, network=mixture.network)
    with pytest.raises(ConfigError, match="beliefs=True"):
        mixture.log_probs(torch.zeros(1, 3), Evidence(tuple(three_empty())))


def three_empty():
    datastore = memory(torch.zeros(1, 9).long(), torch.zeros(1, 9))
    return [datastore, datastore.nearest(5), Cache(30).recall(torch.zeros(1, 2), torch.zeros(1).long())]

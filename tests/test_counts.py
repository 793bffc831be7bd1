"""Neighbors that stand for several entries: every mixture treats them as so many neighbors at the same place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlm import KnnMixture, ops
from memlm.evidence import Belief, Evidence, Found, OutputEmbedding, join
from memlm.mixtures import (
    AdapterMixture,
    BucketMixture,
    ExponentialMixture,
    LogisticMixture,
    SpalmMixture,
    SteeredMixture,
    TrimeMixture,
)
from memlm.mixtures._features import names
from memlm.mixtures._fit_adapter import condense
from memlm.mixtures._fit_spalm import fit_spalm
from memlm.mixtures._fit_trime import log_likelihood
from memlm.mixtures._heldout import memory_probabilities
from memlm.mixtures._network import Network
from planted import held_out

VOCABULARY, WIDTH, K, N = 9, 5, 4, 30
COUNTS = torch.tensor([1, 3, 2, 5])
EACH = int(COUNTS.sum())


def found(seed=0, n=N):
    """Neighbors that count, and the same ones, each as often as it counts; a few rows have none."""
    generator = torch.Generator().manual_seed(seed)
    distances = (8 * torch.rand(n, K, generator=generator)).sort(dim=1).values
    tokens = torch.randint(VOCABULARY, (n, K), generator=generator)
    present = (torch.rand(n, 1, generator=generator) < 0.8).expand(n, K).clone()
    entries = torch.arange(K).expand(n, K)
    counted = Found(distances, tokens, present, entries, log_counts=COUNTS.float().log().expand(n, K))
    repeated = counted._replace(log_counts=None).each(lambda part: part.repeat_interleave(COUNTS, dim=1))
    return counted, repeated


def asked(memory, seed=0):
    """Log p_LM and evidence of a model with that memory."""
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(len(memory.tokens), WIDTH, generator=generator)
    layer = OutputEmbedding(torch.randn(VOCABULARY, WIDTH, generator=generator))
    logits = layer.logits(hidden)
    belief = Belief.from_logits(logits, hidden, torch.zeros(len(hidden)).long())._replace(hidden=hidden)
    return logits.log_softmax(dim=1), Evidence((memory,), belief, layer)


def silent(outputs, k):
    """A network that says zero of everything: neighbors that are counted have other features than repeated ones."""
    inputs = len(names(k))
    return Network(torch.zeros(inputs), torch.ones(inputs), [(torch.zeros(outputs, inputs), torch.zeros(outputs))])


def settled(k):
    return AdapterMixture(interpolation_weight=0.4, temperature=2.0, k=k, network=silent(3, k))


MIXTURES = {
    "knn": lambda k: KnnMixture(interpolation_weight=0.4, temperature=2.0, k=k),
    "buckets": lambda k: BucketMixture(edges=(2.0,), bucket_weights=(0.6, 0.2), temperature=2.0, k=k),
    "exponential": lambda k: ExponentialMixture(scale=0.9, length=4.0, temperature=2.0, k=k),
    "logistic": lambda k: LogisticMixture(scale=0.9, center=3.0, length=2.0, temperature=2.0, k=k),
    "adapter": settled,
    "trime": lambda k: TrimeMixture(temperature=2.0, k=k, interpolation_weight=0.3, interpolation_temperature=3.0),
    "spalm": lambda k: SpalmMixture(gate=torch.ones(1, WIDTH), gate_bias=torch.zeros(1), size=1.5, k=k),
    "steered": lambda k: SteeredMixture(interpolation_weight=0.4, temperature=2.0, network=silent(1, k), k=k),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_neighbor_that_counts_three_is_three_neighbors(kind):
    counted, repeated = found()
    lm, evidence = asked(counted)
    mixed = MIXTURES[kind](K).log_probs(lm, evidence)
    torch.testing.assert_close(mixed, MIXTURES[kind](EACH).log_probs(lm, asked(repeated)[1]), rtol=1e-4, atol=1e-4)
    without = MIXTURES[kind](K).log_probs(lm, asked(counted._replace(log_counts=None))[1])
    assert not torch.allclose(mixed, without, atol=1e-2)  # the test can fail
    some = counted.present.any(dim=1)
    assert not some.all()
    assert mixed[~some].equal(without[~some])
    targets = torch.randint(VOCABULARY, (N,), generator=torch.Generator().manual_seed(5))
    one = MIXTURES[kind](K).target_log_probs(lm.gather(1, targets[:, None])[:, 0], targets, evidence)
    torch.testing.assert_close(one, mixed.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-4)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 99), st.floats(0.01, 100), st.booleans())
def test_shares_are_those_of_numpy_in_float64(n, k, seed, temperature, gaps):
    generator = np.random.default_rng(seed)
    distances = generator.exponential(10, size=(n, k)).astype(np.float32)
    counts = generator.integers(1, 1000, size=(n, k))
    present = generator.random((n, k)) < (0.7 if gaps else 1.1)
    scores = np.where(present, np.log(counts) - distances.astype(np.float64) / temperature, -np.inf)
    total = np.logaddexp.reduce(scores, axis=1, keepdims=True)
    expected = np.where(present.any(axis=1, keepdims=True), scores - np.where(np.isfinite(total), total, 0), -np.inf)
    log_counts = torch.from_numpy(np.log(counts, dtype=np.float32))
    weights = ops.knn_log_weights(
        torch.from_numpy(distances), torch.from_numpy(present), temperature=temperature, log_counts=log_counts
    )
    np.testing.assert_allclose(weights.double().exp(), np.exp(expected), rtol=1e-4, atol=1e-6)


def test_what_settings_are_fitted_to_counts_alike():
    counted, repeated = found(3)
    targets = torch.randint(VOCABULARY, (N,), generator=torch.Generator().manual_seed(7))
    one, other = (memory_probabilities(item, targets, [item.tokens.shape[1]], 2.0) for item in (counted, repeated))
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, memory_probabilities(counted._replace(log_counts=None), targets, [K], 2.0))

    held = []
    for memory in (counted, repeated):
        lm, evidence = asked(memory)
        right = lm.gather(1, targets[:, None])[:, 0]
        held.append(held_out(targets, right, evidence.memories, evidence.belief))
    temperatures = {"temperature": torch.tensor(2.0), "interpolation_weight": torch.tensor(0.3)}
    one, other = (log_likelihood(item, **temperatures, interpolation_temperature=3.0) for item in held)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)

    rows = torch.arange(N)[counted.present.any(dim=1)]
    sharpness, tail = torch.full((len(rows),), 1.3), torch.full((len(rows),), 0.4)
    one, other = (condense(item, 2.0, k).ratio(sharpness, tail, rows) for item, k in zip(held, (K, EACH), strict=True))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_gate_over_states_is_fitted_with_counts():
    """Four neighbors count for the eleven they stand for: the size of m is fitted to what they say together."""
    counted, _ = found(1, n=200)
    targets = counted.tokens[:, 3]  # the one that counts most is right
    fitted = {}
    for name, memory in {"counted": counted, "not": counted._replace(log_counts=None)}.items():
        lm, evidence = asked(memory)
        held = held_out(targets, lm.gather(1, targets[:, None])[:, 0], evidence.memories, evidence.belief)
        held = type(held)(held.targets, held.lm_log_probs, evidence, held.groups)
        fitted[name] = float(
            held.log_probs(fit_spalm(held, KnnMixture(interpolation_weight=0.3, temperature=2.0, k=K))).mean()
        )
    assert fitted["counted"] > fitted["not"] + 0.02


def test_counts_stay_with_their_neighbors():
    counted, _ = found()
    wanted = torch.tensor([True, False] * 20)[: N + 10]
    among = counted.each(lambda part: part[: int(wanted.sum())]).among(wanted)
    assert among.log_counts is not None
    assert among.log_counts[wanted].equal(counted.log_counts[: int(wanted.sum())])
    assert counted.nearest(2).log_counts.tolist() == counted.log_counts[:, :2].tolist()
    parts = [Evidence((counted,)), Evidence((counted,))]
    assert join(parts).memories[0].log_counts.shape == (2 * N, K)
    with pytest.raises(AssertionError, match="a column would be lost"):
        join([Evidence((counted,)), Evidence((counted._replace(log_counts=None),))])


def pairs_of(near):
    rows, others = np.nonzero(near)
    return torch.from_numpy(rows), torch.from_numpy(others)


@given(st.integers(0, 12), st.integers(0, 999), st.floats(0, 1))
def test_greedy_merging_is_that_of_the_paper(n, seed, share):
    """The paper's loop with weights s: where both are 1 still, the neighbor's goes to the entry that is visited."""
    generator = np.random.default_rng(seed)
    near = generator.random((n, n)) < share
    order = generator.permutation(n)
    weights, into = np.ones(n), np.arange(n)
    for entry in order:
        if weights[entry] == 0:
            continue
        for other in np.flatnonzero(near[entry]):
            if other != entry and weights[other] == 1:
                weights[entry] += 1
                weights[other], into[other] = 0, entry
    owners = ops.greedy_merging(torch.from_numpy(order), *pairs_of(near)).numpy()
    assert owners.tolist() == into.tolist()
    assert np.bincount(owners, minlength=n).tolist() == weights.tolist()
    assert (owners[owners] == owners).all()
    assert all(near[owner, entry] for entry, owner in enumerate(owners) if owner != entry)


def test_log_one_is_no_weight():
    distances = torch.tensor([[1.0, 2.0]])
    assert ops.knn_log_weights(distances, log_counts=torch.zeros(1, 2)).equal(ops.knn_log_weights(distances))
    double = ops.knn_log_weights(torch.zeros(1, 2), log_counts=torch.tensor([[math.log(3), 0.0]]))
    torch.testing.assert_close(double.exp(), torch.tensor([[0.75, 0.25]]))

"""Every mixture looks at its own k neighbors: what else was found changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memlm import KnnMixture
from memlm.cache import Cache
from memlm.evidence import Evidence
from memlm.mixtures import (
    BucketMixture,
    CacheMixture,
    ExponentialMixture,
    LogisticMixture,
    SharedCacheMixture,
    TrimeMixture,
    memory_likelihoods,
)
from planted import KEY_WIDTH, belief, memory, rising
from test_adapter import adapter
from test_gate import gate
from test_learned import learned
from test_mixtures import VOCABULARY

N, WIDE, K = 30, 20, 7
SHARED = {"temperature": 2.0, "k": K}
CURVES = (
    KnnMixture(interpolation_weight=0.3, **SHARED),
    BucketMixture(edges=(3.0,), bucket_weights=(0.9, 0.1), **SHARED),
    ExponentialMixture(scale=0.8, length=9.0, **SHARED),
    LogisticMixture(scale=0.8, center=6.0, length=2.0, **SHARED),
    learned(k=K),
    adapter(k=K),
)
PAST = {"scale": 0.5, "forgetting": 0.1, "length": K}
CACHES = (CacheMixture(interpolation_weight=0.3, **PAST), SharedCacheMixture(bias=-1.0, **PAST))
ONE = {mixture.kind: mixture for mixture in (*CURVES, *CACHES)}


def wide():
    """Return a model's log probabilities, and what a datastore and a cache found, many neighbors each.

    Of some targets only those beyond the first k are there, and the rest must then be the model's.
    """
    generator = torch.Generator().manual_seed(0)
    lm = torch.randn(N, VOCABULARY, generator=generator).log_softmax(dim=1)
    tokens = torch.randint(VOCABULARY, (N, WIDE), generator=generator)
    found = memory(tokens, rising(5 * torch.rand(N, generator=generator), WIDE, generator))
    late = (torch.arange(WIDE) >= K) | (torch.arange(N) % 3 > 0)[:, None]
    past = Cache(WIDE).recall(torch.randn(N, KEY_WIDTH, generator=generator), tokens[:, 0])
    memories = [part._replace(present=part.present & late) for part in (found, past)]
    return lm, Evidence(tuple(memories), belief(lm))


def check(mixture, lm, evidence):
    cut = evidence.nearest(mixture.ks)
    said, expected = mixture.mix(evidence), mixture.mix(cut)
    assert said.weights.equal(expected.weights)
    assert all(one.equal(other) for one, other in zip(said.log_shares, expected.log_shares, strict=True))
    assert mixture.log_probs(lm, evidence).equal(mixture.log_probs(lm, cut))
    targets = torch.arange(N) % VOCABULARY
    likelihoods = memory_likelihoods(said.log_shares, evidence, targets)
    assert likelihoods.equal(memory_likelihoods(said.log_shares, cut, targets))
    assert 0 < float((said.weights > 0).float().mean()) < 1


@pytest.mark.parametrize("kind", ONE)
def test_what_was_found_beyond_k_changes_nothing(kind):
    lm, evidence = wide()
    one = evidence._replace(memories=(evidence.memories[ONE[kind] in CACHES],))
    check(ONE[kind], lm, one)


def test_nor_does_it_under_a_gate_and_in_one_softmax():
    lm, evidence = wide()
    check(gate((CURVES[0], CACHES[0]), evidence.nearest((K, K))), lm, evidence)
    products = evidence.memories[0]._replace(distances=-evidence.memories[0].distances.flip(1))
    trime = TrimeMixture(temperature=0.6, forgetting=0.02, length=K, k=K, interpolation_weight=0.3)
    check(trime, lm, evidence._replace(memories=(products, evidence.memories[1])))
    shorter = dataclasses.replace(trime, interpolation_weight=0.0)
    check(shorter, lm, evidence._replace(memories=(products, evidence.memories[1])))

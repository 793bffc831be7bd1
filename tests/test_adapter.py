"""kNN-Adapter: its equation against NumPy, its mixture as a distribution, its fit on data whose λ is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm import KnnMixture, ops
from memlm.errors import ConfigError
from memlm.evidence import Evidence, Found
from memlm.mixtures import AdapterMixture, fit
from memlm.mixtures._adapter import corrections
from memlm.mixtures._features import features, names
from memlm.mixtures._fit_adapter import condense
from memlm.mixtures._network import Network
from planted import belief, held_out, indifferent, memory, network, rising, shuffled_weights
from test_mixtures import VOCABULARY, evidence, rows, temperatures

K = 9


def adapter(temperature=2.0, k=K, seed=0, weight=0.4):
    return AdapterMixture(
        temperature=temperature, k=k, interpolation_weight=weight, network=network(len(names(k)), 3, seed)
    )


def with_belief(case):
    return evidence(*case[1:])._replace(belief=belief(case[0]))


@given(rows(), temperatures, st.integers(0, 100))
def test_shares_are_their_equation(case, temperature, seed):
    _, distances, _, present = case
    generator = np.random.default_rng(seed)
    sharpness, tail = generator.uniform(0, 3, len(distances)), generator.uniform(-2, 3, len(distances))
    parts = torch.from_numpy(sharpness).float(), torch.from_numpy(tail).float()
    found = ops.adapted_log_weights(distances, present, temperature, *parts).double().numpy()
    for row, here in enumerate(present.numpy()):
        assert (found[row][~here] == -np.inf).all()
        if here.any():
            beyond = distances[row].double().numpy()[here]
            beyond = (beyond - beyond.min()) / temperature
            scores = -sharpness[row] * beyond - tail[row] * np.log1p(beyond)
            np.testing.assert_allclose(found[row][here], scores - np.logaddexp.reduce(scores), rtol=1e-4, atol=1e-5)


def test_shares_are_numbers_at_the_smallest_temperature():
    distances, ones = torch.tensor([[0.0, 1e3, 1e9]]), torch.ones(1, 3, dtype=torch.bool)
    found = ops.adapted_log_weights(distances, ones, 1e-30, torch.tensor([50.0]), torch.tensor([-8.0]))
    assert found.exp().tolist() == [[1.0, 0.0, 0.0]]


@settings(max_examples=25)
@given(rows(), temperatures, st.integers(0, 5))
def test_it_is_a_distribution(case, temperature, seed):
    lm, mixture, asked = case[0], adapter(temperature, seed=seed), with_belief(case)
    mixed = mixture.log_probs(lm, asked)
    np.testing.assert_allclose(mixed.double().exp().sum(dim=1), 1, atol=1e-5)
    for target in range(VOCABULARY):
        one = mixture.target_log_probs(lm[:, target], torch.full((len(lm),), target), asked)
        np.testing.assert_allclose(one.exp(), mixed[:, target].exp(), rtol=1e-4, atol=1e-6)
    alone = ~case[3].any(dim=1)
    assert mixed[alone].equal(lm[alone])
    assert bool((mixture.weights(asked)[~alone] > 0).all())


@settings(max_examples=25)
@given(rows(), st.integers(0, 5), st.sampled_from([0.0, 3.0, math.inf]))
def test_order_and_absent_places_change_nothing(case, seed, distance):
    lm, distances, tokens, present = case
    mixture, expected = adapter(seed=seed), adapter(seed=seed).log_probs(lm, with_belief(case)).exp()
    order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(seed))
    permuted = with_belief((lm, *(part[:, order] for part in case[1:])))
    np.testing.assert_allclose(mixture.log_probs(lm, permuted).exp(), expected, atol=1e-5)
    other = with_belief((lm, distances.where(present, distance), tokens.where(present, 1), present))
    np.testing.assert_allclose(mixture.log_probs(lm, other).exp(), expected, atol=1e-6)


@settings(max_examples=25)
@given(rows(), temperatures, st.floats(0.01, 0.99))
def test_a_network_that_says_nothing_is_knn_lm(case, temperature, weight):
    shared = {"temperature": temperature, "k": K, "interpolation_weight": weight}
    silent = Network.new(torch.randn(5, len(names(K))), (32, 24, 3))
    mixed = AdapterMixture(network=silent, **shared).log_probs(case[0], with_belief(case))
    np.testing.assert_allclose(mixed.exp(), KnnMixture(**shared).log_probs(case[0], with_belief(case)).exp(), atol=1e-5)


def planted(n=3000, k=8, seed=0):
    """Near neighbors are right: the nearest alone where the model is sure, and all others where it is not."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(50, (n,), generator=generator)
    first = 2 + 28 * torch.rand(n, generator=generator)
    right = torch.rand(n, generator=generator) < 0.9 * torch.exp(-first / 8)
    sure = torch.rand(n, generator=generator) < 0.5
    nearest, others = torch.where(right & sure, 0, 1), torch.where(right & ~sure, 0, 2)
    away = torch.cat([nearest[:, None], others[:, None].repeat(1, k - 1)], dim=1)  # from the target
    thinks = indifferent(n)._replace(confidence=torch.where(sure, 0.9, 0.1).log())
    found = memory((targets[:, None] + away) % 50, rising(first, k, generator))
    return held_out(targets, torch.where(right, 0.05, 0.5).log(), [found], thinks), sure


def test_it_beats_the_best_fixed_weight_and_its_gain_goes_when_weights_are_shuffled():
    (train, _), (test, sure) = planted(), planted(seed=1)
    best = fit("knn", train, KnnMixture(interpolation_weight=0.3, temperature=1.0, k=8))
    fixed = float(test.log_probs(best).mean())
    mixture = fit("adapter", train, best)
    gain = float(test.log_probs(mixture).mean()) - fixed
    assert gain > 0.1
    found, (shares,) = test.evidence.memories[0], mixture.mix(test.evidence).log_shares
    log_probs = ops.knn_target_log_probs(shares, found.tokens, test.targets)
    assert shuffled_weights(test, mixture, log_probs) - fixed < 0.1 * gain
    of_nearest = shares[:, 0].exp()
    assert float(of_nearest[sure].median()) > 0.8 > 0.2 > float(of_nearest[~sure].median())


def test_targets_without_neighbors_are_left_out_of_the_fit():
    train, _ = planted(400)
    found = train.evidence.memories[0]
    found = found._replace(present=found.present & (torch.arange(400) % 2 == 0)[:, None])
    half = held_out(train.targets, train.lm_log_probs, [found], train.evidence.belief)
    base, odd = KnnMixture(interpolation_weight=0.3, temperature=1.0, k=8), torch.arange(400) % 2 == 1
    mixture, of_others = fit("adapter", half, base), fit("adapter", half.rows(~odd.numpy()), base)
    for name, tensor in mixture.network.tensors().items():
        assert tensor.equal(of_others.network.tensors()[name]), name
    assert half.log_probs(mixture)[odd].equal(train.lm_log_probs[odd].double())
    assert math.isfinite(float(half.log_probs(mixture).mean()))


@pytest.mark.parametrize(("k", "error"), [(12, 1e-5), (300, 0.02)])
def test_neighbors_in_groups_have_about_the_likelihood_that_they_have_alone(k, error):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (200,), generator=generator)
    distances = 20 + (40 * torch.rand(200, k, generator=generator)).sort(dim=1).values
    present = torch.arange(k) < torch.randint(1, k + 1, (200, 1), generator=generator)
    tokens = torch.randint(4, (200, k), generator=generator)
    found = Found(distances, tokens, present, torch.zeros_like(tokens))
    held = held_out(targets, torch.full((200,), 0.1).log(), [found], indifferent(200, 4))
    for said in ([0.5, 0.3, 0.0], [-1.0, -1.0, 1.5], [0.0, -4.0, -0.5]):
        silent = Network.new(torch.zeros(2, len(names(k))), (3,)).with_last_bias(torch.tensor(said))
        mixture = AdapterMixture(temperature=10.0, k=k, interpolation_weight=0.5, network=silent)
        weight, sharpness, tail = corrections(torch.tensor([said] * 200), 0.5)
        ratio = condense(held, 10.0, k).ratio(sharpness, tail, torch.arange(200))
        mixed = torch.logaddexp(ratio + weight.log(), held.lm_log_probs + torch.log1p(-weight))
        assert float((mixed - held.log_probs(mixture)).abs().max()) < error


@pytest.mark.parametrize("k", [1, 2, 3, 64, 100, 1000])
def test_features_are_finite_and_as_many_as_their_names(k):
    generator = torch.Generator().manual_seed(k)
    present = torch.arange(k) < torch.tensor([[0], [1], [k // 2], [k]])
    distances = (50 * torch.rand(4, k, generator=generator)).sort(dim=1).values.masked_fill(~present, torch.inf)
    tokens = torch.randint(30, (4, k), generator=generator)
    found = Found(distances, tokens, present, torch.zeros_like(tokens))
    columns = features(found, belief(torch.randn(4, 30, generator=generator)), 10.0, k)
    assert columns.shape == (4, len(names(k)))
    assert columns.isfinite().all()
    told = dict(zip(names(k), columns.T.tolist(), strict=True))
    assert told["neighbors"] == pytest.approx([math.log(1 + number) for number in (0, 1, k // 2, k)])
    assert told["distance at rank 1"][1:] == pytest.approx((distances[1:, 0] / 10).where(present[1:, 0], 0).tolist())
    for rank in (2, 64):
        if rank <= k:
            distinct = len(set(tokens[3, :rank].tolist()))
            assert told[f"distinct values up to rank {rank}"][3] == pytest.approx(math.log(distinct))
    narrow = features(found.nearest(max(1, k // 2)), belief(torch.zeros(4, 30)), 10.0, k)
    assert narrow.shape == columns.shape, "a row may have fewer neighbors than were asked for"


def test_features_of_the_model_are_its_own():
    lm = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]]).log()
    found = Found(
        torch.tensor([[1.0, 1.0]] * 2), torch.tensor([[0, 2]] * 2), torch.ones(2, 2).bool(), torch.zeros(2, 2)
    )
    told = dict(zip(names(2), features(found, belief(lm), 1.0, 2).T.tolist(), strict=True))
    assert told["confidence"] == pytest.approx([math.log(0.7), math.log(0.5)])
    assert told["entropy of p_LM"] == pytest.approx([0.8018, math.log(2)], abs=1e-3)
    assert told["p_kNN of the model's choice"] == pytest.approx([0.5, 0.0])
    assert told["agreement"] == pytest.approx([0.2, 0.5])


@pytest.mark.parametrize("k", [1, 16, 1024])
def test_the_network_has_a_thousand_to_twenty_thousand_parameters(k):
    n = 40
    targets = torch.zeros(n).long()
    found = memory(torch.zeros(n, k).long(), torch.rand(n, k).sort(dim=1).values)
    held = held_out(targets, torch.full((n,), -1.0), [found], indifferent(n))
    mixture = fit("adapter", held, KnnMixture(interpolation_weight=0.3, temperature=1.0, k=k))
    assert 1_000 <= mixture.network.parameters <= 20_000
    assert f"{mixture.network.parameters:,} parameters" in mixture.describe()


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapter(weight=0.0),
        lambda: adapter(weight=1.0),
        lambda: AdapterMixture(temperature=1.0, k=K, interpolation_weight=0.5, network=network(len(names(K)), 2)),
        lambda: AdapterMixture(temperature=1.0, k=64, interpolation_weight=0.5, network=network(len(names(K)), 3)),
    ],
)
def test_settings_that_cannot_work_are_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()


def test_without_beliefs_it_says_what_is_missing():
    asked = Evidence((Found.nothing(1, K),))
    with pytest.raises(ConfigError, match="beliefs=True"):
        adapter().log_probs(torch.zeros(1, 3), asked)

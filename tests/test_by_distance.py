"""λ by distance: the curves against NumPy, their fits on data whose λ is known, and every kind as a distribution."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlm import KnnMixture, ops
from memlm.errors import ConfigError
from memlm.mixtures import (
    BucketMixture,
    ExponentialMixture,
    HeldOut,
    LogisticMixture,
    best_weight,
    choose,
    fit,
    load_mixture,
)
from memlm.mixtures._families import CURVES
from memlm.mixtures._fit import choose_buckets, fit_buckets, fit_exponential, fit_logistic, gain
from test_mixtures import VOCABULARY, evidence, rows, temperatures

KINDS = {
    "buckets": BucketMixture(edges=(3.0, 8.0), bucket_weights=(0.9, 0.5, 0.1), temperature=2.0, k=9),
    "exponential": ExponentialMixture(scale=1.7, length=6.0, temperature=2.0, k=9),
    "logistic": LogisticMixture(scale=0.9, center=6.0, length=2.0, temperature=2.0, k=9),
}


def test_curves_are_their_equations():
    d = np.random.default_rng(0).uniform(0, 30, 500).astype(np.float32)
    tensor = torch.from_numpy(d)
    exact = d.astype(np.float64)
    np.testing.assert_allclose(
        ops.exponential_weight(tensor, 1.7, 6.0), np.minimum(1.7 * np.exp(-exact / 6), 1 - 1e-4), rtol=1e-5
    )
    np.testing.assert_allclose(
        ops.logistic_weight(tensor, 0.9, 6.0, 2.0), 0.9 / (1 + np.exp(-(6 - exact) / 2)), rtol=1e-4
    )
    expected = np.select([exact <= 3, exact <= 8], [0.9, 0.5], 0.1)
    found = ops.bucket_weight(tensor, torch.tensor([3.0, 8.0]), torch.tensor([0.9, 0.5, 0.1]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(case=rows(), temperature=temperatures)
def test_every_kind_is_a_distribution(kind, case, temperature):
    mixture = dataclasses.replace(KINDS[kind], temperature=temperature)
    lm, distances, tokens, present = case
    mixed = mixture.log_probs(case[0], evidence(*case[1:]))
    np.testing.assert_allclose(mixed.double().exp().sum(dim=1), 1, atol=1e-5)
    alone = ~present.any(dim=1)
    np.testing.assert_allclose(mixed[alone], lm[alone], atol=1e-6)
    for target in range(VOCABULARY):
        one = mixture.target_log_probs(lm[:, target], torch.full((len(lm),), target), evidence(*case[1:]))
        np.testing.assert_allclose(one.exp(), mixed[:, target].exp(), rtol=1e-4, atol=1e-6)
    order = torch.randperm(tokens.shape[1])
    permuted = mixture.log_probs(lm, evidence(distances[:, order], tokens[:, order], present[:, order]))
    np.testing.assert_allclose(permuted.exp(), mixed.exp(), atol=1e-5)


@given(rows(), st.sampled_from([0.0, 1e-7]))
def test_a_weight_that_vanishes_leaves_the_model(case, weight):
    vanishing = [
        BucketMixture(edges=(), bucket_weights=(weight,), temperature=2.0, k=9),
        ExponentialMixture(scale=1e-7, length=5.0, temperature=2.0, k=9),
        LogisticMixture(scale=1e-7, center=5.0, length=5.0, temperature=2.0, k=9),
    ]
    for mixture in vanishing:
        np.testing.assert_allclose(mixture.log_probs(case[0], evidence(*case[1:])).exp(), case[0].exp(), atol=1e-5)


def drawn(curve, n=20_000, seed=0):
    """Ratios of targets of which the memory is right with probability curve(d), and else the model."""
    generator = np.random.default_rng(seed)
    distances = generator.uniform(2, 30, n)
    from_memory = generator.random(n) < curve(distances)
    # under the truth, p = λ p_kNN + (1 − λ) p_LM; two tokens, one favored by each side
    knn, lm = np.where(from_memory, 0.95, 0.05), np.where(from_memory, 0.05, 0.95)
    flip = generator.random(n) < 0.05
    knn, lm = np.where(flip, 1 - knn, knn), np.where(flip, 1 - lm, lm)
    return torch.from_numpy(knn / lm), torch.from_numpy(distances).float()


def test_fits_find_the_curve_that_made_the_data():
    ratio, distances = drawn(lambda d: 0.9 * np.exp(-d / 8))
    scale, length = fit_exponential(ratio, distances)
    assert (scale, length) == (pytest.approx(0.9, rel=0.1), pytest.approx(8, rel=0.1))
    ratio, distances = drawn(lambda d: 0.8 / (1 + np.exp(-(12 - d) / 2)))
    scale, center, length = fit_logistic(ratio, distances)
    assert (scale, center, length) == (
        pytest.approx(0.8, rel=0.05),
        pytest.approx(12, rel=0.05),
        pytest.approx(2, rel=0.2),
    )
    edges, weights = fit_buckets(ratio, distances, 8)
    assert len(edges) == 7
    assert max(abs(np.diff(np.bincount(torch.bucketize(distances, torch.tensor(edges)).numpy())))) <= 2
    assert weights[0] == pytest.approx(0.8, abs=0.05)
    assert weights[-1] < 0.02
    groups = np.arange(len(ratio)) // 500
    assert choose_buckets(ratio, distances, groups) > 4
    constant, distances = drawn(lambda d: np.full_like(d, 0.4))
    assert choose_buckets(constant, distances, groups) <= 4  # more would fit noise


BEST = KnnMixture(interpolation_weight=0.3, temperature=5.0, k=4)


def retrieved(n=4000, k=4, seed=0):
    """A pass in which near neighbors are right and far ones are not."""
    generator = torch.Generator().manual_seed(seed)
    nearest = 2 + 28 * torch.rand(n, 1, generator=generator)
    distances = torch.cat([nearest, nearest + torch.rand(n, k - 1, generator=generator).sort(dim=1).values], dim=1)
    targets = torch.randint(50, (n,), generator=generator)
    right = torch.rand(n, generator=generator) < (0.9 * torch.exp(-nearest[:, 0] / 8))
    tokens = torch.where(right, targets, (targets + 1) % 50)[:, None].repeat(1, k)
    lm = torch.where(right, 0.05, 0.5).log()
    return HeldOut(targets, lm, evidence(distances, tokens, torch.ones(n, k, dtype=torch.bool)), np.arange(n) // 100)


def test_a_pass_is_fitted_and_the_gain_goes_when_weights_are_shuffled():
    train, test = retrieved(), retrieved(seed=1)
    fitted = {kind: fit(kind, train, BEST) for kind in CURVES}
    scores = {kind: float(test.log_probs(mixture).mean()) for kind, mixture in fitted.items()}
    assert min(scores[kind] for kind in ("buckets", "exponential", "logistic")) > scores["knn"] + 0.05
    assert scores["exponential"] >= max(scores.values()) - 0.01
    weights, (shares,) = fitted["exponential"].mix(test.evidence)
    shuffled = weights[torch.randperm(len(weights), generator=torch.Generator().manual_seed(0)), 0]
    memory = ops.knn_target_log_probs(shares, test.evidence.memories[0].tokens, test.targets)
    assert float(ops.interpolate(test.lm_log_probs, memory, shuffled).mean()) < scores["knn"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_saved_and_loaded(kind, tmp_path):
    KINDS[kind].save(tmp_path / "mixture.json")
    assert load_mixture(tmp_path / "mixture.json") == KINDS[kind]


@pytest.mark.parametrize(
    "make",
    [
        lambda: BucketMixture(edges=(2.0, 1.0), bucket_weights=(0.1, 0.2, 0.3), temperature=1.0),
        lambda: BucketMixture(edges=(1.0,), bucket_weights=(0.1,), temperature=1.0),
        lambda: BucketMixture(edges=(1.0,), bucket_weights=(0.1, 1.2), temperature=1.0),
        lambda: ExponentialMixture(scale=0.0, length=1.0, temperature=1.0),
        lambda: ExponentialMixture(scale=1.0, length=-1.0, temperature=1.0),
        lambda: LogisticMixture(scale=1.5, center=1.0, length=1.0, temperature=1.0),
        lambda: LogisticMixture(scale=0.5, center=1.0, length=float("inf"), temperature=1.0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "logistic", "scale": 0.5, "center": float("nan"), "length": 1.0},
        {"kind": "logistic", "scale": 0.5, "center": 1e300, "length": 1.0},
        {"kind": "logistic", "scale": 0.5, "center": 1.0, "length": 1e-50},
        {"kind": "exponential", "scale": 1e39, "length": 1.0},
        {"kind": "exponential", "scale": 10**400, "length": 1.0},
        {"kind": "buckets", "edges": [float("nan")], "bucket_weights": [0.1, 0.2]},
        {"kind": "buckets", "edges": [3.0, 3.0], "bucket_weights": [0.1, 0.2, 0.3]},
        {"kind": "buckets", "edges": [10**30 * 2], "bucket_weights": [0.1, 0.2]},
    ],
)
def test_hostile_numbers_in_a_file_are_refused(values, tmp_path):
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"temperature": 1.0, "k": 8, **values}))
    with pytest.raises(ConfigError, match="expected"):
        load_mixture(path)


def test_deep_nesting_in_a_file_is_refused(tmp_path):
    (tmp_path / "mixture.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        load_mixture(tmp_path / "mixture.json")


@pytest.mark.parametrize("kind", ["exponential", "logistic"])
def test_a_curve_is_never_worse_than_no_curve(kind):
    """Half of what is asked for is stored, at distance 0, the rest is ten million away: no distance is typical."""
    generator = np.random.default_rng(0)
    distances = torch.cat([torch.zeros(500), torch.from_numpy(generator.uniform(0, 1e7, 500)).float()])
    ratio = torch.from_numpy(np.where(generator.random(1000) < 0.5, 8.0, 0.1))
    fitted = {"exponential": fit_exponential, "logistic": fit_logistic}[kind](ratio, distances)
    names = {"exponential": ("scale", "length"), "logistic": ("scale", "center", "length")}[kind]
    mixture = type(KINDS[kind])(temperature=1.0, k=1, **dict(zip(names, fitted, strict=True)))
    found = evidence(distances[:, None], torch.zeros(1000, 1, dtype=torch.long), torch.ones(1000, 1, dtype=torch.bool))
    reached = gain(ratio, mixture.weights(found).double()).mean()
    assert reached >= gain(ratio, best_weight(ratio)).mean() - 1e-6


@pytest.mark.parametrize("number", [40, 1])
def test_the_kind_is_chosen_over_groups_or_over_parts_of_the_only_one(quick_choice, number):
    train = retrieved(2000)
    train = dataclasses.replace(train, groups=np.arange(len(train)) * number // len(train))
    assert choose(train, BEST) in ("exponential", "logistic")

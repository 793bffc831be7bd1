"""kNN-LM as a distribution: what holds for any neighbors, and which settings are refused."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from memlm import KnnMixture
from memlm.errors import ConfigError
from memlm.evidence import Evidence, Found
from memlm.mixtures import load_mixture

VOCABULARY = 11


def evidence(distances, tokens, present):
    """One memory's neighbors, without beliefs."""
    return Evidence((Found(distances, tokens, present, torch.zeros_like(tokens)),))


weights = st.floats(0, 1)
temperatures = st.sampled_from([1e-3, 1.0, 50.0])


@st.composite
def rows(draw, present=None):
    """Draw (lm_log_probs, distances, tokens, present) as tensors."""
    n, k = draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    lm = (3 * torch.randn(n, VOCABULARY, generator=generator)).log_softmax(dim=-1)
    distances = 20 * torch.rand(n, k, generator=generator)
    tokens = torch.randint(VOCABULARY, (n, k), generator=generator)
    share = draw(st.sampled_from([0.0, 0.5, 1.0])) if present is None else present
    return lm, distances, tokens, torch.rand(n, k, generator=generator) < share


def mixture(weight=0.5, temperature=1.0, k=9):
    return KnnMixture(interpolation_weight=weight, temperature=temperature, k=k)


@given(rows(), weights, temperatures)
def test_the_mixture_is_the_equation_and_sums_to_one(case, weight, temperature):
    lm, distances, tokens, present = case
    mixed = mixture(weight, temperature).log_probs(case[0], evidence(*case[1:])).double().exp().numpy()
    np.testing.assert_allclose(mixed.sum(axis=1), 1, atol=1e-5)
    for row in range(len(lm)):
        here = present[row].numpy()
        expected = lm[row].double().exp().numpy()
        if here.any():
            near = distances[row].double().numpy()[here]
            share = np.exp((near.min() - near) / temperature)
            knn = np.zeros(VOCABULARY)
            np.add.at(knn, tokens[row].numpy()[here], share / share.sum())
            expected = weight * knn + (1 - weight) * expected
        np.testing.assert_allclose(mixed[row], expected, rtol=1e-4, atol=1e-7)


@given(rows(), weights, temperatures)
def test_one_token_alone_has_the_probability_that_it_has_in_the_whole(case, weight, temperature):
    lm, *found = case
    whole = mixture(weight, temperature).log_probs(case[0], evidence(*case[1:]))
    for target in range(VOCABULARY):
        targets = torch.full((len(lm),), target)
        one = mixture(weight, temperature).target_log_probs(lm[:, target], targets, evidence(*found))
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, whole[:, target], rtol=1e-5, atol=1e-4)


@given(rows())
def test_weight_zero_is_the_model_to_the_bit(case):
    assert mixture(0.0).log_probs(case[0], evidence(*case[1:])).equal(case[0])


@given(rows(present=0.0), weights)
def test_without_neighbors_the_mixture_is_the_model_to_the_bit(case, weight):
    lm, *found = case
    assert mixture(weight).log_probs(case[0], evidence(*case[1:])).equal(lm)
    assert (
        mixture(weight)
        .target_log_probs(lm[:, 0], torch.zeros(len(lm), dtype=torch.long), evidence(*found))
        .equal(lm[:, 0])
    )


@given(rows(), st.integers(0, 2**32))
def test_permuting_neighbors_changes_nothing(case, seed):
    lm, *found = case
    order = torch.randperm(found[0].shape[1], generator=torch.Generator().manual_seed(seed))
    other = mixture(0.7).log_probs(lm, evidence(*(part[:, order] for part in found)))
    torch.testing.assert_close(mixture(0.7).log_probs(case[0], evidence(*case[1:])), other, rtol=1e-5, atol=1e-5)


@given(rows(), st.integers(0, 10), st.sampled_from([0.0, 3.0, math.inf]))
def test_what_stands_in_absent_places_changes_nothing(case, token, distance):
    lm, distances, tokens, present = case
    assume(not present.all())
    others = distances.where(present, distance), tokens.where(present, token)
    torch.testing.assert_close(
        mixture(0.7).log_probs(lm, evidence(*others, present)), mixture(0.7).log_probs(case[0], evidence(*case[1:]))
    )


@given(rows(present=1.0))
def test_weight_one_is_the_memory_alone(case):
    lm, _, tokens, _ = case
    probabilities = mixture(1.0).log_probs(case[0], evidence(*case[1:])).exp()
    named = torch.zeros_like(lm, dtype=torch.bool).scatter_(1, tokens, True)
    assert bool((probabilities[~named] == 0).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -0.1}, "λ is -0.1; expected a number from 0"),
        ({"weight": 1.1}, "λ is 1.1; expected a number from 0"),
        ({"weight": math.nan}, "λ is nan; expected a number from 0"),
        ({"weight": "0.5"}, "interpolation_weight is '0.5'; expected a number"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
        ({"temperature": -2.0}, "temperature is -2.0; expected a positive number"),
        ({"temperature": math.nan}, "temperature is nan; expected a positive number"),
        ({"temperature": math.inf}, "temperature is inf; expected a positive number"),
        ({"temperature": None}, "temperature is None; expected a number"),
        ({"k": 0}, "k is 0; expected a whole number"),
        ({"k": -1}, "k is -1; expected a whole number"),
        ({"k": 2.5}, "k is 2.5; expected a whole number"),
        ({"k": math.nan}, "k is nan; expected a whole number"),
        ({"k": True}, "k is True; expected a number"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        mixture(**settings)


def test_saved_settings_come_back(tmp_path):
    mixture(0.25, 12.5, 64).save(tmp_path / "mixture.json")
    assert load_mixture(tmp_path / "mixture.json") == mixture(0.25, 12.5, 64)
    assert [item.name for item in tmp_path.iterdir()] == ["mixture.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; `memlm tune"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1]", "is not a saved mixture"),
        ({"kind": "cache"}, "is not a saved mixture"),
        ({"k": "8"}, "k is '8'; expected a number"),
        ({"temperature": None}, "temperature is None; expected a number"),
        ({"surprise": 1}, "is not a saved mixture"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, content, message):
    path = tmp_path / "mixture.json"
    if isinstance(content, dict):
        content = json.dumps({**mixture().to_dict(), **content}).encode()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_mixture(path)


def test_a_folder_in_the_place_of_settings_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_mixture(tmp_path)

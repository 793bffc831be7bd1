"""Equations against a float64 NumPy oracle, and what must hold for any input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlm import ops

VOCABULARY = 7


def oracle(distances, tokens, present, temperature, vocabulary=VOCABULARY):
    """Return p_kNN by the book, float64, (n, vocabulary); zeros in a row without neighbors."""
    p = np.zeros((len(distances), vocabulary))
    for row in range(len(distances)):
        near = distances[row][present[row]].astype(np.float64)
        weights = np.exp(-(near - near.min(initial=np.inf)) / temperature)
        np.add.at(p[row], tokens[row][present[row]], weights / weights.sum())
    return p


@st.composite
def neighbors(draw):
    """Draw (distances, tokens, present, temperature)."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 9)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    distances = generator.exponential(draw(st.sampled_from([1e-3, 1.0, 1e4])), shape).astype(np.float32)
    tokens = generator.integers(0, VOCABULARY, shape)
    present = generator.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return distances, tokens, present, draw(st.sampled_from([1e-3, 0.5, 1.0, 30.0, 1e5]))


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


@given(neighbors())
def test_dense_and_target_agree_with_the_oracle(case):
    distances, tokens, present, temperature = case
    expected = oracle(*case)
    d, t, p = tensors(distances, tokens, present)
    weights = ops.knn_log_weights(d, p, temperature=temperature)
    dense = ops.knn_log_probs(weights, t, VOCABULARY)
    assert dense.dtype == torch.float32
    np.testing.assert_allclose(dense.double().exp().numpy(), expected, rtol=1e-4, atol=1e-6)
    for target in range(VOCABULARY):
        one = ops.knn_target_log_probs(weights, t, torch.full((len(distances),), target))
        torch.testing.assert_close(one, dense[:, target], rtol=1e-5, atol=1e-4)


@given(neighbors())
def test_aggregation_is_the_dense_distribution_without_its_zeros(case):
    distances, tokens, present, temperature = case
    d, t, p = tensors(distances, tokens, present)
    distinct, log_probs = ops.aggregate_by_token(ops.knn_log_weights(d, p, temperature=temperature), t)
    assert distinct.shape == log_probs.shape == t.shape
    rebuilt = np.zeros((len(distances), VOCABULARY))
    for row in range(len(distances)):
        used = distinct[row].unique_consecutive()
        assert used.tolist() == sorted(set(tokens[row]))
        assert distinct[row, : len(used)].equal(used)  # places left over are at the end …
        assert bool((log_probs[row, len(used) :] == -math.inf).all())  # … and say nothing
        rebuilt[row, used] = log_probs[row, : len(used)].double().exp()
    np.testing.assert_allclose(rebuilt, oracle(*case), rtol=1e-4, atol=1e-6)


@given(neighbors(), st.integers(0, 2**32))
def test_the_order_of_neighbors_does_not_matter(case, seed):
    distances, tokens, present, temperature = case
    order = np.random.default_rng(seed).permutation(distances.shape[1])
    one, other = (
        ops.knn_log_probs(ops.knn_log_weights(d, p, temperature=temperature), t, VOCABULARY)
        for d, t, p in (tensors(distances, tokens, present), tensors(*(x[:, order].copy() for x in case[:3])))
    )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_absent_neighbors_are_not_looked_at():
    present = torch.tensor([[True, False, False]])
    for distance, token in ((math.nan, 0), (math.inf, 6), (-5.0, 3)):
        distances = torch.tensor([[2.0, distance, distance]])
        weights = ops.knn_log_weights(distances, present, temperature=1.0)
        assert weights.tolist() == [[0.0, -math.inf, -math.inf]]
        probabilities = ops.knn_log_probs(weights, torch.tensor([[1, token, token]]), VOCABULARY)
        assert probabilities.exp()[0].tolist() == [0, 1, 0, 0, 0, 0, 0]


def test_a_row_without_neighbors_is_minus_infinity_and_not_nan():
    weights = ops.knn_log_weights(torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert weights.tolist() == [[-math.inf] * 3]
    assert ops.knn_target_log_probs(weights, torch.zeros(1, 3, dtype=torch.long), torch.tensor([0])).item() == -math.inf


@pytest.mark.parametrize("temperature", [1e-30, 1e-50, 5e-324])
def test_a_temperature_near_zero_leaves_the_nearest_neighbor(temperature):
    weights = ops.knn_log_weights(torch.tensor([[3.0, 3.0, 4.0]]), temperature=temperature)
    torch.testing.assert_close(weights.exp(), torch.tensor([[0.5, 0.5, 0.0]]))


def test_a_share_below_the_smallest_float_keeps_its_logarithm():
    weights = ops.knn_log_weights(torch.tensor([[0.0, 500.0, 500.0]]), temperature=1.0)
    tokens = torch.tensor([[0, 1, 1]])
    expected = pytest.approx(-500 + math.log(2), abs=1e-3)
    assert ops.knn_target_log_probs(weights, tokens, torch.tensor([1])).item() == expected
    assert ops.knn_log_probs(weights, tokens, 3)[0, 1].item() == expected
    assert ops.aggregate_by_token(weights, tokens)[1][0, 1].item() == expected


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=r"temperature is .*; expected a positive number"):
        ops.knn_log_weights(torch.ones(1, 1), temperature=temperature)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_interpolation_agrees_with_the_oracle(p, q, weight):
    mixed = ops.interpolate(torch.tensor(p).log(), torch.tensor(q).log(), weight).exp().item()
    assert mixed == pytest.approx(weight * q + (1 - weight) * p, rel=1e-5, abs=1e-30)


def test_weight_zero_and_one_are_the_two_sides_exactly():
    lm = torch.tensor([0.1, 0.7, 1.0, 0.0]).log()
    knn = torch.tensor([0.0, 0.4, 0.2, 0.0]).log()
    assert ops.interpolate(lm, knn, 0.0).equal(lm)
    assert ops.interpolate(lm, knn, 1.0).equal(knn)


@given(neighbors(), st.floats(0, 1))
def test_sparse_interpolation_is_dense_interpolation(case, weight):
    distances, tokens, present, temperature = case
    d, t, p = tensors(distances, tokens, present)
    lm = torch.randn(len(d), VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
    before = lm.clone()
    weights = ops.knn_log_weights(d, p, temperature=temperature)
    row_weights = p.any(dim=-1).float() * weight
    sparse = ops.interpolate_sparse(lm, *ops.aggregate_by_token(weights, t), row_weights)
    dense = ops.interpolate(lm, ops.knn_log_probs(weights, t, VOCABULARY), row_weights[:, None])
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-4)
    assert lm.equal(before)  # the model's own numbers are not written over

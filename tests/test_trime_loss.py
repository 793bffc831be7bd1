"""One softmax over vocabulary and memory, against explicit sums in float64; what may be seen, against loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlm import ops
from memlm.errors import ConfigError
from memlm.training import External, Local, LongTerm, Places
from memlm.training._memories import drops, visible

VOCABULARY = 5


def oracle(logits, similarities, allowed, tokens, temperature=1.0):
    """Return P, float64, (n, vocabulary), by adding up every exponential."""
    mass = np.exp(logits.astype(np.float64))
    for row in range(len(mass)):
        for entry in np.flatnonzero(allowed[row]):
            mass[row, tokens[entry]] += math.exp(similarities[row, entry] / temperature)
    return mass / mass.sum(axis=1, keepdims=True)


@st.composite
def cases(draw):
    """Draw (logits, similarities, allowed, tokens, targets); few tokens, so that many entries carry the same."""
    n, m = draw(st.integers(1, 5)), draw(st.integers(0, 7))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.1, 1.0, 8.0]))
    logits, similarities = scale * generator.normal(size=(n, VOCABULARY)), scale * generator.normal(size=(n, m))
    allowed = generator.random((n, m)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return logits, similarities, allowed, generator.integers(0, VOCABULARY, m), generator.integers(0, VOCABULARY, n)


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


@given(cases(), st.sampled_from([0.5, 1.0, 1.25]))
def test_target_and_distribution_agree_with_explicit_sums(case, temperature):
    *inputs, targets = case
    expected = oracle(*inputs, temperature)
    logits, similarities, allowed, tokens, wanted = tensors(*case)
    whole = ops.trime_distribution(logits, similarities, allowed, tokens, temperature)
    np.testing.assert_allclose(whole.exp(), expected, rtol=1e-5)
    np.testing.assert_allclose(whole.exp().sum(dim=1), 1.0, rtol=1e-5)
    one = ops.trime_log_probs(logits, similarities, allowed, tokens, wanted, temperature)
    np.testing.assert_allclose(one, np.log(expected[np.arange(len(targets)), targets]), rtol=1e-9, atol=1e-12)
    single = ops.trime_log_probs(logits.float(), similarities.bfloat16(), allowed, tokens, wanted, temperature)
    assert single.dtype == torch.float32
    exact = ops.trime_log_probs(logits, similarities.bfloat16().double(), allowed, tokens, wanted, temperature)
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


@given(cases())
def test_nothing_to_see_is_cross_entropy_with_the_gradients_of_cross_entropy(case):
    logits, similarities, _, tokens, targets = tensors(*case)
    logits, similarities = logits.float().requires_grad_(), similarities.float().requires_grad_()
    nothing = torch.zeros(similarities.shape, dtype=torch.bool)
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = -ops.trime_log_probs(logits, similarities, nothing, tokens, targets)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    mine = torch.autograd.grad(loss.sum(), [logits, similarities])
    torch.testing.assert_close(mine[0], torch.autograd.grad(plain.sum(), logits)[0])
    assert not mine[1].any()


def test_what_may_not_be_seen_is_not_looked_at():
    allowed, tokens, targets = torch.tensor([[True, False]]), torch.tensor([1, 1]), torch.tensor([1])
    for unseen in (math.inf, math.nan, 1e30):
        similarities = torch.tensor([[0.0, unseen]], requires_grad=True)
        log_prob = ops.trime_log_probs(torch.zeros(1, 3), similarities, allowed, tokens, targets)
        assert log_prob.exp().item() == pytest.approx(2 / 4)
        log_prob.sum().backward()
        assert similarities.grad.tolist() == [[pytest.approx(1 / 2 - 1 / 4), 0.0]]


def test_duplicates_add_up():
    """Three entries of one token weigh like one with three times the exponential."""
    logits, targets = torch.zeros(1, 2), torch.tensor([0])
    three = ops.trime_log_probs(logits, torch.zeros(1, 3), torch.ones(1, 3).bool(), torch.zeros(3).long(), targets)
    one = ops.trime_log_probs(
        logits, torch.full((1, 1), math.log(3)), torch.ones(1, 1).bool(), torch.zeros(1).long(), targets
    )
    assert three.exp().item() == pytest.approx(4 / 5)
    torch.testing.assert_close(three, one)


@pytest.mark.parametrize("part", ["queries", "keys", "logits"])
def test_gradients_are_those_of_finite_differences(part):
    generator = np.random.default_rng(0)
    values = {"queries": (4, 3), "keys": (6, 3), "logits": (4, VOCABULARY)}
    values = {name: generator.normal(size=shape) for name, shape in values.items()}
    tokens, targets = generator.integers(0, VOCABULARY, 6), np.array([0, 1, 2, 2])
    tokens[:3] = [0, 2, 2]
    allowed = generator.random((4, 6)) < 0.7
    allowed[0] = False

    def loss(values):
        similarities = values["queries"] @ values["keys"].T / math.sqrt(3)
        return -np.log(oracle(values["logits"], similarities, allowed, tokens)[np.arange(4), targets]).sum()

    numeric, step = np.zeros_like(values[part]), 1e-6
    for place in np.ndindex(numeric.shape):
        moved = [values | {part: values[part].copy()} for _ in range(2)]
        moved[0][part][place] += step
        moved[1][part][place] -= step
        numeric[place] = (loss(moved[0]) - loss(moved[1])) / (2 * step)

    inputs = {name: torch.from_numpy(value).requires_grad_() for name, value in values.items()}
    similarities = ops.similarities(inputs["queries"], inputs["keys"])
    mask, entries, wanted = tensors(allowed, tokens, targets)
    (-ops.trime_log_probs(inputs["logits"], similarities, mask, entries, wanted).sum()).backward()
    np.testing.assert_allclose(inputs[part].grad, numeric, atol=1e-8)
    assert np.abs(numeric).max() > 1e-2


def test_similarities_are_not_in_half_precision_under_autocast():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(3, 64, generator=generator), torch.randn(5, 64, generator=generator)
    exact = (queries.double() @ keys.double().T / 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ops.similarities(queries, keys)
        assert ops.similarities(queries.bfloat16(), keys).dtype == torch.float32
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(temperature):
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"temperature is .*; expected a positive number"):
        ops.trime_log_probs(one, one, one.bool(), one[0].long(), one[0].long(), temperature)


@st.composite
def batches(draw):
    """Draw places: a few documents of a few segments, in any order, as a batch might hold them."""
    places = [
        (10 * document + segment, document, 4 * segment + position)
        for document in range(draw(st.integers(1, 3)))
        for segment in range(draw(st.integers(0, 3)))
        for position in range(draw(st.integers(1, 4)))
    ]
    return draw(st.permutations(places))


def places_of(rows):
    return Places(*torch.tensor(rows, dtype=torch.long).reshape(-1, 3).T)


def seen_by_loops(rows, names, dropped=()):
    table = np.zeros((len(rows), len(rows)), bool)
    for i, (segment, document, position) in enumerate(rows):
        for j, (other_segment, other_document, other_position) in enumerate(rows):
            if segment == other_segment:
                table[i, j] = "local" in names and other_position < position and segment not in dropped
            else:
                earlier = document == other_document and other_position < position
                others = "others" in names and document != other_document
                table[i, j] = ("long" in names and earlier) or "external" in names or others
    return table


KINDS = {
    "local": Local(),
    "long": LongTerm(),
    "external": External(drop_own=0.5),
    "others": External(own_document=False),
}


@given(batches(), st.sets(st.sampled_from(sorted(KINDS))))
def test_what_is_seen_is_the_union(rows, names):
    places = places_of(rows)
    allowed = visible([KINDS[name] for name in sorted(names)], places, places)
    np.testing.assert_array_equal(allowed.numpy(), seen_by_loops(rows, names))


@given(batches(), st.integers(0, 50))
def test_external_memory_takes_the_own_segment_away(rows, update):
    memories, places = [KINDS[name] for name in ("local", "long", "external")], places_of(rows)
    drop = drops(memories, places.segments, (7, update))
    dropped = {row[0] for row, gone in zip(rows, drop.tolist(), strict=True) if gone}
    kept = {row[0] for row, gone in zip(rows, drop.tolist(), strict=True) if not gone}
    assert not dropped & kept, "a segment is dropped whole"
    allowed = visible(memories, places, places, drop)
    np.testing.assert_array_equal(allowed.numpy(), seen_by_loops(rows, KINDS, dropped))
    for some in (slice(0, 2), slice(2, 30)):
        assert visible(memories, places.rows(some), places, drop[some]).equal(allowed[some])
    assert drops(memories, places.segments, None) is None
    assert drops(memories[:2], places.segments, (7, update)) is None


def test_how_often_the_own_segment_is_dropped():
    segments = torch.arange(1000)
    share = External().drops(segments, (0, 0)).float().mean().item()
    assert share == pytest.approx(0.9, abs=0.03)
    assert not External(drop_own=0).drops(segments, (0, 0)).any()
    assert External(drop_own=1).drops(segments, (0, 0)).all()
    half = External(drop_own=0.5)
    first = half.drops(segments, (0, 3))
    assert first.equal(half.drops(segments, (0, 3))), "drawn again alike"
    assert first[100:].equal(half.drops(segments[100:], (0, 3))), "whatever else is in the batch"
    for other in ((0, 4), (1, 3)):
        assert 300 < (first != half.drops(segments, other)).sum() < 700, "for each seed and update anew"


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ConfigError, match=r"drop_own is .*between 0 and 1"):
        External(drop_own=share)

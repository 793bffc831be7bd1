"""The equations of top-k attention and feed-forward layers, against a dense computation in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import top_k_oracle
from memlm.ops import top_k_attention, top_k_feed_forward
from saved_bytes import saved_bytes


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def inputs(n=13, m=17, batch=2, heads=4, groups=2):
    shapes = (batch, heads, n, 6), (batch, groups, m, 6), (batch, groups, m, 5)
    return [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]


BOOL_MASK = random(2, 1, 13, 17, seed=5) > -0.3
HEAD_MASK = random(2, 4, 13, 17, seed=6) > 1.2  # few are visible, and to some queries none
BIAS = random(2, 4, 13, 17, seed=7).detach()
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "scaled": {"scale": 2.0},
    "capped": {"cap": 0.7},
    "masked": {"mask": BOOL_MASK},
    "masked by head": {"mask": HEAD_MASK},
    "one mask for all": {"mask": BOOL_MASK[0, 0]},
    "biased": {"mask": BIAS},
    "all but sinks": {"causal": True, "cap": 0.5, "mask": HEAD_MASK, "scale": 0.9},
}


def agree(given, expected, of):
    """Check results, and gradients in a random direction, to 1e-10."""
    assert given.shape == expected.shape
    direction = random(*given.shape, seed=99).detach()
    gradients = torch.autograd.grad(given, of, direction), torch.autograd.grad(expected, of, direction)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("k", [1, 4, 17, 50])
@pytest.mark.parametrize("chunk_size", [1, 5, 128])
def test_attention_is_the_dense_computation_masked(options, k, chunk_size):
    tensors = inputs()
    agree(
        top_k_attention(*tensors, k, chunk_size=chunk_size, **options),
        top_k_oracle.attention(*tensors, k, **options),
        tensors,
    )


@pytest.mark.parametrize("cap", [None, 0.5])
def test_sinks_take_their_share_and_get_a_gradient(cap):
    tensors, sinks = inputs(), random(4, seed=9)
    options = {"sinks": sinks, "cap": cap, "mask": HEAD_MASK}
    agree(
        top_k_attention(*tensors, 3, chunk_size=4, **options),
        top_k_oracle.attention(*tensors, 3, **options),
        [*tensors, sinks],
    )


def test_the_oracle_tells_one_k_from_the_next():
    """Control of the tests above: they fail if k is off by one."""
    tensors = inputs()
    expected = top_k_oracle.attention(*tensors, 4)
    for k in (3, 5):
        assert (top_k_attention(*tensors, k) - expected).abs().max() > 1e-3


def test_a_query_that_sees_nothing_gets_nothing_and_gives_no_gradient():
    queries, keys, values = inputs()
    output = top_k_attention(queries, keys, values, 4, mask=torch.zeros(13, 17, dtype=torch.bool))
    assert not output.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(output.sum(), (queries, keys, values)))


def test_a_key_that_is_masked_is_no_better_than_none():
    """With fewer than k visible keys, some that are masked are among the k best; nothing may come of them."""
    queries, keys, values = inputs()
    mask = torch.zeros(13, 17, dtype=torch.bool)
    mask[:, 3] = True
    broken = torch.where(torch.arange(17)[:, None] == 3, values, torch.full_like(values, 1e9))
    output = top_k_attention(queries, keys, broken, 4, mask=mask)
    torch.testing.assert_close(output, values[:, [0, 0, 1, 1], 3, None].expand_as(output))


@given(
    n=st.integers(0, 9),
    m=st.integers(1, 9),
    k=st.integers(1, 12),
    chunk=st.integers(1, 10),
    causal=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
)
def test_attention_of_any_shape(n, m, k, chunk, causal, groups):
    tensors = inputs(n, m, batch=1, groups=groups)
    given = top_k_attention(*tensors, k, causal=causal, chunk_size=chunk)
    order = torch.ones(n, m, dtype=torch.bool).tril()
    expected = top_k_oracle.attention(*tensors, k, mask=order if causal else None)
    agree(given, expected, tensors)


@pytest.mark.parametrize("chunk_size", [3, 4, 50])
def test_dropout_is_the_same_forward_and_backward(chunk_size):
    queries, keys, values = inputs(m=13)

    def attention(values):
        torch.manual_seed(1)
        return top_k_attention(queries, keys, values, 5, causal=True, dropout=0.3, chunk_size=chunk_size)

    identity = torch.eye(13, dtype=torch.float64).expand(2, 2, 13, 13)
    weights = attention(identity)  # (batch, heads, n, m): the weights themselves, after dropout
    kept = (weights > 0).double() / 0.7
    agree(
        attention(values),
        top_k_oracle.attention(queries, keys, values, 5, causal=True, kept=kept),
        [queries, keys, values],
    )


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_gradient_with_dropout_is_that_of_finite_differences(chunks):
    """With the state of the generator kept by module instead of by call, several chunks would fail here."""
    tensors = inputs(n=16, m=16)
    directions = [random(*tensor.shape, seed=20).detach() for tensor in tensors]

    def loss(step):
        torch.manual_seed(4)
        moved = [tensor + step * direction for tensor, direction in zip(tensors, directions, strict=True)]
        return top_k_attention(*moved, 6, dropout=0.3, chunk_size=16 // chunks).square().sum()

    gradients = torch.autograd.grad(loss(0.0), tensors)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step = 1e-6
    torch.testing.assert_close(slope, (loss(step) - loss(-step)) / (2 * step), rtol=1e-6, atol=0)


def test_dropout_is_drawn_anew_for_every_chosen_weight():
    queries, keys, _ = inputs(n=1024, m=64)
    identity = torch.eye(64, dtype=torch.float64).expand(2, 2, 64, 64)
    plain = top_k_attention(queries, keys, identity, 16, chunk_size=256)
    torch.manual_seed(0)
    first, second = (top_k_attention(queries, keys, identity, 16, dropout=0.25, chunk_size=256) for _ in range(2))
    assert not torch.equal(first, second)
    chosen = plain > 0
    assert not first[~chosen].any()
    torch.testing.assert_close(first[first > 0], (plain / 0.75)[first > 0])
    kept = (first > 0)[chosen].double().unflatten(0, (-1, 256 * 16))  # (rows · chunks, weights of a chunk)
    assert (kept.mean(dim=1) - 0.75).abs().max() < 5 * (0.75 * 0.25 / (256 * 16)) ** 0.5
    assert torch.corrcoef(kept).fill_diagonal_(0).abs().max() < 5 / (256 * 16) ** 0.5  # no chunk repeats another


def test_without_dropout_no_random_number_is_used():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    top_k_attention(*inputs(), 4)
    assert torch.equal(torch.rand(1), expected)


def vanilla(queries, keys, values):
    scores = (queries @ keys.mT / 32**0.5).masked_fill(torch.ones(len(queries[0, 0]), keys.shape[2]).triu(1) > 0, -1e9)
    return scores.softmax(dim=-1) @ values


def test_what_is_kept_for_the_gradient_doubles_with_the_length():
    sizes = {"top-k": [], "vanilla": []}
    for length in (512, 1024, 2048):
        tensors = [torch.randn(1, 4, length, 32, requires_grad=True) for _ in range(3)]
        sizes["top-k"].append(saved_bytes(lambda x=tensors: top_k_attention(*x, 32, causal=True, chunk_size=64)))
        sizes["vanilla"].append(saved_bytes(lambda x=tensors: vanilla(*x)))
    assert sizes["top-k"] == [4 * length * (3 * 32 * 4 + 32 * 4) for length in (512, 1024, 2048)]  # q, k, v, numbers
    for short, long in pairwise(sizes["vanilla"]):
        assert 3.6 < long / short < 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_exact_result(dtype):
    tensors = inputs(n=64, m=64)
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    options = {"causal": True, "sinks": torch.zeros(4, dtype=dtype), "chunk_size": 8}
    given, expected = top_k_attention(*low, 64, **options), top_k_attention(*exact, 64, **options)
    assert given.dtype == dtype
    pairs = [(given, expected)]
    pairs += zip(torch.autograd.grad(given.sum(), low), torch.autograd.grad(expected.sum(), exact), strict=True)
    for low_part, exact_part in pairs:
        assert (low_part.double() - exact_part).norm() < 6 * torch.finfo(dtype).eps * exact_part.norm()


def test_autocast_computes_in_its_type():
    tensors = [tensor.detach().float().requires_grad_() for tensor in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        output = top_k_attention(*tensors, 4)
    assert output.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(output.float().sum(), tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"chunk_size": 0}, "chunk_size 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"mask": random(13, 17)}, "requires a gradient"),
    ],
)
def test_what_attention_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        top_k_attention(*inputs(), **{"k": 4} | changes)


def test_a_second_derivative_is_refused():
    queries, keys, values = inputs()
    loss = top_k_attention(queries, keys, values, 4).square().sum()
    (first,) = torch.autograd.grad(loss, queries, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


LAYER = [random(*shape, seed=seed) for seed, shape in enumerate([(3, 7, 6), (11, 6), (11,), (11, 4), (11, 6), (11,)])]
FORMS = {"plain": (True, None), "gated": (False, False), "gated with biases": (True, True)}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("k", [1, 4, 11, 30])
@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize(("activation", "by"), [(F.silu, "score"), (F.silu, "size"), (torch.relu, "score")])
def test_a_feed_forward_layer_is_the_dense_computation_masked(form, k, chunk_size, activation, by):
    hidden, keys, bias, values, factors, factor_bias = LAYER
    first = (keys, bias if form[0] else None)
    factor = None if form[1] is None else (factors, factor_bias if form[1] else None)
    options = {"activation": activation, "factor": factor, "by": by}
    of = [part for part in (hidden, *first, values, *(factor or ())) if part is not None]
    agree(
        top_k_feed_forward(hidden, first, values, k, chunk_size=chunk_size, **options),
        top_k_oracle.feed_forward(hidden, first, values, k, **options),
        of,
    )
    if k == 4:  # control: the test fails if k is off by one
        off = top_k_feed_forward(hidden, first, values, 5, **options)
        assert (off - top_k_oracle.feed_forward(hidden, first, values, 4, **options)).abs().max() > 1e-3


def test_a_feed_forward_layer_keeps_inputs_and_numbers():
    hidden = torch.randn(100, 32, requires_grad=True)
    first, values = torch.randn(512, 32, requires_grad=True), torch.randn(512, 32, requires_grad=True)

    def top_k():
        return top_k_feed_forward(hidden, (first, None), values, 16, activation=F.gelu, chunk_size=10)

    assert saved_bytes(top_k, first, values) == 100 * (32 * 4 + 16 * 4)
    assert saved_bytes(lambda: F.gelu(hidden @ first.T) @ values, first, values) == 100 * (32 + 2 * 512) * 4


def test_a_feed_forward_layer_of_no_inputs():
    hidden, keys, bias, values, *_ = LAYER
    assert top_k_feed_forward(hidden[:, :0], (keys, bias), values, 3, activation=torch.relu).shape == (3, 0, 4)


def test_with_relu_the_highest_scores_are_the_largest_units():
    hidden, keys, bias, values, *_ = LAYER
    by_score, by_size = (
        top_k_feed_forward(hidden, (keys, bias), values, 3, activation=torch.relu, by=by) for by in ("score", "size")
    )
    torch.testing.assert_close(by_score, by_size, rtol=0, atol=1e-12)
    smooth = [top_k_feed_forward(hidden, (keys, bias), values, 8, activation=F.silu, by=by) for by in ("score", "size")]
    assert (smooth[0] - smooth[1]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{"k": 0}, {"chunk_size": 0}, {"by": "rank"}])
def test_what_a_feed_forward_layer_refuses(changes):
    hidden, keys, bias, values, *_ = LAYER
    with pytest.raises(ValueError, match="expected"):
        top_k_feed_forward(hidden, (keys, bias), values, **{"k": 3, "activation": torch.relu} | changes)

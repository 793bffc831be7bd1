"""Attention with memory against brute force, the ring buffer against a list, and the search against sorting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.errors import ConfigError, ShapeError
from memlm.layers import AttentionMemorySettings, Ring, memorize
from memlm.ops import largest, local_log_mass, memory_attention, nearest_keys
from memory_oracle import Layer, array
from tiny_models import tiny_model

FORMS = [
    {},
    {"combine": "gate"},
    {"combine": "null_slot"},
    {"positions": "first"},
    {"positions": "rebased"},
    {"normalize": "l2"},
    {"normalize": "l2", "combine": "gate", "positions": "first", "drop_off": "age"},
    {"drop_off": "age"},
    {"projections": "own_queries"},
    {"projections": "own_queries", "normalize": "l2", "positions": "rebased", "combine": "null_slot"},
]


def streamed(form, size=20, top_k=5, segments=6, tokens=7):
    """Return what a layer with memory gave, and brute force; segment after segment, (rows, tokens, width)."""
    model = tiny_model("llama").double()
    attention = model.model.layers[1].self_attn
    memories = memorize(model, layers=[1], size=size, top_k=top_k, **form)
    memory = memories.memories[1]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if "drop_off" in form:
            memory.forgetting.add_(5.0)  # so that it shows: e⁻² nats a token
    layers = [Layer(attention, memories.settings, memory) for _ in range(2)]
    passed = []
    attention.register_forward_hook(
        lambda _, args, kwargs, output: passed.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    for segment in torch.randint(0, 200, (segments, 2, tokens), generator=generator):
        with torch.no_grad():
            model(segment)
        hidden, output = passed.pop()
        brute = np.stack([layer.forward(array(row)) for layer, row in zip(layers, hidden, strict=True)])
        yield array(output), brute


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer_with_memory_is_what_brute_force_gives(form):
    for output, brute in streamed(form):  # 20 entries overflow in the middle of the third segment of 7
        np.testing.assert_allclose(output, brute, rtol=1e-6, atol=1e-6)  # transformers rotates by float32 tables


@pytest.mark.parametrize("top_k", [4, 6])
def test_brute_force_notices_one_neighbor_too_few_or_too_many(monkeypatch, top_k):
    read = Ring.read
    monkeypatch.setattr(Ring, "read", lambda ring, queries, before, k, *more: read(ring, queries, before, top_k, *more))
    last = list(streamed({}))[-1]
    assert np.abs(last[0] - last[1]).max() > 1e-4


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_largest_are_those_of_sorting(data):
    m, rows = data.draw(st.integers(1, 3000)), data.draw(st.integers(1, 3))
    k = data.draw(st.integers(1, min(m, 8)))
    scores = torch.randn(rows, m, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if data.draw(st.booleans()):
        scores[:, torch.rand(m) < 0.9] = -torch.inf
    values, places = largest(scores, k)
    assert torch.equal(values, scores.sort(dim=-1, descending=True).values[:, :k])
    assert torch.equal(scores.gather(1, places), values)
    assert all(len(set(row.tolist())) == k for row in places)


def test_keys_that_a_query_may_not_see_are_not_found():
    keys = torch.randn(2, 1, 50, 4)
    places = torch.arange(50).repeat(2, 1)
    places[1, 20:] = -1
    before = torch.tensor([[50, 10, 0], [50, 3, 0]])
    slots, found = nearest_keys(torch.randn(2, 1, 3, 4), keys, places, before, 8)
    assert found.sum(dim=-1).tolist() == [[[8, 8, 0]], [[8, 3, 0]]]
    for row in range(2):
        for query in range(3):
            seen = slots[row, 0, query][found[row, 0, query]]
            assert (places[row, seen] < before[row, query]).all()
            assert (places[row, seen] >= 0).all()


def test_products_in_half_precision_are_computed_in_float32():
    """bfloat16 has 8 bits: 256 and 257 are one number to it."""
    keys = torch.tensor([[16.0, 0.0], [16.0, 0.0625]], dtype=torch.bfloat16).view(1, 1, 2, 2)
    query = torch.tensor([16.0, 1.0], dtype=torch.bfloat16).view(1, 1, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slots, _ = nearest_keys(query, keys, torch.tensor([[0, 1]]), torch.tensor([[2]]), 1)
    assert slots.item() == 1


def test_attention_to_nothing_is_zero_with_finite_gradients():
    scores = torch.randn(1, 2, 3, 4, requires_grad=True)
    output, mass = memory_attention(scores, torch.zeros(1, 2, 3, 4, dtype=torch.bool), torch.randn(1, 2, 3, 4, 5))
    assert (output == 0).all()
    assert (mass < -1e29).all()
    mass.sigmoid().sum().backward()
    assert (scores.grad == 0).all()


def test_local_mass_is_that_of_a_dense_softmax():
    queries, keys = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    scores = torch.einsum("bhnd,bhmd->bhnm", queries, keys.repeat_interleave(2, dim=1)) * 0.5
    seen = torch.rand(2, 1, 3, 5) < 0.7
    seen[..., 0] = True
    assert torch.allclose(local_log_mass(queries, keys, 0.5, seen), scores.masked_fill(~seen, -torch.inf).logsumexp(-1))
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    assert torch.allclose(local_log_mass(queries, keys, 0.5, added), local_log_mass(queries, keys, 0.5, seen))
    causal = torch.ones(3, 5, dtype=torch.bool).tril(2)
    assert torch.equal(local_log_mass(queries, keys, 0.5), local_log_mass(queries, keys, 0.5, causal[None, None]))
    capped = (2 * (scores / 2).tanh()).masked_fill(~causal, -torch.inf).logsumexp(-1)
    assert torch.allclose(local_log_mass(queries, keys, 0.5, cap=2.0), capped)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_ring_holds_the_last_entries_of_each_row_with_their_values(data):
    """lucidrains' memory lost the values of its keys when it first overflowed."""
    size, rows = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    ring, listed = Ring(size), [[] for _ in range(rows)]
    number = 0
    for _ in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.integers(1, 12))
        known = torch.tensor(
            data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=rows, max_size=rows))
        )
        entries = torch.arange(number, number + rows * n).view(rows, 1, n, 1).double()
        number += rows * n
        ring.write(entries, -entries, known)
        for row in range(rows):
            listed[row] += entries[row, 0, known[row], 0].tolist()
        flags = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
        if data.draw(st.booleans()):
            ring.reset(torch.tensor(flags))
            listed = [[] if flag else entries for flag, entries in zip(flags, listed, strict=True)]
    assert ring.written.tolist() == [len(entries) for entries in listed]
    queries = torch.ones(rows, 1, 1, 1, dtype=torch.float64)
    found = ring.read(queries, ring.written[:, None], size + 1)
    for row, entries in enumerate(listed):
        if found is None:
            assert not entries
            continue
        present = found.present[row, 0, 0]
        keys, values, places = (tensor[row, 0, 0][present] for tensor in (found.keys, found.values, found.places))
        assert sorted(keys.flatten().tolist()) == sorted(entries[-size:])
        assert torch.equal(values, -keys)
        assert [entries[place] for place in places.tolist()] == keys.flatten().tolist()


def test_a_ring_refuses_other_rows_and_states():
    ring = Ring(4)
    ring.write(torch.ones(2, 1, 3, 5), torch.ones(2, 1, 3, 5))
    with pytest.raises(ShapeError, match="reset it to begin with another number of rows"):
        ring.write(torch.ones(3, 1, 3, 5), torch.ones(3, 1, 3, 5))
    with pytest.raises(ShapeError, match="this memory has 2 rows"):
        ring.reset(torch.tensor([True]))
    with pytest.raises(ShapeError, match="of a memory of 4 entries, this one has 5"):
        Ring(5).load_state_dict(ring.state_dict())
    ring.reset()
    ring.write(torch.ones(3, 1, 3, 5), torch.ones(3, 1, 3, 5))
    assert ring.rows == 3


def test_a_ring_keeps_its_entries_where_it_is_told_to():
    """On another device than what is written: 'meta' holds no numbers, but knows where each tensor is."""
    keys = torch.randn(2, 1, 3, 5)
    ring = Ring(4, device="meta")
    ring._make(keys)
    assert {part.device.type for part in ring.state_dict().values()} == {"meta"}
    here = Ring(4, device="cpu")
    here.write(keys, keys)
    found = here.read(keys, torch.full((2, 3), 9), k=2)
    plain = Ring(4)
    plain.write(keys, keys)
    for part, expected in zip(found, plain.read(keys, torch.full((2, 3), 9), k=2), strict=True):
        assert part.equal(expected)
    ring.load_state_dict(here.state_dict())
    assert {part.device.type for part in ring.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": -1}, "size is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"combine": "sum"}, "expected one of joint, gate, null_slot"),
        ({"device": "the moon"}, "device is 'the moon'; expected a name such as 'cpu'"),
        ({"device": "meta"}, "of a device that is there"),
        ({"device": [0]}, "of a device that is there"),
        ({"positions": True}, "expected one of none, first, rebased"),
        ({"projections": "own_keys"}, "would never learn: memory is written without gradient"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        AttentionMemorySettings(**wrong)

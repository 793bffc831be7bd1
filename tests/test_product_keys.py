"""Product keys: the search against all n² keys, the module, the usage of its slots, and learning in some of them."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlm.errors import ConfigError, ModelError
from memlm.layers import (
    ProductKeyMemory,
    ProductKeySettings,
    SlotUsage,
    choose_slots,
    count_slot_usage,
    product_key_groups,
    product_key_optimizers,
    training_slots_only,
)
from memlm.layers import _product_keys as module
from memlm.ops import _product_keys as ops
from memlm.ops import product_key_top_k, read_slots, slot_tf_idf, usage_divergence, usage_share

SMALL = ProductKeySettings(sub_keys=6, heads=3, k=5, key_width=8)


def drawn(seed, *shape, grid=None):
    """Random float64; on a grid of so many different numbers there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    if grid:
        return torch.randint(grid, shape, generator=generator).double() - grid // 2
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def all_scores(queries, sub_keys):
    """Scores of all n² keys, written out, shape (rows, heads, n²)."""
    heads, _, n, width = sub_keys.shape
    first = sub_keys[:, 0, :, None].expand(heads, n, n, width)
    second = sub_keys[:, 1, None].expand(heads, n, n, width)
    keys = torch.cat([first, second], dim=-1).flatten(1, 2)  # (heads, n², d)
    return torch.einsum("rhd,hsd->rhs", queries, keys)


def brute_force(queries, sub_keys, values, k):
    """What a memory reads, with all keys looked at."""
    scores, slots = all_scores(queries, sub_keys).topk(k)
    return torch.einsum("rhk,rhkw->rw", scores.softmax(dim=-1), values[slots])


def product_keys(queries, sub_keys, values, k):
    scores, slots = product_key_top_k(queries, sub_keys, k)
    return read_slots(values, slots.flatten(1), scores.softmax(dim=-1).flatten(1))


def gradients(read, seed, k, n=8, heads=3, width=6):
    tensors = [drawn(seed, 7, heads, 4), drawn(seed + 1, heads, 2, n, 2), drawn(seed + 2, n * n, width)]
    for tensor in tensors:
        tensor.requires_grad_()
    output = read(*tensors, k)
    (output * drawn(seed + 3, 7, width)).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in tensors)]


@given(st.integers(1, 7), st.data(), st.integers(1, 3), st.integers(0, 999), st.sampled_from([None, 2, 3]))
def test_the_best_of_all_pairs_are_found(n, data, heads, seed, grid):
    k = data.draw(st.integers(1, n * n))
    queries, sub_keys = drawn(seed, 5, heads, 4, grid=grid), drawn(seed + 1, heads, 2, n, 2, grid=grid)
    scores, slots = product_key_top_k(queries, sub_keys, k)
    everything = all_scores(queries, sub_keys)
    # with ties the slots may be others, their scores may not
    assert torch.allclose(scores, everything.topk(k).values, rtol=0, atol=1e-12)
    assert torch.allclose(everything.gather(-1, slots), scores, rtol=0, atol=1e-12)
    assert all(len(row.unique()) == k for row in slots.flatten(0, 1))


@pytest.mark.parametrize("k", [1, 3, 8, 20, 64])
def test_reading_is_that_of_all_keys_gradients_included(k):
    found, expected = gradients(product_keys, 5, k), gradients(brute_force, 5, k)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    # a softmax over one score has no gradient
    assert [bool(theirs.abs().sum() > 0) for theirs in expected] == [True, k > 1, k > 1, True]


@pytest.mark.parametrize("k", [3, 8])
def test_the_oracle_catches_k_off_by_one_and_halves_that_look_at_too_few(k):
    def off_by_one(queries, sub_keys, values, k):
        return product_keys(queries, sub_keys, values, k + 1)

    def too_few(k, n):
        side = range(1 + math.isqrt(k))
        return [i for i in side for _ in side], [j for _ in side for j in side]

    expected = gradients(brute_force, 5, k)
    found = gradients(off_by_one, 5, k)
    assert not any(torch.allclose(mine, theirs, atol=1e-6) for mine, theirs in zip(found, expected, strict=True))
    with mock.patch.object(ops, "_pairs", too_few):
        found = gradients(product_keys, 5, k)
    assert not torch.allclose(found[0], expected[0], atol=1e-6)


def test_gradients_by_finite_differences():
    tensors = [drawn(1, 3, 2, 4), drawn(2, 2, 2, 5, 2), drawn(3, 25, 3)]
    for tensor in tensors:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *items: product_keys(*items, 4), tensors)


def test_equal_sub_keys_are_different_slots():
    sub_keys = torch.ones(1, 2, 3, 2)
    scores, slots = product_key_top_k(torch.ones(2, 1, 4), sub_keys, 9)
    assert scores.tolist() == [[[4.0] * 9]] * 2
    assert slots.sort().values.tolist() == [[list(range(9))]] * 2


def test_a_slot_read_by_two_heads_counts_twice():
    read = read_slots(torch.tensor([[1.0], [10.0]]), torch.tensor([[1, 1, 0]]), torch.tensor([[0.5, 0.25, 1.0]]))
    assert read.tolist() == [[8.5]]


def test_only_the_pairs_that_can_win_are_looked_at():
    assert len(ops._pairs(32, 512)[0]) == 119  # of 1,024
    assert len(ops._pairs(36, 6)[0]) == 36


def test_no_rows_and_wrong_shapes():
    scores, slots = product_key_top_k(torch.zeros(0, 2, 4), torch.zeros(2, 2, 3, 2), 4)
    assert scores.shape == slots.shape == (0, 2, 4)
    with pytest.raises(ValueError, match="expected 1 to 9, the number of slots"):
        product_key_top_k(torch.zeros(1, 2, 4), torch.zeros(2, 2, 3, 2), 10)
    with pytest.raises(ValueError, match=r"\(heads, 2, n, d / 2\)"):
        product_key_top_k(torch.zeros(1, 2, 6), torch.zeros(2, 2, 3, 2), 1)


def test_scores_are_never_in_half_precision():
    queries, sub_keys = drawn(0, 4, 2, 8), drawn(1, 2, 2, 9, 4)
    expected = product_key_top_k(queries.float(), sub_keys.float(), 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, slots = product_key_top_k(queries.float(), sub_keys.float(), 6)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected[0])
    assert torch.equal(slots, expected[1])
    assert product_key_top_k(queries.bfloat16(), sub_keys.bfloat16(), 6)[0].dtype == torch.float32


def test_the_module_is_the_equation_of_the_paper():
    memory = ProductKeyMemory(10, SMALL).double()
    hidden = drawn(4, 2, 3, 10)
    queries = memory.query(hidden).view(6, 3, 8)
    queries = (queries - queries.mean(-1, keepdim=True)) / (queries.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = brute_force(queries, memory.sub_keys, memory.values, 5).view(2, 3, 10)
    assert torch.allclose(memory(hidden), expected, rtol=0, atol=1e-12)


def test_the_gated_output_is_that_of_memory_plus():
    memory = ProductKeyMemory(10, ProductKeySettings(sub_keys=6, heads=3, k=5, key_width=8, output="gated")).double()
    plain = ProductKeyMemory(10, SMALL).double()
    plain.load_state_dict({name: item for name, item in memory.state_dict().items() if name in plain.state_dict()})
    hidden = drawn(4, 6, 10)
    gate = hidden @ memory.gate.weight.T
    expected = (plain(hidden) * gate * torch.sigmoid(gate)) @ memory.project.weight.T
    assert torch.allclose(memory(hidden), expected, rtol=0, atol=1e-12)


def without_gradient(memory):
    """Names of the parameters that a step of training does not reach."""
    memory(torch.randn(32, 10)).square().sum().backward()
    return {
        name
        for name, item in memory.named_parameters()
        if item.grad is None or not float(item.grad.to_dense().abs().sum())
    }


@pytest.mark.parametrize("output", ["sum", "gated"])
@pytest.mark.parametrize("normalization", ["layer", "batch", "none"])
def test_every_parameter_gets_a_gradient(output, normalization):
    torch.manual_seed(0)
    settings = ProductKeySettings(
        sub_keys=6, heads=3, k=5, key_width=8, output=output, query_normalization=normalization
    )
    assert without_gradient(ProductKeyMemory(10, settings)) == set()


def test_weights_that_are_not_used_leave_keys_and_queries_without_gradient():
    """Control: the fault of known code, that the check above must find."""

    def uniform(values, slots, weights, **settings):
        return read_slots(values, slots, torch.full_like(weights, 1 / SMALL.k), **settings)

    with mock.patch.object(module, "read_slots", uniform):
        found = without_gradient(ProductKeyMemory(10, SMALL))
    assert {"sub_keys", "query.weight", "query.bias"} <= found


def test_a_batch_norm_in_eval_mode_looks_at_each_position_alone():
    torch.manual_seed(0)
    memory = ProductKeyMemory(10, ProductKeySettings(sub_keys=6, k=5, key_width=8, query_normalization="batch"))
    hidden = 3 + torch.randn(4, 6, 10)
    for _ in range(20):
        memory(hidden)
    assert not torch.allclose(memory(hidden)[:1], memory(hidden[:1]))  # in training: over the batch
    memory.eval()
    before = {name: item.clone() for name, item in memory.state_dict().items()}
    assert torch.allclose(memory(hidden)[:1, :1], memory(hidden[:1, :1]), atol=1e-6)
    assert all(torch.equal(item, before[name]) for name, item in memory.state_dict().items())
    queries, norm = memory.query(hidden.flatten(0, 1)), memory.query_norm
    by_statistics = (queries - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(norm(queries), by_statistics, atol=1e-5)
    assert float(norm.running_mean.abs().max()) > 1  # they were learned


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 37}, "k is 37; expected at most 36"),
        ({"heads": 0}, "heads is 0; expected a whole number of at least 1"),
        ({"sub_keys": 2.5}, "sub_keys is 2.5"),
        ({"key_width": 7}, "expected an even number"),
        ({"query_normalization": "rms"}, "expected one of layer, batch, none"),
        ({"output": "swiglu"}, "expected one of sum, gated"),
        ({"value_gradient": "lazy"}, "expected one of sparse, dense"),
    ],
)
def test_settings_that_cannot_work(change, said):
    with pytest.raises(ConfigError, match=said):
        ProductKeySettings(**{"sub_keys": 6, "k": 4} | change)


def memory_of(gradient, seed=0):
    torch.manual_seed(seed)
    return ProductKeyMemory(10, ProductKeySettings(sub_keys=6, heads=2, k=3, key_width=8, value_gradient=gradient))


def test_sparse_gradients_are_the_dense_ones():
    found = {}
    for gradient in ("sparse", "dense"):
        memory = memory_of(gradient)
        for seed in (1, 2):  # added up over two batches
            memory(drawn(seed, 7, 10).float()).square().sum().backward()
        assert memory.values.grad.is_sparse == (gradient == "sparse")
        found[gradient] = memory.values.grad.to_dense()
    assert torch.allclose(found["sparse"], found["dense"], atol=1e-6)


def test_only_rows_that_were_read_move():
    memory = memory_of("sparse")
    optimizers = product_key_optimizers(memory, learning_rate=0.01, weight_decay=0.1)
    assert [type(item).__name__ for item in optimizers] == ["AdamW", "SparseAdam"]
    assert optimizers[0].param_groups[0]["weight_decay"] == 0.1
    for seed in range(4):
        hidden = drawn(seed, 2, 10).float()
        before, read = memory.values.detach().clone(), memory.address(hidden)[1].unique()
        memory(hidden).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        moved = (memory.values != before).any(dim=1).nonzero().flatten()
        assert torch.equal(moved, read)
        assert 0 < len(read) < 36


def test_dense_gradients_take_the_ordinary_adam():
    kinds = [type(item).__name__ for item in product_key_optimizers(memory_of("dense"), learning_rate=0.01)]
    assert kinds == ["AdamW", "Adam"]


def test_tables_of_both_kinds_get_an_optimizer_each():
    model = torch.nn.Sequential(memory_of("dense"), memory_of("sparse"))
    optimizers = product_key_optimizers(model, learning_rate=0.01)
    assert [type(item).__name__ for item in optimizers] == ["AdamW", "SparseAdam", "Adam"]
    assert optimizers[1].param_groups[0]["params"] == [model[1].values]
    model(drawn(0, 4, 10).float()).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_the_groups_hold_every_parameter_once():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), memory_of("dense"))
    model[0].bias.requires_grad_(False)
    rest, tables = product_key_groups(model, learning_rate=0.1, value_learning_rate=0.5, weight_decay=0.2)
    assert tables == {"params": [model[1].values], "lr": 0.5, "weight_decay": 0.0}
    assert (rest["lr"], rest["weight_decay"]) == (0.1, 0.2)
    found = {id(item) for item in rest["params"]}
    assert found == {id(item) for item in model.parameters()} - {id(model[1].values), id(model[0].bias)}
    with pytest.raises(ModelError, match="Linear has no memory of product keys"):
        product_key_groups(model[0], learning_rate=0.1)


def test_usage_is_counted_as_numpy_does():
    weights = drawn(3, 50).abs()
    weights[7:30] = 0
    share = weights.numpy() / weights.numpy().sum()
    kept = share[share > 0]
    assert float(usage_share(weights)) == pytest.approx((share > 0).mean())
    assert float(usage_divergence(weights)) == pytest.approx(math.log(50) + (kept * np.log(kept)).sum())
    assert float(usage_divergence(torch.ones(9))) == pytest.approx(0, abs=1e-12)
    assert float(usage_divergence(torch.eye(9)[0])) == pytest.approx(math.log(9))
    assert math.isnan(float(usage_divergence(torch.zeros(4))))
    assert float(usage_share(torch.zeros(0))) == 0


def test_usage_by_documents_without_their_padding():
    torch.manual_seed(0)
    slots, weights = torch.randint(20, (3, 4, 6)), torch.rand(3, 4, 6)
    attended = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    usage = SlotUsage(20)
    for part in (slice(0, 1), slice(1, 3)):
        usage.add(slots[part], weights[part], attended[part])
    expected, reads, documents = np.zeros(20), np.zeros(20), [set() for _ in range(3)]
    for row, place in attended.nonzero().tolist():
        for slot, weight in zip(slots[row, place].tolist(), weights[row, place].tolist(), strict=True):
            expected[slot] += weight
            reads[slot] += 1
            documents[row].add(slot)
    assert np.allclose(usage.weights.numpy(), expected)
    assert usage.reads.tolist() == reads.tolist()
    assert usage.documents_reading.tolist() == [sum(slot in found for found in documents) for slot in range(20)]
    assert usage.documents == 2  # the last is all padding
    everything = SlotUsage(20)
    everything.add(slots, weights)
    assert (everything.documents, int(everything.reads.sum())) == (3, 72)


def test_tf_idf_against_numpy():
    reads, background = torch.tensor([4, 0, 4, 2]), torch.tensor([0, 0, 9, 3])
    expected = np.array([4, 0, 4, 2]) / 10 * np.log(10 / np.array([1, 1, 10, 4]))
    assert np.allclose(slot_tf_idf(reads, background, 9).numpy(), expected)
    assert slot_tf_idf(torch.zeros(3, dtype=torch.int64), torch.zeros(3), 1).tolist() == [0, 0, 0]


def test_slots_are_chosen_that_the_new_text_reads_more():
    new, background = SlotUsage(5), SlotUsage(5)
    background.add(torch.tensor([[[0, 2]], [[0, 3]]]), torch.ones(2, 1, 2))
    new.add(torch.tensor([[[0, 1], [0, 3], [0, 1]]]), torch.ones(1, 3, 2))
    assert choose_slots(new, background, 9).tolist() == [1, 3]  # all background reads 0; 2 and 4 are not read
    assert choose_slots(new, background, 1).tolist() == [1]
    with pytest.raises(ConfigError, match="count is 0"):
        choose_slots(new, background, 0)
    with pytest.raises(ConfigError, match="the background has no documents"):
        choose_slots(new, SlotUsage(5), 1)
    with pytest.raises(ConfigError, match="usages are of 5 and 6 slots"):
        choose_slots(new, SlotUsage(6), 1)


@pytest.mark.parametrize("gradient", ["sparse", "dense"])
def test_nothing_but_chosen_slots_is_trained(gradient):
    memory = memory_of(gradient)
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), memory)
    before = {name: item.clone() for name, item in model.state_dict().items()}
    hidden = drawn(1, 9, 10).float()
    read = memory.address(model[0](hidden))[1].unique()
    chosen = read[::2]
    with training_slots_only(model, {"1": chosen}):
        (optimizer,) = product_key_optimizers(model, learning_rate=0.1, value_learning_rate=0.1)
        for _ in range(3):
            model(hidden).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    after = model.state_dict()
    moved = (after["1.values"] != before["1.values"]).any(dim=1).nonzero().flatten()
    assert torch.equal(moved, chosen)
    assert all(torch.equal(after[name], item) for name, item in before.items() if name != "1.values")
    assert all(item.requires_grad for item in model.parameters())
    model(hidden).square().sum().backward()
    assert len(model[1].values.grad.to_dense().abs().sum(1).nonzero()) == len(read)  # the mask is gone


def test_slots_that_do_not_exist():
    model = torch.nn.Sequential(memory_of("sparse"))
    with pytest.raises(ConfigError, match="no memory of product keys at '1'; expected one of 0"):
        training_slots_only(model, {"1": torch.tensor([1])}).__enter__()
    with pytest.raises(ConfigError, match="slots of 0 reach from 1 to 36; expected 0 to 35"):
        training_slots_only(model, {"0": torch.tensor([1, 36])}).__enter__()
    assert all(item.requires_grad for item in model.parameters())
    with pytest.raises(ModelError, match="Linear has no memory"), count_slot_usage(torch.nn.Linear(2, 2)):
        pass

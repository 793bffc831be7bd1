"""Memories of several kinds in one model: put in and taken out in any order, and generating together."""

import copy
import itertools

import pytest
import torch

from memlm import KnnMixture, attach
from memlm.errors import ConfigError, ModelError
from memlm.layers import (
    Bank,
    ProductKeySettings,
    TensorRows,
    add_product_keys,
    add_row_reader,
    add_trained_rows,
    forget,
    load_product_keys,
    load_row_reader,
    memorize,
    memory_of,
    remove_beside,
    remove_product_keys,
    save_product_keys,
    save_row_reader,
    top_k_attention,
)
from memlm.layers._facts import reader_of
from memlm.models import LanguageModel
from tiny_memories import TEXTS, hooks_of, ids_of, lm_of, store
from tiny_models import tiny_tokenizer

SETTINGS = ProductKeySettings(sub_keys=4, heads=2, k=2, key_width=8)
TEXT = "the cat was in the house and the rain was on the roof"


def put_attention_memory(model):
    memorize(model, [1], size=32, top_k=4)
    with torch.no_grad():
        model(ids_of("in the morning the rain was over")[:, :6])
    return lambda: forget(model)


def put_product_keys(model):
    for memory in add_product_keys(model, [0], SETTINGS).values():
        torch.nn.init.normal_(memory.values, std=0.5)
    return lambda: remove_product_keys(model)


def put_reader(model, layer=1, window=1):
    reader = add_row_reader(model, layer, key_width=8, value_width=8, window=window)
    torch.nn.init.normal_(reader.out.weight)
    reader.rows = TensorRows(torch.eye(8), torch.randn(8, 8))
    return lambda: remove_beside(model, reader)


def put_top_k_attention(model):
    return top_k_attention(model, k=3).remove


KINDS = (put_attention_memory, put_product_keys, put_reader, put_top_k_attention)


def named(kinds):
    return " then ".join(kind.__name__[4:] for kind in kinds) if isinstance(kinds, tuple) else kinds


def logits_of(model):
    with torch.no_grad():
        return model(ids_of(TEXT), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("kinds", list(itertools.permutations(KINDS, 2)), ids=named)
@pytest.mark.parametrize("nested", ["first in, first out", "last in, first out"])
def test_two_kinds_change_the_model_and_leave_it_as_it_was(family, kinds, nested):
    model = copy.deepcopy(lm_of(family).model)
    before, hooks = logits_of(model), hooks_of(model)
    seen = [before]
    torch.manual_seed(0)
    removals = []
    for put in kinds:
        removals.append(put(model))
        seen.append(logits_of(model))
        assert not torch.allclose(seen[-1], seen[-2])
    for remove in removals if nested == "first in, first out" else reversed(removals):
        remove()
    assert torch.equal(logits_of(model), before)
    assert hooks_of(model) == hooks


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_all_of_them_generate_under_a_datastore_of_the_changed_model(tmp_path, family):
    model = copy.deepcopy(lm_of(family).model)
    before, prompt = logits_of(model), ids_of(TEXT)[:, :9]
    torch.manual_seed(0)
    removals = [put(model) for put in KINDS]
    with memory_of(model).read_only():
        memory = store(LanguageModel(model, tiny_tokenizer(), family), TEXTS, tmp_path / "memory")
        alone = logits_of(model)
        with attach(model, memory, KnnMixture(interpolation_weight=0.6, temperature=1.0, k=9)):
            assert not torch.allclose(logits_of(model).log_softmax(-1), alone.log_softmax(-1), atol=1e-3)
            options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "use_cache": False, "pad_token_id": 0}
            once = model.generate(prompt, **options)
            both = model.generate(prompt.repeat(2, 1), **options)
        assert torch.equal(logits_of(model), alone)
    assert torch.equal(both, once.repeat(2, 1))
    for remove in removals:
        remove()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("placement", ["beside", "replace"])
@pytest.mark.parametrize("first", ["product keys", "reader"])
@pytest.mark.parametrize("out", ["product keys", "reader"])
def test_two_around_one_feed_forward_are_taken_out_in_any_order(placement, first, out):
    model = copy.deepcopy(lm_of("llama").model)
    before, names = logits_of(model), set(model.state_dict())
    puts = {
        "product keys": lambda: add_product_keys(model, [1], SETTINGS, placement=placement),
        "reader": lambda: add_row_reader(model, 1),
    }
    made = {name: puts[name]() for name in sorted(puts, key=lambda name: name != first)}
    for name in puts:
        with pytest.raises(ConfigError, match="already"):
            puts[name]()
    removals = {
        "product keys": lambda: remove_product_keys(model),
        "reader": lambda: remove_beside(model, made["reader"]),
    }
    for name in sorted(removals, key=lambda name: name != out):
        removals[name]()
    assert torch.equal(logits_of(model), before)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("first", ["product keys", "reader"])
def test_two_around_one_feed_forward_are_saved_and_loaded(first, tmp_path):
    model, again = copy.deepcopy(lm_of("llama").model), copy.deepcopy(lm_of("llama").model)
    puts = {"product keys": put_product_keys, "reader": lambda model: put_reader(model, 0)}
    for name in sorted(puts, key=lambda name: name != first):
        puts[name](model)
    save_product_keys(model, tmp_path)
    save_row_reader(model, tmp_path)
    load_product_keys(again, tmp_path)
    load_row_reader(again, tmp_path).rows = reader_of(model).rows
    torch.testing.assert_close(logits_of(again), logits_of(model))


def test_a_copy_with_a_reader_that_has_a_window_sees_its_padding_and_refuses_a_cache():
    model = copy.deepcopy(lm_of("llama").model)
    put_reader(model, 1, window=2)
    copied, ids = copy.deepcopy(model), ids_of(TEXT)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(copied(ids, attention_mask=mask, use_cache=False).logits[:, 4:], expected[:, 4:])
    del model
    cache = copied(ids[:, :5]).past_key_values
    with pytest.raises(ModelError, match="use_cache=False"):
        copied(ids[:, 5:6], past_key_values=cache)


def test_a_reader_and_trained_rows_stay_float32_in_a_model_that_becomes_half(tmp_path):
    model = copy.deepcopy(lm_of("llama").model)
    with Bank.create(tmp_path / "bank", rows=16, key_width=0, value_width=4, moments=True) as bank:
        rows = add_trained_rows(model, 0, bank, top_k=2)
        put_reader(model)
        fingerprint = reader_of(model).fingerprint()
        model.to(torch.bfloat16)
        assert logits_of(model).dtype == torch.bfloat16
        assert {parameter.dtype for parameter in rows.parameters()} == {torch.float32}
        assert reader_of(model).fingerprint() == fingerprint

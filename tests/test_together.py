"""Memories of several kinds in one model: put in and taken out in any order, and generating together."""

import copy
import itertools

import pytest
import torch

from memlm import KnnMixture, attach
from memlm.layers import (
    ProductKeySettings,
    TensorRows,
    add_product_keys,
    add_row_reader,
    forget,
    memorize,
    memory_of,
    remove_beside,
    remove_product_keys,
    top_k_attention,
)
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


def put_reader(model):
    reader = add_row_reader(model, 1, key_width=8, value_width=8)
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

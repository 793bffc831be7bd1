"""A memory attached to a model: every call sees the mixture, and leaving the block leaves nothing of it."""

from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch

import tiny_memories
from memlm import Document, KnnMixture, attach, evaluate
from memlm.errors import DatastoreMismatch, ModelError
from tiny_memories import FIVE, TEXTS, hooks_of, ids_of
from tiny_models import FAMILIES, tiny_model

PROMPTS = ["the rain was", "in the house and the letter"]


@pytest.fixture(scope="module")
def attachable(tmp_path_factory):
    return partial(tiny_memories.attachable, tmp_path_factory.mktemp("memories"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_to_keep(family, attachable):
    lm, memory, mixture = attachable(family)
    ids = torch.cat([ids_of(PROMPTS[0])[:, :4], ids_of(PROMPTS[1])[:, :4]])
    with attach(lm.model, memory, mixture), torch.no_grad():
        whole = lm.model(ids).logits
        assert torch.allclose(lm.model(ids, logits_to_keep=2).logits, whole[:, -2:], atol=1e-5)
        assert torch.allclose(lm.model(ids, logits_to_keep=torch.tensor([0, 2])).logits, whole[:, [0, 2]], atol=1e-5)
        embedded = lm.model(inputs_embeds=lm.model.get_input_embeddings()(ids)).logits
    if family not in ("gemma", "gemma2", "gemma3_text"):  # these scale embeddings inside
        assert torch.allclose(embedded, whole, atol=1e-4)


@pytest.mark.parametrize("family", FIVE)
def test_loss_and_tuples_are_the_mixture_s(family, attachable):
    lm, memory, mixture = attachable(family)
    text = "the letter was in the rain and the house"
    ids = torch.from_numpy(lm.tokenize(Document(id="new", text=text)).ids)[None]
    scored = evaluate(lm, [Document(id="new", text=text)], memory, mixture, show_progress=False)
    with torch.no_grad():
        alone = lm.model(ids, labels=ids)
        with attach(lm.model, memory, mixture):
            out = lm.model(ids, labels=ids)
            loss, logits = lm.model(ids, labels=ids, return_dict=False)[:2]
            (plain, *_) = lm.model(ids, return_dict=False)
    assert float(out.loss) == pytest.approx(-scored.log_probs.mean(), abs=1e-5)
    assert float(alone.loss) == pytest.approx(-scored.lm_log_probs.mean(), abs=1e-5)
    assert abs(float(alone.loss) - float(out.loss)) > 0.05
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    assert torch.equal(plain, out.logits)


def test_tuples_with_a_router_loss(attachable):
    """Mixtures of experts put another loss before the logits."""
    lm, memory, mixture = attachable("mixtral")
    ids = ids_of(PROMPTS[0])
    settings = {"output_router_logits": True, "return_dict": False}
    with attach(lm.model, memory, mixture), torch.no_grad():
        expected = lm.model(ids, labels=ids)
        loss, router_loss, logits = lm.model(ids, labels=ids, **settings)[:3]
        assert torch.equal(loss, expected.loss)
        assert torch.equal(logits, expected.logits)
        assert torch.equal(lm.model(ids, **settings)[1], expected.logits)
    assert torch.equal(router_loss, lm.model(ids, labels=ids, output_router_logits=True).aux_loss)


def test_an_error_inside_the_block_leaves_nothing_behind(attachable):
    lm, memory, mixture = attachable("llama")
    ids, hooks = ids_of(PROMPTS[0]), hooks_of(lm.model)
    with torch.no_grad():
        before = lm.model(ids).logits
        for error in (RuntimeError("interrupted"), KeyboardInterrupt()):
            with suppress(type(error)), attach(lm.model, memory, mixture):
                assert hooks_of(lm.model) == hooks + 2
                raise error
        assert hooks_of(lm.model) == hooks
        assert torch.equal(lm.model(ids).logits, before)
        with attach(lm.model, memory, mixture):  # and it can be attached again
            assert not torch.equal(lm.model(ids).logits, before)


def test_attaching_twice_is_refused(attachable):
    lm, memory, mixture = attachable("llama")
    ids = ids_of(PROMPTS[0])
    with attach(lm.model, memory, mixture), torch.no_grad():
        mixed = lm.model(ids).logits
        with pytest.raises(ModelError, match="attached to this model already"), attach(lm.model, memory, mixture):
            pass
        assert torch.equal(lm.model(ids).logits, mixed), "the first one stays"


def test_another_model_is_refused(attachable):
    _, memory, mixture = attachable("llama")
    for other in (tiny_model("llama", seed=1), tiny_model("gpt2")):
        hooks = hooks_of(other)
        said = f"llama .LlamaForCausalLM.*{type(other).__name__}"
        with pytest.raises(DatastoreMismatch, match=said), attach(other, memory, mixture):
            pass
        assert hooks_of(other) == hooks


@pytest.mark.parametrize("key_dtype", ["float16", "bfloat16"])
def test_bfloat16_model(key_dtype, attachable):
    lm, memory, mixture = attachable("llama", key_dtype, torch.bfloat16)
    ids = ids_of(PROMPTS[0])
    with attach(lm.model, memory, mixture), torch.no_grad():
        mixed = lm.model(ids).logits
        lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed.logsumexp(dim=-1), torch.zeros(mixed.shape[:2]), atol=1e-5)
    text = Document(id="own", text=TEXTS[0])
    sharp = KnnMixture(interpolation_weight=1.0, temperature=0.05, k=9)
    found = evaluate(lm, [text], memory, sharp, leave_out_own=False, show_progress=False)
    assert np.exp(found.log_probs).mean() > 0.9


def test_weight_zero_is_the_model_alone(attachable):
    lm, memory, _ = attachable("llama")
    ids = ids_of(PROMPTS[0])
    with torch.no_grad():
        expected = lm.model(ids).logits.log_softmax(dim=-1)
        with attach(lm.model, memory, KnnMixture(interpolation_weight=0.0, temperature=1.0, k=4)):
            assert torch.allclose(lm.model(ids).logits, expected, atol=1e-6)

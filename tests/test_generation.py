"""Generating with a memory attached: every way to decode follows the mixture."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, pipeline
from transformers.utils import logging

import tiny_memories
from memlm import attach
from oracle import knn_lm, stored_entries, teacher_forced
from tiny_memories import FIVE, hooks_of, ids_of
from tiny_models import END_OF_TEXT_ID, FAMILIES, VOCAB_SIZE, tiny_model

PROMPTS = ["the rain was", "in the house and the letter"]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.set_verbosity_error()  # hints about generation settings
    yield
    logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def attachable(tmp_path_factory):
    return partial(tiny_memories.attachable, tmp_path_factory.mktemp("memories"))


def greedy(model, ids, tokens=12, **settings):
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False} | settings
    return model.generate(ids, **({"attention_mask": torch.ones_like(ids)} | settings))


@pytest.mark.parametrize("family", FIVE)
def test_generation_agrees_with_the_oracle(family, attachable):
    lm, memory, mixture = attachable(family)
    ids, recorded = ids_of(PROMPTS[0]), []

    def record(input_ids, scores):
        recorded.append(scores[0].double())
        return scores

    with attach(lm.model, memory, mixture):
        out = greedy(lm.model, ids, logits_processor=LogitsProcessorList([record]), output_logits=True,
                     return_dict_in_generate=True)  # fmt: skip
    whole = out.sequences[0]
    lm_log_probs, states = teacher_forced(lm.model, lm.site, whole[:-1])
    expected, ambiguous = knn_lm(lm_log_probs, states, *stored_entries(memory.path), mixture)
    expected = expected[ids.shape[1] - 1 :]
    assert not ambiguous[ids.shape[1] - 1 :].any()
    assert len(recorded) == len(out.logits) == len(expected) == 12
    allowed = np.arange(VOCAB_SIZE) != END_OF_TEXT_ID  # `greedy` forbids the end before processors of the user
    assert np.abs(torch.stack(recorded).numpy() - expected)[:, allowed].max() < 1e-4
    assert np.abs(torch.cat(out.logits).double().numpy() - expected).max() < 1e-4
    assert np.abs(lm_log_probs[ids.shape[1] - 1 :] - expected).max() > 0.5, "the memory says something"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_what_the_mixture_says(family, attachable):
    """Greedy text is the argmax of the teacher-forced mixture, whose rows are distributions; then all is as before."""
    lm, memory, mixture = attachable(family)
    ids = ids_of(PROMPTS[0])
    with torch.no_grad():
        before, hooks = lm.model(ids).logits, hooks_of(lm.model)
        with attach(lm.model, memory, mixture) as model:
            assert model is lm.model
            whole = greedy(model, ids, 6)
            mixed = model(whole).logits
        after = lm.model(ids).logits
    assert torch.allclose(mixed.logsumexp(dim=-1), torch.zeros(mixed.shape[:2]), atol=1e-5)
    mixed[..., END_OF_TEXT_ID] = -torch.inf  # `greedy` forbids it
    assert torch.equal(mixed[0, ids.shape[1] - 1 : -1].argmax(dim=-1), whole[0, ids.shape[1] :])
    assert torch.equal(before, after)
    assert hooks_of(lm.model) == hooks
    assert not hasattr(lm.model, "_memlm_attached")


@pytest.mark.parametrize("family", FIVE)
@pytest.mark.parametrize("way", ["prompt lookup", "assistant", "chunked prefill", "no cache", "static cache"])
def test_other_ways_to_decode_give_the_same_text(family, way, attachable):
    lm, memory, mixture = attachable(family)
    ids = ids_of("the rain was in the rain was in the")
    settings = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": tiny_model(family, seed=1)},
        "chunked prefill": {"prefill_chunk_size": 4},
        "no cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
    }[way]
    widths = []
    with attach(lm.model, memory, mixture):
        expected = greedy(lm.model, ids)
        handle = lm.model.register_forward_pre_hook(
            lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        got = greedy(lm.model, ids, **settings)
        handle.remove()
    assert torch.equal(got, expected)
    width = ids.shape[1]
    assert {
        "prompt lookup": max(widths[1:]) > 1,
        "assistant": max(widths[1:]) > 1,
        "chunked prefill": widths == [4] * (width // 4) + [width % 4] * (width % 4 > 0) + [1] * 11,
        "no cache": widths == list(range(width, width + 12)),
        "static cache": widths == [width] + [1] * 11,
    }[way], f"that is not how text is decoded in this way: {widths}"
    assert not torch.equal(expected, greedy(lm.model, ids)), "the model alone writes something else"


@pytest.mark.parametrize("family", FIVE)
def test_beams_follow_the_mixture(family, attachable):
    lm, memory, mixture = attachable(family)
    ids = ids_of(PROMPTS[1])
    settings = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    with attach(lm.model, memory, mixture), torch.no_grad():
        out = greedy(lm.model, ids, 5, length_penalty=0.0, renormalize_logits=False, min_new_tokens=None,
                     eos_token_id=None, **settings)  # fmt: skip
        log_probs = lm.model(out.sequences).logits[:, ids.shape[1] - 1 : -1]
    new = out.sequences[:, ids.shape[1] :, None]
    assert new.shape[1] == 5
    assert torch.allclose(log_probs.gather(2, new).sum(dim=(1, 2)), out.sequences_scores, atol=1e-4)


def test_sampling_follows_the_mixture(attachable):
    lm, memory, mixture = attachable("llama")
    ids = ids_of(PROMPTS[0])
    with attach(lm.model, memory, mixture), torch.no_grad():
        expected = lm.model(ids).logits[0, -1].exp()
        torch.manual_seed(0)
        drawn = lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=1,
                                  num_return_sequences=4000)[:, -1]  # fmt: skip
    observed = torch.bincount(drawn, minlength=VOCAB_SIZE) / len(drawn)
    assert float((observed - expected).abs().sum()) < 0.2
    with torch.no_grad():
        alone = lm.model(ids).logits[0, -1].softmax(dim=-1)
    assert float((observed - alone).abs().sum()) > 0.5


@pytest.mark.parametrize("family", [*FIVE, "bloom", "mistral"])
def test_left_padded_batch_is_as_one_at_a_time(family, attachable):
    lm, memory, mixture = attachable(family)
    batch = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    assert batch["attention_mask"].min() == 0
    with attach(lm.model, memory, mixture):
        together = greedy(
            lm.model, batch["input_ids"], attention_mask=batch["attention_mask"], pad_token_id=END_OF_TEXT_ID
        )
        alone = [greedy(lm.model, torch.tensor([lm.tokenizer(prompt)["input_ids"]])) for prompt in PROMPTS]
    for row, single in zip(together, alone, strict=True):
        assert row[-12:].tolist() == single[0, -12:].tolist()


def test_pipeline(attachable):
    lm, memory, mixture = attachable("llama")
    write = pipeline("text-generation", model=lm.model, tokenizer=lm.tokenizer, device="cpu")
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = write(PROMPTS[0], **settings)[0]["generated_text"]
    with attach(lm.model, memory, mixture):
        mixed = write(PROMPTS[0], **settings)[0]["generated_text"]
        ids = torch.tensor([lm.tokenizer(PROMPTS[0])["input_ids"]])
        expected = greedy(lm.model, ids, 8, min_new_tokens=None)[0, ids.shape[1] :]
    assert mixed == lm.tokenizer.decode(expected, skip_special_tokens=True) != alone

"""A memory attached to a model: every way of calling the model sees the mixture, and nothing of it stays."""

from functools import cache

import numpy as np
import pytest
import torch
from oracle import knn, stored_entries, teacher_forced
from tiny_models import END_OF_TEXT_ID, FAMILIES, VOCAB_SIZE, tiny_model, tiny_tokenizer
from transformers import LogitsProcessorList, pipeline
from transformers.utils import logging

from memlm import Datastore, Document, KnnMixture, attach, evaluate
from memlm.errors import DatastoreMismatch, ModelError
from memlm.models import LanguageModel

FIVE = ["llama", "gpt2", "gpt_neox", "opt", "gemma2"]
TEXTS = [
    "the cat was in the house and the rain was on the roof",
    "in the morning the rain was over and a bird was singing",
    "a letter was in the box; it said that the house is sold",
]
PROMPTS = ["the rain was", "in the house and the letter"]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.set_verbosity_error()  # hints about generation settings
    yield
    logging.set_verbosity_warning()


@cache
def lm_of(family, dtype=torch.float32):
    return LanguageModel(tiny_model(family, dtype=dtype), tiny_tokenizer(), family)


@pytest.fixture(scope="module")
def attachable(tmp_path_factory):
    """Return a language model, a datastore and a mixture that changes what it says, for a family."""

    @cache
    def make(family, key_dtype="float16", dtype=torch.float32):
        lm = lm_of(family, dtype)
        documents = [Document(id=f"document {number}", text=text) for number, text in enumerate(TEXTS)]
        path = tmp_path_factory.mktemp("memories") / "memory"
        memory = Datastore.build(lm, documents, path, index="exact", key_dtype=key_dtype, show_progress=False)
        keys = stored_entries(path)[0]
        typical = float(np.median(np.square(keys[:, None] - keys[None]).sum(axis=2)))
        return lm, memory, KnnMixture(interpolation_weight=0.6, temperature=0.1 * typical, k=9)

    return make


def ids_of(text):
    return torch.tensor([[END_OF_TEXT_ID, *tiny_tokenizer()(text)["input_ids"]]])


def greedy(model, ids, tokens=12, **settings):
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False} | settings
    return model.generate(ids, **({"attention_mask": torch.ones_like(ids)} | settings))


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


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
    p_knn, ambiguous = knn(states, *stored_entries(memory.path), mixture.k, mixture.temperature, VOCAB_SIZE)
    expected = np.log(0.6 * p_knn + 0.4 * np.exp(lm_log_probs))[ids.shape[1] - 1 :]
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
@pytest.mark.parametrize("way", ["prompt lookup", "assistant", "chunked prefill", "no cache", "inputs as keyword"])
def test_other_ways_to_decode_give_the_same_text(family, way, attachable):
    lm, memory, mixture = attachable(family)
    ids = ids_of("the rain was in the rain was in the")
    settings = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": tiny_model(family, seed=1)},
        "chunked prefill": {"prefill_chunk_size": 4},
        "no cache": {"use_cache": False},
        "inputs as keyword": {"inputs": None, "input_ids": ids},
    }[way]
    calls = []
    with attach(lm.model, memory, mixture):
        expected = greedy(lm.model, ids)
        handle = lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
        got = greedy(lm.model, **({"ids": ids} | settings)) if "inputs" not in settings else lm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False)  # fmt: skip
        handle.remove()
    assert torch.equal(got, expected)
    assert len(calls) > 12 if way == "chunked prefill" else len(calls) <= 13
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


def test_an_error_inside_the_block_leaves_nothing_behind(attachable):
    lm, memory, mixture = attachable("llama")
    ids, hooks = ids_of(PROMPTS[0]), hooks_of(lm.model)
    with torch.no_grad():
        before = lm.model(ids).logits
        with pytest.raises(RuntimeError, match="interrupted"), attach(lm.model, memory, mixture):
            assert hooks_of(lm.model) == hooks + 2
            raise RuntimeError("interrupted")
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
        with pytest.raises(DatastoreMismatch, match=f"llama .LlamaForCausalLM.*{type(other).__name__}"), attach(other, memory, mixture):  # fmt: skip
            pass
        assert hooks_of(other) == hooks


@pytest.mark.parametrize("key_dtype", ["float16", "bfloat16"])
def test_bfloat16_model(key_dtype, attachable):
    lm, memory, mixture = attachable("llama", key_dtype, torch.bfloat16)
    ids = ids_of(PROMPTS[0])
    with attach(lm.model, memory, mixture), torch.no_grad():
        mixed = lm.model(ids).logits
        assert greedy(lm.model, ids).shape == (1, ids.shape[1] + 12)
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed.logsumexp(dim=-1), torch.zeros(mixed.shape[:2]), atol=1e-5)
    text = Document(id="own", text=TEXTS[0])
    sharp = KnnMixture(interpolation_weight=1.0, temperature=0.05, k=9)
    found = evaluate(lm, [text], memory, sharp, leave_out_own=False, show_progress=False)
    assert np.exp(found.log_probs).mean() > 0.9


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


def test_weight_zero_is_the_model_alone(attachable):
    lm, memory, mixture = attachable("llama")
    ids = ids_of(PROMPTS[0])
    with torch.no_grad():
        expected = lm.model(ids).logits.log_softmax(dim=-1)
        with attach(lm.model, memory, KnnMixture(interpolation_weight=0.0, temperature=1.0, k=4)):
            assert torch.allclose(lm.model(ids).logits, expected, atol=1e-6)

"""Attention memory beside caches, and in generation."""

import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import memlm
from memlm.errors import ModelError, ShapeError
from memlm.layers import memorize
from memorized import REFUSED, SOME, logits, text
from tiny_models import END_OF_TEXT_ID, tiny_model


@pytest.mark.parametrize("family", [*SOME, "mistral"])
def test_what_a_carried_cache_holds_is_not_read_from_memory_as_well(family):
    """With room for all, text read in pieces with a cache sees all of it once: as read in one piece."""
    model = tiny_model(family)
    ids = text(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :6] = 0
    memory = memorize(model, layers=[0, 1], size=64, top_k=64)
    whole = logits(model, ids, attention_mask=mask)[mask.bool()]
    memory.reset()
    cache, pieces = DynamicCache(config=model.config), []
    for start in range(0, 40, 8):
        seen = mask[:, : start + 8]
        places = (seen.cumsum(dim=1) - 1).clamp_min(0)[:, start:]
        pieces.append(
            logits(model, ids[:, start : start + 8], past_key_values=cache, attention_mask=seen, position_ids=places)
        )
    pieces = torch.cat(pieces, dim=1)[mask.bool()]
    memory.reset()
    at_once = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0))
    if family == "mistral":  # its window of 8 is shorter than the cache: memory has what the window lost
        assert not torch.allclose(pieces, whole, atol=1e-2)
        assert torch.allclose(pieces[:8], at_once[mask.bool()][:8], atol=1e-4)
    else:
        assert torch.allclose(pieces, at_once[mask.bool()], atol=1e-4)


def test_a_sliding_window_and_memory_share_the_past_between_them():
    """Everything is in the window or in memory, and nothing in both: full attention, where positions do not matter."""
    model = tiny_model("mistral")  # its window is 8
    attention = model.model.layers[0].self_attn
    ids, passed = text(1, 30), []
    memorize(model, layers=[0], size=64, top_k=64)
    attention.register_forward_hook(
        lambda _, args, kwargs, output: passed.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    cache = DynamicCache(config=model.config)
    for token in range(30):
        logits(model, ids[:, token : token + 1], past_key_values=cache)
    hidden = torch.cat([state for state, _ in passed], dim=1)
    output = torch.cat([state for _, state in passed], dim=1)
    with torch.no_grad():
        queries, keys, values = (
            getattr(attention, name)(hidden).view(1, 30, -1, 8).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        cos, sin = model.model.rotary_emb(hidden, torch.arange(30)[None])
        turned = [turn(part, cos, sin) for part in (queries, keys.repeat_interleave(2, 1))]
        near = torch.ones(30, 30, dtype=torch.bool).triu(-7)
        scores = torch.where(near, turned[0] @ turned[1].mT, queries @ keys.repeat_interleave(2, 1).mT) * 8**-0.5
        shares = scores.masked_fill(torch.ones(30, 30, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
        expected = (shares @ values.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
        assert torch.allclose(attention.o_proj(expected), output, atol=1e-4)


def turn(tensor, cos, sin):
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos + torch.cat([-second, first], dim=-1) * sin


@pytest.mark.parametrize("family", SOME)
def test_generate_reads_the_document_from_memory(family):
    model = tiny_model(family)
    memory = memorize(model, layers=[1], size=64, top_k=4)
    document, prompts = text(2, 20, 3), text(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    prompts[0, :4] = END_OF_TEXT_ID
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": END_OF_TEXT_ID, "eos_token_id": None}

    def generated(ids, mask, rows, **more):
        memory.reset()
        logits(model, document[rows])
        with memory.read_only():
            return model.generate(ids, attention_mask=mask, **options, **more)[:, ids.shape[1] :]

    together = generated(prompts, mask, [0, 1])
    assert torch.equal(together[:1], generated(prompts[:1, 4:], mask[:1, 4:], [0]))
    assert torch.equal(together[1:], generated(prompts[1:], mask[1:], [1]))
    beams = generated(prompts, mask, [0, 1], num_beams=3)
    assert torch.equal(beams[:1], generated(prompts[:1], mask[:1], [0], num_beams=3))
    assert torch.equal(beams[1:], generated(prompts[1:], mask[1:], [1], num_beams=3))
    assert not torch.equal(beams, generated(prompts, mask, [1, 0], num_beams=3))
    assert memory.memories[1].store.written.tolist() == [20, 20]
    memory.reset()
    logits(model, document)
    step = model.generate(prompts, attention_mask=mask, **options)  # outside the block it is remembered
    assert torch.equal(step[:, 9:], together)
    logits(model, document)
    assert memory.memories[1].store.written.tolist() == [20 + 5 + 4, 20 + 9 + 4]
    with pytest.raises(ShapeError, match=r"generate inside `with memory.read_only\(\):`"):
        model.generate(prompts, attention_mask=mask, num_beams=3, **options)


def test_the_page_runs_as_it_is_written():
    page = (Path(__file__).parent.parent / "docs" / "memorizing.md").read_text()
    names = {"memlm": memlm}
    exec(compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "docs/memorizing.md", "exec"), names)
    assert names["loss"] > 0
    for family in REFUSED & {"gptj", "falcon", "bloom", "mpt", "gpt_oss", "cohere2"}:
        name = {"gptj": "GPT-J", "gpt_oss": "gpt-oss", "cohere2": "Cohere 2"}.get(family, family)
        assert name.lower() in page.lower()


def test_several_samples_of_a_row_read_its_memory():
    model = tiny_model("gpt2")
    memory = memorize(model, layers=[1], size=64, top_k=4)
    logits(model, text(2, 20, 3))
    with memory.read_only():
        logits_of = model.generate(
            text(2, 9), max_new_tokens=1, num_return_sequences=3, do_sample=True, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        ).logits[0]  # fmt: skip
        expected = logits(model, text(2, 9))[:, -1]
    assert torch.allclose(logits_of, expected.repeat_interleave(3, dim=0), atol=1e-4)


def test_beams_are_scored_as_a_plain_pass_scores_them():
    model = tiny_model("llama")
    memory = memorize(model, layers=[1], size=64, top_k=4)
    logits(model, text(1, 20, 3))
    with memory.read_only():
        found = model.generate(
            text(1, 9), max_new_tokens=4, num_beams=4, do_sample=False, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, num_return_sequences=4, length_penalty=0.0,
        )  # fmt: skip
        scores = logits(model, found.sequences).log_softmax(-1)[:, 8:-1]
    sums = scores.gather(2, found.sequences[:, 9:, None]).sum(dim=(1, 2))
    assert torch.allclose(sums, found.sequences_scores, atol=1e-4)


def test_assisted_decoding_needs_a_memory_that_stays_as_it_is():
    model, assistant = tiny_model("llama"), tiny_model("llama", seed=1)
    memory = memorize(model, layers=[1], size=64, top_k=4)
    logits(model, text(1, 20, 3))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with memory.read_only():
        plain = model.generate(text(1, 9), **options)
        assert torch.equal(model.generate(text(1, 9), assistant_model=assistant, **options), plain)
    with pytest.raises(ModelError, match="past_key_values was cut back"):
        model.generate(text(1, 9), assistant_model=assistant, **options)


def test_a_cache_may_go_on_through_a_block_that_only_reads():
    """What the cache holds and memory does not is still counted once."""
    model = tiny_model("llama")
    memory = memorize(model, layers=[1], size=64, top_k=64)
    ids = text(2, 40)
    whole = DynamicCache(config=model.config)
    expected = [logits(model, part, past_key_values=whole) for part in ids.split(10, dim=1)]
    memory.reset()
    cache, found = DynamicCache(config=model.config), []
    first, *rest = ids.split(10, dim=1)
    found.append(logits(model, first, past_key_values=cache))
    with memory.read_only():
        found += [logits(model, part, past_key_values=cache) for part in rest]
        alone = logits(model, rest[0])  # without the cache: now memory has what was written
    assert torch.allclose(torch.cat(found, 1), torch.cat(expected, 1), atol=1e-4)
    assert memory.memories[1].store.written.tolist() == [10, 10]
    memory.reset()
    assert not torch.allclose(alone, logits(model, rest[0]), atol=1e-2)

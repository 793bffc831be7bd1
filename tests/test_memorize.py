"""Models with attention memory: surgery, streams of documents, caches, generation, training, saving."""

import copy
import gc
import json
import re
import resource
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import memlm
from memlm.errors import ConfigError, FormatVersionError, ModelError, ShapeError, UnsupportedArchitecture
from memlm.layers import AttentionMemory, forget, load_attention_memory, memorize, memory_of, save_attention_memory
from memlm.ops import nearest_keys
from memlm.training import document_streams
from tiny_models import END_OF_TEXT_ID, FAMILIES, tiny_model

# attention of their own, sinks, or layers without rotary positions
REFUSED = {"gpt_neo", "gptj", "bloom", "mpt", "falcon", "falcon_sequential", "gpt_oss", "cohere2"}
SOME = ("llama", "gpt2", "gpt_neox", "qwen2", "qwen3")


def text(rows=2, tokens=12, seed=0):
    return torch.randint(0, 200, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **more):
    return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - REFUSED))
def test_an_empty_memory_changes_nothing_and_a_full_one_does(family):
    model = tiny_model(family)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    names = set(model.state_dict())
    plain, padded, other = (
        logits(model, text()),
        logits(model, text(), attention_mask=mask),
        logits(model, text(seed=1)),
    )
    memory = memorize(model, layers=[0, 1], size=64, top_k=4)
    assert torch.equal(logits(model, text()), plain)
    assert not torch.allclose(logits(model, text(seed=1)), other, atol=1e-2)
    memory.reset()
    assert torch.equal(logits(model, text(), attention_mask=mask)[mask.bool()], padded[mask.bool()])
    assert memory.memories[1].waits
    assert set(model.state_dict()) == names
    forget(model)
    assert torch.equal(logits(model, text(seed=1)), other)
    assert not [module for module in model.modules() if isinstance(module, AttentionMemory)]
    assert not [module for module in model.modules() if module._forward_pre_hooks]


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_that_compute_attention_their_own_way_are_refused_and_left_alone(family):
    model = tiny_model(family)
    before = logits(model, text())
    with pytest.raises(UnsupportedArchitecture):
        memorize(model, layers=[0, 1])
    assert torch.equal(logits(model, text()), before)
    with pytest.raises(ModelError, match="has no attention memory"):
        forget(model)


def test_layers_that_do_not_exist_and_a_second_memory_are_refused():
    model = tiny_model("llama")
    for layers in ([2], [-3], [], [1, -1]):
        with pytest.raises(ConfigError, match="layer"):
            memorize(model, layers=layers)
    memorize(model, layers=[-2])
    with pytest.raises(ModelError, match="has a memory already"):
        memorize(model)
    assert list(memory_of(model).memories) == [0]
    forget(model)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no rotary positions"):
        memorize(tiny_model("gpt2"), positions="rebased")


def farthest_from_alone(family):
    """Read three documents in two rows, and each alone; return the largest difference and what rolled rows gave.

    A row with memory gives what it gives alone, whatever its neighbors read and when they begin.
    """
    model = tiny_model(family)
    memory = memorize(model, layers=[1], size=24, top_k=4)
    documents = [text(1, 50, seed) for seed in range(3)]
    alone = []
    for document in documents:
        memory.reset()
        alone.append(torch.cat([logits(model, part) for part in document.split(10, dim=1)], dim=1))
    memory.reset()
    # row 0 reads documents 0 and 2, row 1 reads document 1 beside them, from the second segment on
    first = [*documents[0].split(10, dim=1), *documents[2].split(10, dim=1)]
    second = [text(1, 10, 9), *documents[1].split(10, dim=1), *text(1, 40, 9).split(10, dim=1)]
    seen = []
    for number, (one, two) in enumerate(zip(first, second, strict=True)):
        memory.reset([number in (0, 5), number in (0, 1)])
        seen.append(logits(model, torch.cat([one, two])))
    rows = torch.cat(seen, dim=1)
    pairs = (rows[0, :50], alone[0][0]), (rows[0, 50:], alone[2][0]), (rows[1, 10:60], alone[1][0])
    return max((one - other).abs().max().item() for one, other in pairs), (model, memory)


@pytest.mark.parametrize("family", SOME)
def test_rows_are_independent_documents(family):
    difference, (model, memory) = farthest_from_alone(family)
    assert difference < 1e-4
    with memory.reading_from([1, 0]):  # control: rows that read each other's memory are something else
        rolled = logits(model, text(2, 10, 4))
    assert not torch.allclose(rolled, logits(model, text(2, 10, 4)), atol=1e-2)


def test_without_the_mask_rows_that_began_again_would_show(monkeypatch):
    """Negative control: what is left in the slots of a row that was reset is read."""

    def unmasked(queries, keys, places, before, k):
        slots, found = nearest_keys(queries, keys, places.abs(), before.clamp_min(1 << 40), k)
        return slots, torch.ones_like(found)

    monkeypatch.setattr("memlm.layers._ring.nearest_keys", unmasked)
    assert farthest_from_alone("llama")[0] > 1e-2


def test_written_before_it_reads_a_pass_would_find_itself(monkeypatch):
    """Negative control for the test below."""
    model = tiny_model("llama")
    plain = logits(model, text())
    memorize(model, layers=[1], size=64, top_k=4)
    attend = ALL_ATTENTION_FUNCTIONS["memlm_memory"]

    def too_early(*args, memlm_call, **kwargs):
        attend(*args, memlm_call=memlm_call, **kwargs)
        memlm_call.memory.remember()
        return attend(*args, memlm_call=memlm_call, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "memlm_memory", too_early)
    assert not torch.allclose(logits(model, text(), use_cache=False), plain, atol=1e-2)


def test_a_pass_does_not_find_itself():
    model = tiny_model("llama")
    plain = logits(model, text())
    memory = memorize(model, layers=[1], size=64, top_k=4)
    assert torch.equal(logits(model, text()), plain)  # writing before reading would show here
    again = logits(model, text())
    assert not torch.allclose(again, plain, atol=1e-2)
    memory.reset([False, True])
    assert torch.equal(logits(model, text())[1], plain[1])
    memory.reset()
    assert torch.equal(logits(model, text()), plain)


@pytest.mark.parametrize("family", SOME)
def test_padding_is_not_remembered(family):
    model = tiny_model(family)
    memory = memorize(model, layers=[1], size=64, top_k=4)
    document = text(1, 30)
    for part in document.split([8, 10, 12], dim=1):
        plain = logits(model, part)
    memory.reset()
    for number, part in enumerate(document.split([8, 10, 12], dim=1)):
        padding = 13 - part.shape[1]
        ids = torch.nn.functional.pad(part, (padding, 0), value=END_OF_TEXT_ID)
        mask = (torch.arange(13) >= padding).long()[None]
        if number == 1:  # and on the other side
            ids, mask = ids.roll(-padding, 1), mask.roll(-padding, 1)
        places = (mask.cumsum(dim=1) - 1).clamp_min(0)
        padded = logits(model, ids, attention_mask=mask, position_ids=places)
    assert torch.allclose(padded[:, 1:], plain, atol=1e-4)
    assert memory.memories[1].store.written.tolist() == [18]
    with pytest.raises(ModelError, match="does not say which tokens are padding"):
        logits(model, ids, attention_mask=torch.zeros(1, 1, 13, 13))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_that_have_no_text_left_are_padding(attention):
    """The batches of `document_streams` end so."""
    model = tiny_model("llama")
    model.set_attn_implementation(attention)
    memory = memorize(model, layers=[0, 1], size=24, top_k=4)
    documents = [text(1, 50)[0].numpy(), text(1, 13, 1)[0].numpy()]
    seen = []
    for batch in document_streams(documents, rows=2, length=10):
        memory.reset(batch.begins)
        seen.append(logits(model, batch.input_ids, attention_mask=batch.known))
        assert seen[-1].isfinite().all()
    assert memory.state_dict()["1.written"].tolist() == [49, 12]
    memory.reset()
    alone = [logits(model, torch.from_numpy(part)[None]) for part in (documents[0][:40].reshape(4, 10))]
    assert torch.allclose(torch.cat(seen[:4], dim=1)[0], torch.cat(alone, dim=1)[0], atol=1e-4)


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


@pytest.mark.parametrize("combine", ["joint", "gate", "null_slot"])
def test_gradient_reaches_queries_through_memory_and_never_what_was_written(combine):
    model = tiny_model("llama")
    memory = memorize(model, layers=[1], size=64, top_k=4, combine=combine, drop_off="age", projections="own_queries")
    first, second = model.model.embed_tokens(text()), model.model.embed_tokens(text(seed=1))
    first = first.detach().requires_grad_()
    model(inputs_embeds=first)
    output = model(inputs_embeds=second).logits
    output.logsumexp(-1).sum().backward()
    assert first.grad is None  # what was written has no graph
    assert all(parameter.grad.abs().sum() > 0 for parameter in memory.parameters())
    attention = model.model.layers[1].self_attn
    with_memory = {name: getattr(attention, name).weight.grad.clone() for name in ("q_proj", "k_proj", "v_proj")}
    # memory alone: local attention is left out of the sum by a weight of one
    if combine == "gate":
        model.zero_grad()
        with torch.no_grad():
            memory.memories[1].gate.fill_(100.0)
        model(inputs_embeds=second.detach()).logits.logsumexp(-1).sum().backward()
        assert attention.q_proj.weight.grad.abs().sum() > 0
        assert attention.k_proj.weight.grad.abs().sum() == 0
        assert attention.v_proj.weight.grad.abs().sum() == 0
        assert with_memory["k_proj"].abs().sum() > 0


def test_checkpointing_accumulation_and_autocast_give_the_same_gradients():
    def gradients(checkpointing, autocast=False):
        model = tiny_model("llama").train()
        memorize(model, layers=[0, 1], size=64, top_k=4, combine="null_slot")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for seed in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = model(text(seed=seed), use_cache=False).logits
            out.float().logsumexp(-1).mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed, half = gradients(False), gradients(True), gradients(False, autocast=True)
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name
        assert half[name].isfinite().all()
    name = "model.layers.1.self_attn.memory.null"
    assert torch.allclose(plain[name], half[name], atol=0.3 * float(plain[name].abs().max()))


def test_evaluation_aside_leaves_the_memory_of_training_alone():
    model = tiny_model("llama")
    memory = memorize(model, layers=[1], size=64, top_k=4)
    plain = logits(model, text(3, 12))
    memory.reset()
    logits(model, text(seed=1))
    kept = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    with memory.aside():
        assert torch.equal(logits(model, text(3, 12)), plain)  # other rows, and nothing in memory
        logits(model, text(3, 12))
    state = memory.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert len(state) == len(kept) == 3


def test_a_copy_of_a_model_has_a_memory_of_its_own():
    model = tiny_model("llama")
    memorize(model, layers=[1], size=64, top_k=4)
    logits(model, text())
    twin = copy.deepcopy(model)
    expected = logits(model, text(seed=1))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    logits(model, text(), attention_mask=mask)
    assert torch.equal(logits(twin, text(seed=1)), expected)
    assert memory_of(twin).state_dict()["1.written"].tolist() == [24, 24]
    assert memory_of(model).state_dict()["1.written"].tolist() == [24 + 8, 24 + 12]
    memory_of(twin).reset()
    forget(twin)
    assert memory_of(model).memories[1].store.rows == 2


@pytest.mark.parametrize("family", SOME)
def test_saved_in_the_middle_of_a_document_it_goes_on_bit_for_bit(family, tmp_path):
    model = tiny_model(family)
    memory = memorize(model, layers=[1], size=16, top_k=4, combine="gate", drop_off="age")
    with torch.no_grad():
        memory.memories[1].gate.normal_()
    for seed in range(3):
        logits(model, text(seed=seed))
    model.save_pretrained(tmp_path)
    save_attention_memory(model, tmp_path)
    going_on = [logits(model, text(seed=seed)) for seed in range(3, 6)]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = load_attention_memory(again, tmp_path)
    assert asdict(loaded.settings) == asdict(memory.settings)
    for seed, expected in zip(range(3, 6), going_on, strict=True):
        assert torch.equal(logits(again, text(seed=seed)), expected)


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="does not exist"):
        load_attention_memory(model, tmp_path)
    memorize(model, layers=[1], size=16, top_k=4, combine="gate")
    logits(model, text())
    save_attention_memory(model, tmp_path)
    forget(model)
    path = tmp_path / "attention_memory.safetensors"
    tensors = load_file(path)
    described = {"version": 1, "layers": [1], "settings": {"size": 16, "combine": "gate"}}

    def rewritten(tensors, **changes):
        save_file(tensors, path, {"memlm": json.dumps(described | changes)})

    rewritten(tensors, version=2)
    with pytest.raises(FormatVersionError, match="has version 2"):
        load_attention_memory(model, tmp_path)
    for changes in ({"layers": [7]}, {"settings": {"size": 16, "combine": "none of these"}}):
        rewritten(tensors, **changes)
        with pytest.raises(ConfigError):
            load_attention_memory(model, tmp_path)
    for wrong in (
        {name: tensor for name, tensor in tensors.items() if "gate" not in name},
        {name: tensor[:1] for name, tensor in tensors.items()},
        {name: tensor for name, tensor in tensors.items() if "written" not in name},
    ):
        rewritten(wrong)
        with pytest.raises(ModelError, match="does not fit this model"):
            load_attention_memory(model, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged"):
        load_attention_memory(model, tmp_path)
    with pytest.raises(ModelError, match="has no attention memory"):
        memory_of(model)


def test_a_thousand_segments_leave_memory_use_flat():
    """No graph and no buffer outlives its segment; the resident set is measured by the operating system."""
    model = tiny_model("llama")
    memorize(model, layers=[1], size=256, top_k=8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    tensors = []
    peaks = []
    for number in range(1000):
        ids = text(2, 16, number)
        out = model(ids).logits
        cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number in (100, 999):
            del out
            gc.collect()
            tensors.append(sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects()))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert tensors[1] <= tensors[0]
    assert peaks[1] - peaks[0] < 10_000  # KiB; one graph a segment that stayed would be 100 KiB each

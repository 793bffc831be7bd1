"""Models with attention memory: surgery, streams of documents, training."""

import copy
import gc
import resource

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memlm.errors import ConfigError, ModelError, ShapeError, UnsupportedArchitecture
from memlm.layers import AttentionMemory, forget, memorize, memory_of
from memlm.ops import nearest_keys
from memlm.training import document_streams
from memorized import REFUSED, SOME, logits, text
from tiny_models import END_OF_TEXT_ID, FAMILIES, tiny_model


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
        memlm_call.memory.begin(None)
        return attend(*args, memlm_call=memlm_call, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "memlm_memory", too_early)
    assert not torch.allclose(logits(model, text(), use_cache=False), plain, atol=1e-2)


def test_one_mask_for_all_rows_is_that_of_each():
    model = tiny_model("llama")
    memorize(model, layers=[1], size=16, top_k=4)
    with torch.no_grad():
        model(text(1, 6).repeat(2, 1), attention_mask=torch.ones(1, 6))
        first, second = model(text(1, 6, 1).repeat(2, 1)).logits
    torch.testing.assert_close(second, first)


def test_rows_that_there_are_not_cannot_be_reset():
    model = tiny_model("llama")
    memory = memorize(model, layers=[1], size=16, top_k=4)
    logits(model, text(2, 6))
    memory.reset([])
    assert memory.state_dict()["1.written"].tolist() == [6, 6]
    for rows in ([2], [-1], [True], [0.0, 1.0]):
        with pytest.raises(ShapeError, match="reset has"):
            memory.reset(rows)
    memory.reset([1])
    assert memory.state_dict()["1.written"].tolist() == [6, 0]


def test_a_memory_of_size_0_is_none():
    model = tiny_model("llama")
    plain = logits(model, text())
    memorize(model, layers=[0, 1], size=0)
    for _ in range(3):
        assert torch.equal(logits(model, text()), plain)


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


@pytest.mark.parametrize("between", ["a pass", "reset"])
def test_checkpointing_after_memory_went_on_is_refused(between):
    model = tiny_model("llama").train()
    memory = memorize(model, layers=[1], size=8, top_k=4)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for seed in range(2):
        loss = model(text(1, 8, seed), labels=text(1, 8, seed), use_cache=False).loss
        loss.backward()
    loss = model(text(1, 8, 2), labels=text(1, 8, 2), use_cache=False).loss
    if between == "reset":
        memory.reset()
    else:
        model(text(1, 8, 3), use_cache=False)
    with pytest.raises(ModelError, match=r"call backward\(\) before the next pass"):
        loss.backward()


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

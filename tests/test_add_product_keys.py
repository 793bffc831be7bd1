"""Product keys inside Hugging Face decoders: every family, decoding, training, saving, and learning new text alone."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlm.errors import ConfigError, ModelError, UnsupportedArchitecture
from memlm.layers import (
    ProductKeySettings,
    add_product_keys,
    choose_slots,
    count_slot_usage,
    load_product_keys,
    product_key_memories,
    product_key_optimizers,
    remove_product_keys,
    save_product_keys,
    training_slots_only,
)
from memlm.models import find_key_site
from tiny_models import END_OF_TEXT_ID, FAMILIES, VOCAB_SIZE, tiny_model

IDS = torch.randint(VOCAB_SIZE - 1, (2, 12), generator=torch.Generator().manual_seed(1))
SETTINGS = ProductKeySettings(sub_keys=8, heads=2, k=4, key_width=8)
EXPERTS = {"mixtral", "qwen3_moe", "gpt_oss"}
WITHOUT_MODULE = {"opt", "opt_post_norm"}
FITTING = sorted(set(FAMILIES) - WITHOUT_MODULE)
MAIN = ["llama", "gpt2", "gpt_neox", "qwen3"]
PLACES = ["beside", "replace"]


def logits(model, ids=IDS, **settings):
    with torch.no_grad():
        return model(ids, **settings).logits


def changed(family, placement="beside", settings=SETTINGS, seed=0):
    """A model with a memory in its last layer that says something."""
    model = tiny_model(family)
    torch.manual_seed(seed)
    (memory,) = add_product_keys(model, [1], settings, placement=placement).values()
    torch.nn.init.normal_(memory.values)
    return model


@pytest.mark.parametrize("family", FITTING)
def test_beside_changes_nothing_at_first_and_something_when_it_has_learned(family):
    model = tiny_model(family)
    before, state = logits(model), {name: item.clone() for name, item in model.state_dict().items()}
    memories = add_product_keys(model, [0, 1], SETTINGS)
    assert list(memories) == [0, 1]
    assert torch.equal(logits(model), before)
    assert state.keys() <= model.state_dict().keys()  # the model's own weights keep their names
    assert {name for name in model.state_dict() if name not in state} == {
        f"{path}.{name}" for path, memory in product_key_memories(model).items() for name in memory.state_dict()
    }
    torch.nn.init.normal_(memories[1].values)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    remove_product_keys(model)
    assert torch.equal(logits(model), before)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], item) for name, item in state.items())
    assert not product_key_memories(model)


@pytest.mark.parametrize("family", FITTING)
def test_in_the_place_of_a_feed_forward_layer_and_back(family):
    model = tiny_model(family)
    before, count = logits(model), sum(item.numel() for item in model.parameters())
    if family in EXPERTS:
        with pytest.raises(UnsupportedArchitecture, match=r"mixture of experts.*beside"):
            add_product_keys(model, [0], SETTINGS, placement="replace")
        assert torch.equal(logits(model), before)
        return
    (memory,) = add_product_keys(model, [1], SETTINGS, placement="replace").values()
    own = sum(item.numel() for item in memory.parameters())
    assert sum(item.numel() for item in model.parameters()) < count + own  # the layer is not there
    with_values = logits(model)
    assert not torch.allclose(with_values, before, atol=1e-3)
    torch.nn.init.zeros_(memory.values)
    silent = logits(model)
    assert not torch.allclose(silent, with_values, atol=1e-3)
    assert torch.isfinite(silent).all()
    remove_product_keys(model)
    assert torch.equal(logits(model), before)
    assert sum(item.numel() for item in model.parameters()) == count


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_the_residual_stays_in_families_whose_feed_forward_adds_it(family):
    model = tiny_model(family)
    (memory,) = add_product_keys(model, [1], SETTINGS, placement="replace").values()
    torch.nn.init.zeros_(memory.values)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        final = next(module for name, module in model.named_modules() if name.endswith(("ln_f", "norm_f")))
    attention = states[1]  # before the last layer: its feed-forward gives nothing, so only attention is added
    seen = []
    handle = final.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    assert float((seen[0] - attention).norm()) < 20 * float(attention.norm())
    cosine = torch.nn.functional.cosine_similarity(seen[0] - attention, attention, dim=-1)
    assert float(cosine.abs().mean()) < 0.9  # the difference is no copy of the residual


@pytest.mark.parametrize("family", sorted(WITHOUT_MODULE))
def test_a_feed_forward_that_is_no_module_is_refused(family):
    with pytest.raises(UnsupportedArchitecture, match=r"feed-forward of model\.decoder\.layers\.0 is no module"):
        add_product_keys(tiny_model(family), [0], SETTINGS)


@pytest.mark.parametrize(
    ("layers", "settings", "said"),
    [
        ([2], {}, "LlamaForCausalLM has no layer 2; expected 0 to 1"),
        ([-1], {}, "no layer -1"),
        ([0, 0], {}, "layers are 0, 0; expected different ones"),
        ([], {}, "no layer is named"),
        ([0], {"placement": "above"}, "placement is 'above'; expected one of beside, replace"),
    ],
)
def test_bad_layers(layers, settings, said):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=said):
        add_product_keys(model, layers, SETTINGS, **settings)
    assert not product_key_memories(model)


def test_twice_the_same_layer_and_nothing_to_remove():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="nothing to remove"):
        remove_product_keys(model)
    add_product_keys(model, [0], SETTINGS)
    with pytest.raises(ConfigError, match="layer 0 has a memory of product keys already"):
        add_product_keys(model, [1, 0], SETTINGS)
    assert len(product_key_memories(model)) == 1
    add_product_keys(model, [1], SETTINGS, placement="replace")
    assert [path.split(".")[2] for path in product_key_memories(model)] == ["0", "1"]


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", MAIN)
def test_generation_alone_in_a_padded_batch_and_by_beams(family, placement):
    model = changed(family, placement)
    alone = model.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False)
    padding = torch.full((1, 3), END_OF_TEXT_ID)
    batch = torch.cat([torch.cat([padding, IDS[:1, :5]], dim=1), IDS[1:, :8]])
    mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert together[0, 3 : 3 + alone.shape[1]].tolist() == alone[0].tolist()
    ids = alone
    stepwise = torch.cat([logits(model, ids[:, :n])[:, -1:] for n in range(5, ids.shape[1])], dim=1)
    assert stepwise.argmax(-1).tolist() == ids[:, 5:].tolist()
    beams = model.generate(IDS[:, :5], max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams.shape[0] == 2
    without = tiny_model(family).generate(IDS[:1, :5], max_new_tokens=6, do_sample=False)
    assert without.tolist() != alone.tolist()  # the memory has a say


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", [*MAIN, "qwen3_moe"])
def test_saved_beside_the_model_and_loaded(family, placement, tmp_path):
    if family in EXPERTS and placement == "replace":
        return
    settings = ProductKeySettings(sub_keys=8, heads=2, k=4, key_width=8, query_normalization="batch")
    model = changed(family, placement, settings)
    with torch.no_grad():
        for item in model.parameters():  # everything was trained
            item.add_(0.01)
    model.save_pretrained(tmp_path)
    save_product_keys(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    load_product_keys(again, tmp_path)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    assert json.loads((tmp_path / "product_keys.json").read_text())["layers"]["1"]["placement"] == placement
    third = changed(family, placement, settings, seed=5)
    third.load_state_dict(model.state_dict())
    assert torch.equal(logits(third.eval()), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_what_cannot_be_loaded(tmp_path):
    model = changed("llama")
    with pytest.raises(ModelError, match="nothing to save"):
        save_product_keys(tiny_model("llama"), tmp_path)
    with pytest.raises(ConfigError, match=r"product_keys\.json is not there"):
        load_product_keys(tiny_model("llama"), tmp_path)
    save_product_keys(model, tmp_path)
    with pytest.raises(ConfigError, match="the model has product keys already"):
        load_product_keys(model, tmp_path)
    described = json.loads((tmp_path / "product_keys.json").read_text())

    def refused(change, said):
        (tmp_path / "product_keys.json").write_text(json.dumps(change))
        fresh = tiny_model("llama")
        with pytest.raises(ConfigError, match=said):
            load_product_keys(fresh, tmp_path)
        assert not product_key_memories(fresh)

    refused(described | {"format": 2}, "is not of format 1")
    refused([], "is not of format 1")
    refused({"format": 1, "layers": {"7": described["layers"]["1"]}}, "do not fit the model: .*no layer 7")
    refused({"format": 1, "layers": {"0": described["layers"]["1"]}}, "do not fit the model")
    refused({"format": 1, "layers": {"1": {"placement": "beside"}}}, "do not fit the model: 'settings'")
    other = described["layers"]["1"] | {"settings": described["layers"]["1"]["settings"] | {"sub_keys": 9}}
    refused({"format": 1, "layers": {"1": other}}, "do not fit the model: size mismatch")
    (tmp_path / "product_keys.safetensors").write_bytes(b"damaged")
    refused(described, "damaged product keys")


def gradients(model, checkpointing=False):
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    return {
        name: item.grad.to_dense() if item.grad.is_sparse else item.grad
        for name, item in model.named_parameters()
        if item.grad is not None
    }


@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("family", MAIN)
def test_gradient_checkpointing_changes_no_gradient(family, placement):
    plain, saved = gradients(changed(family, placement)), gradients(changed(family, placement), checkpointing=True)
    assert plain.keys() == saved.keys() == dict(changed(family, placement).named_parameters()).keys()
    assert all(torch.allclose(plain[name], saved[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("placement", PLACES)
def test_half_precision_by_autocast_and_as_the_models_type(placement):
    model = changed("llama", placement)
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(next(iter(product_key_memories(model).values())).values.grad.to_dense()).all()
    half = tiny_model("llama", dtype=torch.bfloat16)
    add_product_keys(half, [1], SETTINGS, placement=placement)
    assert next(iter(product_key_memories(half).values())).values.dtype == torch.bfloat16
    assert logits(half).dtype == torch.bfloat16
    assert torch.isfinite(expected).all()
    model.to(torch.bfloat16)
    remove_product_keys(model)
    assert torch.equal(logits(model), logits(tiny_model("llama").to(torch.bfloat16)))


@pytest.mark.parametrize("placement", PLACES)
def test_it_learns_a_text(placement):
    model = tiny_model("llama")
    add_product_keys(model, [1], SETTINGS, placement=placement)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("product_keys" in name)
    optimizers = product_key_optimizers(model, learning_rate=0.01, value_learning_rate=0.2)
    losses = []
    for _ in range(40):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_key_site_is_still_found_and_experts_count_as_one():
    assert find_key_site(changed("llama")).path == "model.layers.1.mlp"
    model = changed("qwen3_moe")
    assert logits(model).shape == (2, 12, VOCAB_SIZE)


@pytest.mark.parametrize("family", MAIN)
def test_padding_is_not_counted(family):
    model = changed(family)
    padded = torch.cat([torch.full((2, 5), END_OF_TEXT_ID), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(IDS)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with count_slot_usage(model) as plain:
        logits(model)
    with count_slot_usage(model) as masked:
        logits(model, padded, attention_mask=mask, **({} if family == "bloom" else {"position_ids": positions}))
    with count_slot_usage(model) as unmasked:
        logits(model, padded)
    (plain,), (masked,), (unmasked,) = plain.values(), masked.values(), unmasked.values()
    assert int(plain.reads.sum()) == 2 * 12 * 8
    assert torch.equal(masked.reads, plain.reads)
    assert torch.allclose(masked.weights, plain.weights, atol=1e-4)
    assert int(unmasked.reads.sum()) == 2 * 17 * 8  # the check can fail
    if family == "llama":
        with count_slot_usage(model) as positional:
            logits_of = model(padded, mask).logits  # not by name
        assert logits_of.requires_grad
        assert int(next(iter(positional.values())).reads.sum()) == 2 * 12 * 8
    assert 0 < plain.share <= 1
    assert plain.divergence > 0


def test_padding_is_not_counted_while_generating():
    model = changed("llama")
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with count_slot_usage(model) as usages:
        model.generate(IDS, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    (usage,) = usages.values()
    assert int(usage.reads.sum()) == (int(mask.sum()) + 2 * 2) * 8  # the last token is not read
    (memory,) = product_key_memories(model).values()
    assert memory.observer is None
    assert not model._forward_pre_hooks


def texts_apart(model):
    """New ids, and other ids that read none of the slots chosen for the new ones."""
    generator = torch.Generator().manual_seed(3)
    new = torch.randint(20, (1, 10), generator=generator)
    others = [torch.randint(20, VOCAB_SIZE - 1, (1, 10), generator=generator) for _ in range(40)]
    with count_slot_usage(model) as of_new:
        logits(model, new)
    with count_slot_usage(model) as of_others:
        for other in others:
            logits(model, other)
    (path,) = of_new
    chosen = choose_slots(of_new[path], of_others[path], 12)
    apart = []
    for other in others:
        with count_slot_usage(model) as usages:
            logits(model, other)
        if not usages[path].reads[chosen].sum():
            apart.append(other)
    return new, apart, {path: chosen}


@pytest.mark.parametrize("gradient", ["sparse", "dense"])
def test_new_text_is_learned_and_text_that_reads_other_slots_stays_bit_for_bit(gradient):
    settings = ProductKeySettings(sub_keys=16, heads=2, k=3, key_width=8, value_gradient=gradient)
    model = changed("llama", settings=settings)
    new, apart, slots = texts_apart(model)
    assert apart
    before, first = [logits(model, other) for other in apart], logits(model, new)

    def learn():
        losses = []
        for optimizer in product_key_optimizers(model, learning_rate=0.1, value_learning_rate=0.5)[-1:]:
            for _ in range(20):
                loss = model(new, labels=new).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
        return losses

    with training_slots_only(model, slots):
        losses = learn()
    print(losses)
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.allclose(logits(model, new), first, atol=1e-2)
    assert all(torch.equal(logits(model, other), mine) for other, mine in zip(apart, before, strict=True))
    learn()  # control: without the mask other text changes
    assert not all(torch.equal(logits(model, other), mine) for other, mine in zip(apart, before, strict=True))


def test_the_examples_of_the_page_run_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "product-keys.md").read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    again = AutoModelForCausalLM.from_pretrained("model")
    load_product_keys(again, "model")
    assert next(iter(product_key_memories(again).values())).settings == names["settings"]
    assert sum(map(len, names["slots"].values())) > 0
    assert [type(item).__name__ for item in names["optimizers"]] == ["SparseAdam"]

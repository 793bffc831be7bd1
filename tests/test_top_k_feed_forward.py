"""Top-k feed-forward layers inside models of transformers."""

import copy

import pytest
import torch

import top_k_oracle
from memlm.errors import ConfigError, UnsupportedArchitecture
from memlm.layers import top_k_attention, top_k_feed_forward
from tiny_models import END_OF_TEXT_ID, tiny_model

# a gate; two matrices laid the other way; with biases; gate and factor in one matrix; models with their own attention
FAMILIES = ["llama", "gpt2", "gpt_neox", "phi3", "gptj", "gemma2", "starcoder2", "falcon"]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))


def feed_forward(model, layer=1):
    base = model.model if hasattr(model, "model") else model.base_model
    layers = next(part for name in ("layers", "h") if (part := getattr(base, name, None)) is not None)
    return layers[layer].mlp


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_units_it_is_the_layer_itself(family, ids):
    model = tiny_model(family)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(ids).logits
        with top_k_feed_forward(model, k=10**6, chunk_size=5):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=2e-5)
            assert list(model.state_dict()) == names
        assert torch.equal(model(ids).logits, expected)  # as it was, bit for bit
        assert "forward" not in vars(feed_forward(model))
        with top_k_feed_forward(model, [1], k=8):
            assert (model(ids).logits - expected).abs().max() > 0.1


def matrices(module):
    """Return (first, factor, values, bias of the result) of a layer, in float64."""
    with_names = dict(module.named_parameters())
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in with_names.items()}
    if "c_fc.weight" in double:
        return (double["c_fc.weight"].T, double["c_fc.bias"]), None, double["c_proj.weight"], double["c_proj.bias"]
    if "gate_up_proj.weight" in double:
        gate, up = double["gate_up_proj.weight"].chunk(2)
        return (gate, None), (up, None), double["down_proj.weight"].T, 0
    gate, up = double["gate_proj.weight"], double["up_proj.weight"]
    return (gate, None), (up, None), double["down_proj.weight"].T, 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
@pytest.mark.parametrize("by", ["score", "size"])
def test_with_fewer_units_it_is_the_dense_computation_masked(family, by):
    model = tiny_model(family)
    module = feed_forward(model)
    first, factor, values, bias = matrices(module)
    activation = next(child for name, child in module.named_children() if "act" in name)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    outside = hidden.double().requires_grad_()
    expected = top_k_oracle.feed_forward(outside, first, values, 12, activation, factor, by) + bias
    hidden.requires_grad_()
    with top_k_feed_forward(model, [1], k=12, by=by, chunk_size=3):
        given = module(hidden)
    torch.testing.assert_close(given.double(), expected, rtol=1e-4, atol=1e-5)
    given.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(hidden.grad.double(), outside.grad, rtol=1e-3, atol=1e-4)
    with top_k_feed_forward(model, [1], k=13, by=by):
        assert (module(hidden).double() - expected).abs().max() > 1e-3  # control: k off by one is seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_with_all_units_is_that_of_the_layer(family, ids):
    def gradients(autocast=False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model = tiny_model(family).train()
    expected = gradients()
    with top_k_feed_forward(model, k=10**6, chunk_size=5):
        torch.testing.assert_close(gradients(), expected, rtol=1e-3, atol=1e-5)
    with top_k_feed_forward(model, k=8, chunk_size=5):
        few = gradients()
        assert any((few[name] - expected[name]).abs().max() > 1e-3 for name in expected)
        assert all(torch.isfinite(gradient).all() for gradient in gradients(autocast=True).values())
        model.activation_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(gradients(), few, rtol=1e-4, atol=1e-6)


def test_dropout_behind_the_layer_stays(ids):
    model = tiny_model("gpt2").train()
    for block in model.transformer.h:
        block.mlp.dropout.p = 0.5
    results = []
    for change in (False, True):
        context = top_k_feed_forward(model, k=10**6) if change else torch.no_grad()
        with context:
            torch.manual_seed(0)
            results.append(model(ids).logits.detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation_with_padding_and_both_kinds_of_top_k(settings, ids):
    model = tiny_model("llama")
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = ids.masked_fill(mask == 0, END_OF_TEXT_ID)
    settings = settings | {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with top_k_feed_forward(model, k=16), top_k_attention(model, 4):
        together = model.generate(padded, attention_mask=mask, **settings)
        assert torch.equal(together[:1, 5:], model.generate(ids[:1, 5:], **settings))
        assert torch.equal(together[1:], model.generate(ids[1:], **settings))


def test_a_copy_of_the_model_has_its_own_weights(ids):
    model = tiny_model("llama")
    with top_k_feed_forward(model, k=16), torch.no_grad():
        copied, expected = copy.deepcopy(model), model(ids).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(ids).logits, expected)


def test_a_forward_of_someone_elses_is_put_back():
    model = tiny_model("llama")
    module = feed_forward(model)
    module.forward = before = module.forward
    top_k_feed_forward(model, k=16).remove()
    assert vars(module)["forward"] is before


def test_the_generator_and_the_mode_are_left_alone():
    model = tiny_model("llama").train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    top_k_feed_forward(model, k=16)
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["opt", "bloom", "mpt", "mixtral", "gpt_oss"])
def test_other_layers_are_refused_and_nothing_is_changed(family):
    model = tiny_model(family)
    with pytest.raises(UnsupportedArchitecture, match="no feed-forward module of two matrices"):
        top_k_feed_forward(model, k=16)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_that_computes_something_else_is_refused():
    """The parts are found by their order; a module that uses them in another way is not taken for one."""
    model = tiny_model("llama")
    module = feed_forward(model)
    module.up_proj, module.gate_proj = module.gate_proj, module.up_proj
    top_k_feed_forward(model, k=16).remove()  # by another name, the gate is still the gate
    module.forward = lambda hidden: module.down_proj(module.act_fn(module.up_proj(hidden)) * module.gate_proj(hidden))
    with pytest.raises(UnsupportedArchitecture, match=r"model\.layers\.1 of LlamaForCausalLM"):
        top_k_feed_forward(model, k=16)


def test_an_activation_that_is_learned_is_refused():
    model = tiny_model("llama")
    feed_forward(model).act_fn = torch.nn.PReLU()
    with pytest.raises(UnsupportedArchitecture, match=r"model\.layers\.1 of LlamaForCausalLM"):
        top_k_feed_forward(model, k=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"chunk_size": 0}, "chunk_size 0"),
        ({"by": "rank"}, "by is 'rank'"),
        ({"layers": []}, "no layer"),
        ({"layers": [0, 0]}, "expected different ones"),
        ({"layers": [2]}, "layer 2 is not in the model; expected numbers from 0 to 1"),
        ({"layers": [-1]}, "layer -1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        top_k_feed_forward(tiny_model("llama"), **{"k": 16} | changes)


def test_the_same_layer_twice_is_refused():
    model = tiny_model("llama")
    with top_k_feed_forward(model, [0], k=16):
        with pytest.raises(ConfigError, match="has a top-k feed-forward layer already"):
            top_k_feed_forward(model, k=16)
        top_k_feed_forward(model, [1], k=16)

"""The key site: which tensor it is, in every family, and what happens where there is none."""

from functools import cache

import pytest
import torch
from torch import nn

from memlm.errors import ModelError, UnsupportedArchitecture
from memlm.models import KeySite, LanguageModel, decoder_layers, find_key_site
from memlm.models._capture import capture, check_key_site, forward_to_site, keys_of
from memlm.models._layers import find_decoder
from tiny_models import FAMILIES, PARALLEL_FAMILIES, VOCAB_SIZE, tiny_model, tiny_tokenizer

SEQUENTIAL = sorted(set(FAMILIES) - PARALLEL_FAMILIES)
IDS = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))

# Families whose last norm before the feed-forward layer has another name; None where there is no such norm.
NORMS = {
    "gpt2": "ln_2",
    "gpt_neo": "ln_2",
    "opt": "final_layer_norm",
    "opt_post_norm": "self_attn_layer_norm",
    "mpt": "norm_2",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "olmo2": None,
    "olmo3": None,
}


@cache
def model_of(family):
    return tiny_model(family)


@cache
def site_of(family):
    return find_key_site(model_of(family))


def last_layer(model):
    stacks = [module for module in find_decoder(model).modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=len)[-1]


def last_attention(model):
    layer = last_layer(model)
    return next(
        getattr(layer, name) for name in ("self_attn", "attn", "attention", "self_attention") if hasattr(layer, name)
    )


def keys_with_disturbed_attention(model, site):
    """Keys when noise is added to what the last attention gives."""

    def disturb(module, args, output):
        noise = torch.randn(output[0].shape, generator=torch.Generator().manual_seed(2))
        return (output[0] + noise, *output[1:])

    handle = last_attention(model).register_forward_hook(disturb)
    try:
        return forward_to_site(model, site, IDS)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_key_has_seen_the_last_attention(family):
    model, site = model_of(family), site_of(family)
    assert not torch.allclose(forward_to_site(model, site, IDS), keys_with_disturbed_attention(model, site), atol=1e-2)


@pytest.mark.parametrize("family", sorted(PARALLEL_FAMILIES))
def test_parallel_families_are_read_after_the_final_norm(family):
    model, site = model_of(family), site_of(family)
    assert (site.name, site.tensor) == ("final_norm_output", "output")
    assert "parallel" in site.note
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(forward_to_site(model, site, IDS), expected)
    # The reason: the feed-forward input of these families has not seen the last attention. It can still be asked for.
    other = find_key_site(model, "last_ffn_input")
    assert other.name == "last_ffn_input"
    assert torch.equal(forward_to_site(model, other, IDS), keys_with_disturbed_attention(model, other))


def test_falcon_with_the_new_decoder_is_parallel_whatever_its_config_says():
    model = tiny_model("falcon_sequential")
    model.config.new_decoder_architecture = True
    assert find_key_site(model).name == "final_norm_output"


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_key_is_the_normalized_input_of_the_last_feed_forward(family):
    model, site = model_of(family), site_of(family)
    assert (site.name, site.tensor, site.note) == ("last_ffn_input", "input", "")
    layer, outputs = last_layer(model), []
    norm = NORMS.get(family, "post_attention_layernorm")
    names = [norm] if norm else [name for name, module in layer.named_children() if "norm" in name]
    handles = [getattr(layer, name).register_forward_hook(lambda _, args, out: outputs.append(out)) for name in names]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    keys = forward_to_site(model, site, IDS)
    assert keys.shape == (2, 12, 32)
    assert any(torch.allclose(keys, out.reshape(keys.shape), atol=1e-6) for out in outputs) == (norm is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_logits_nor_the_last_feed_forward_are_computed(family):
    model, site = model_of(family), site_of(family)
    layers = max((m for m in find_decoder(model).modules() if isinstance(m, nn.ModuleList)), key=len)
    feed_forward = find_key_site(model, "last_ffn_input").path.rsplit(".", 1)[1]
    ran = {"head": 0, "first": 0, "last": 0}
    watched = {"head": model.get_output_embeddings(), "first": getattr(layers[0], feed_forward)}
    watched["last"] = getattr(layers[-1], feed_forward)

    def count(name):
        return lambda *_: ran.update({name: ran[name] + 1})

    handles = [module.register_forward_hook(count(name)) for name, module in watched.items()]
    forward_to_site(model, site, IDS)
    assert ran == {"head": 0, "first": 1, "last": int(family in PARALLEL_FAMILIES)}
    with torch.no_grad():
        model(IDS)
    assert ran == {"head": 1, "first": 2, "last": 1 + int(family in PARALLEL_FAMILIES)}, "the counters do count"
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_incremental_keys_are_those_of_teacher_forcing(family):
    model, site = model_of(family), site_of(family)
    expected = forward_to_site(model, site, IDS)
    cache, got = None, []
    with torch.no_grad(), capture(model, site) as captured:
        for place in range(IDS.shape[1]):
            cache = model(IDS[:, place : place + 1], past_key_values=cache, use_cache=True).past_key_values
            got.append(keys_of(captured, site, 2, 1))
    assert torch.allclose(torch.cat(got, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_unknown_family_goes_by_structure(family):
    model = tiny_model(family)
    model.config.model_type = "novel"
    site = find_key_site(model)
    assert (site.path, site.tensor) == (site_of(family).path, "input")
    assert "novel" in site.note
    assert "structure" in site.note


def test_a_list_of_experts_is_no_list_of_layers():
    model = tiny_model("llama")
    model.config.model_type = "novel"
    model.model.layers[0].mlp.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(9))
    assert find_key_site(model).path == "model.layers.1.mlp"


def test_unknown_family_that_says_it_is_parallel():
    model = tiny_model("gpt_neox")
    model.config.model_type = "novel"
    assert find_key_site(model).name == "final_norm_output"


def test_user_names_a_site():
    model = model_of("llama")
    before = find_key_site(model, "model.layers.0.mlp")
    after = find_key_site(model, "model.layers.1:output")
    assert (before.path, before.tensor) == ("model.layers.0.mlp", "input")
    assert (after.path, after.tensor) == ("model.layers.1", "output")
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        between = forward_to_site(model, find_key_site(model, "model.layers.0:output"), IDS)
        normalized = model.model.layers[1].input_layernorm(between)
    assert torch.allclose(model.model.norm(forward_to_site(model, after, IDS)), states[-1], atol=1e-5)
    attention_input = find_key_site(model, "model.layers.1.self_attn:input")
    assert torch.allclose(forward_to_site(model, attention_input, IDS), normalized, atol=1e-6)
    assert LanguageModel(model, tiny_tokenizer(), "llama", key_site="model.layers.1:output").key_width == 32


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.layers.7.mlp", "model.layers.7.mlp"), ("model.layers.0.mlp:middle", "':input' or ':output'")],
)
def test_bad_site(name, said):
    with pytest.raises(UnsupportedArchitecture, match=said):
        find_key_site(model_of("llama"), name)


def test_model_without_layers_or_feed_forward():
    model = tiny_model("llama")
    model.model.layers[-1].mixer = model.model.layers[-1].mlp
    del model.model.layers[-1].mlp
    with pytest.raises(UnsupportedArchitecture, match=r"mlp.*in model\.layers\.1 of LlamaForCausalLM"):
        find_key_site(model)
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(UnsupportedArchitecture, match="no list of layers"):
        find_key_site(model)
    with pytest.raises(UnsupportedArchitecture, match="not a causal LM"):
        find_key_site(model.model)


def test_narrow_final_norm_output():
    site = find_key_site(model_of("opt_post_norm"), "final_norm_output")
    assert forward_to_site(model_of("opt_post_norm"), site, IDS).shape == (2, 12, 16)


@pytest.mark.parametrize("has_cache", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x + x.mean(dim=1, keepdim=True), id="sees the future"),
        pytest.param(lambda x: x + torch.linspace(0, 1, x.shape[1])[:, None], id="depends on how much is fed"),
    ],
)
def test_check_refuses_keys_that_depend_on_more_than_the_past(change, has_cache):
    model = tiny_model("llama")
    site = find_key_site(model)
    check_key_site(model, site)
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    if not has_cache:
        model.model.register_forward_hook(lambda _, args, output: setattr(output, "past_key_values", None))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp gives other keys"):
        check_key_site(model, site)
    with pytest.raises(ModelError, match="gives other keys"):
        LanguageModel(model, tiny_tokenizer(), "wrong")


@pytest.mark.parametrize(
    ("path", "said"), [("lm_head", "not reached"), ("model.layers.1.self_attn.q_norm", "expected one key for each of")]
)
def test_site_that_gives_no_key_for_each_token(path, said):
    with pytest.raises(ModelError, match=said):
        check_key_site(model_of("qwen3"), KeySite(path, path, "input"))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family_name_their_attention_and_feed_forward(family):
    model = tiny_model(family)
    layers = decoder_layers(model)
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert len(layers) == (model.config.num_hidden_layers if hasattr(model.config, "num_hidden_layers") else 2)
    for layer in layers:
        assert model.get_submodule(layer.path) is layer.module
        assert "ttention" in type(getattr(layer.module, layer.attention)).__name__
        assert layer.feed_forward is not None or family.startswith("opt")

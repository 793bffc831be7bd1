"""Top-k attention inside models of transformers: `attn_implementation="memlm_topk"` and `layers.top_k_attention`."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

import top_k_oracle
from memlm.errors import ConfigError, ModelError, UnsupportedArchitecture
from memlm.layers import register_top_k, top_k_attention
from saved_bytes import saved_bytes
from tiny_models import tiny_config, tiny_folder, tiny_model

# shared key heads; learned positions; parallel layers; query norms; caps and windows; sinks and windows; windows alone
FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "qwen2", "qwen3", "gemma2", "gpt_oss", "mistral", "phi3"]
LENGTH, PADDING = 24, 7


def eager(family, **settings):
    model = tiny_model(family, **settings)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 250, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mask():
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :PADDING] = 0
    return mask


def dense_top_k(module, query, key, value, attention_mask, k, scaling, softcap=None, s_aux=None, **_):
    """The oracle, as transformers calls it."""
    part = (query, key, value) if s_aux is None else (query, key, value, s_aux)
    query, key, value, *sinks = (tensor.double() for tensor in part)
    options = {"scale": scaling, "mask": attention_mask, "cap": softcap, "causal": attention_mask is None}
    output = top_k_oracle.attention(query, key, value, k, sinks=sinks[0] if sinks else None, **options)
    return output.transpose(1, 2).to(part[0].dtype), None


@pytest.fixture
def registered(monkeypatch):
    """Undo what a test registers."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_k_as_long_as_the_text_it_is_eager_attention(family, ids, mask):
    model = eager(family)
    with torch.no_grad():
        alone, padded = model(ids).logits, model(ids, attention_mask=mask).logits
        with top_k_attention(model, LENGTH, chunk_size=5):
            torch.testing.assert_close(model(ids).logits, alone, rtol=1e-4, atol=2e-5)
            given = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(given[mask.bool()], padded[mask.bool()], rtol=1e-4, atol=2e-5)
        assert torch.equal(model(ids).logits, alone)  # as it was, bit for bit


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_smaller_k_it_is_the_dense_computation_masked(family, ids, mask, registered):
    model = eager(family)
    results = {}
    for k in (5, 6):
        AttentionInterface.register("oracle", lambda *args, k=k, **kwargs: dense_top_k(*args, k=k, **kwargs))
        AttentionMaskInterface.register("oracle", sdpa_mask)
        with torch.no_grad():
            model.set_attn_implementation("oracle")
            expected = model(ids, attention_mask=mask).logits
            model.set_attn_implementation("eager")
            with top_k_attention(model, k, chunk_size=7):
                results[k] = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(results[k][mask.bool()], expected[mask.bool()], rtol=1e-4, atol=2e-5)
    assert (results[5] - results[6])[mask.bool()].abs().max() > 1e-2  # control: k off by one is seen


@pytest.mark.parametrize(("family", "padded"), [("llama", True), ("mistral", False), ("gpt_oss", False)])
def test_without_a_mask_function_no_mask_arrives(family, padded, ids, mask, registered):
    """Control of the tests above: they fail where padding or a window matters, if only the attention is registered."""
    model = eager(family)
    kwargs = {"attention_mask": mask} if padded else {}
    seen = mask.bool() if padded else torch.ones_like(mask, dtype=torch.bool)
    with torch.no_grad():
        expected = model(ids, **kwargs).logits[seen]
        with top_k_attention(model, LENGTH):
            torch.testing.assert_close(model(ids, **kwargs).logits[seen], expected, rtol=1e-4, atol=2e-5)
            del AttentionMaskInterface._global_mapping[model.config._attn_implementation]
            assert (model(ids, **kwargs).logits[seen] - expected).abs().max() > 0.1


def test_by_name_in_from_pretrained(tmp_path, ids, registered):
    folder = tiny_folder("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="memlm_topk"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="memlm_topk")
    assert register_top_k(5) == "memlm_topk"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="memlm_topk")
    by_call = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(ids).logits
        with top_k_attention(by_call, 5):
            assert torch.equal(by_call(ids).logits, logits)
        register_top_k(6)  # the same name again changes k
        assert not torch.equal(model(ids).logits, logits)
        register_top_k(5, name="few")
        model.set_attn_implementation("few")
        assert torch.equal(model(ids).logits, logits)
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"


def test_importing_registers_nothing():
    code = "import memlm.layers, transformers; print([n for n in transformers.AttentionInterface() if 'memlm' in n])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "gpt_oss", "mistral"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_all_keys_is_that_of_eager_attention(family, settings, ids, mask):
    model = eager(family)
    settings = settings | {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)
    with top_k_attention(model, 64):
        assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_decoding_with_few_keys_is_that_of_one_pass(family, ids, mask):
    """The cache, one token at a time, chooses among the same keys as a pass over the whole text; padding is no key."""
    model = eager(family)
    with torch.no_grad(), top_k_attention(model, 4):
        text = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
        alone = model.generate(ids[:1, PADDING:], max_new_tokens=12, do_sample=False, eos_token_id=None)
        whole = torch.cat([mask, mask.new_ones(2, 12)], dim=1)
        once = model(text, attention_mask=whole).logits[:, LENGTH - 1 : -1].argmax(dim=-1)
        uncached = model.generate(ids, attention_mask=mask, max_new_tokens=12, use_cache=False, eos_token_id=None)
    assert torch.equal(once, text[:, LENGTH:])
    assert torch.equal(uncached, text)
    assert torch.equal(alone[0], text[0, PADDING:])


def test_a_static_cache_is_masked(ids):
    """Its places that are not written yet are keys like others, but for the mask."""
    model = eager("llama")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with top_k_attention(model, 4):
        expected = model.generate(ids, **settings)
        assert torch.equal(
            model.generate(ids, cache_implementation="static", disable_compile=True, **settings), expected
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_training_with_all_keys_is_that_of_eager_attention(family, ids, mask):
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, PADDING] = -100  # it is predicted from padding, which sees nothing here and anything in eager attention

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model = eager(family).train()
    expected = gradients()
    with top_k_attention(model, LENGTH, chunk_size=5):
        torch.testing.assert_close(gradients(), expected, rtol=1e-3, atol=1e-5)
    with top_k_attention(model, 4, chunk_size=5):
        few = gradients()
        assert any((few[name] - expected[name]).abs().max() > 1e-3 for name in expected)
        model.activation_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(gradients(), few, rtol=1e-4, atol=1e-6)


def test_dropout_of_the_model_with_checkpointing(ids):
    """A pass that is computed again draws the dropout that it drew before."""
    model = eager("llama").train()

    def gradient(dropout):
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = dropout
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        return model.get_input_embeddings().weight.grad.clone()

    with top_k_attention(model, 8, chunk_size=5):
        without, expected = gradient(0.0), gradient(0.3)
        assert (without - expected).abs().max() > 1e-3
        model.activation_checkpointing_enable({"use_reentrant": False})
        torch.testing.assert_close(gradient(0.3), expected, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            logits = model.eval()(ids).logits  # there is none in evaluation
            assert torch.equal(model(ids).logits, logits)


def test_autocast_is_near_full_precision(ids):
    model = eager("llama").train()
    with top_k_attention(model, LENGTH):
        exact = model(ids, labels=ids).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_documents_packed_in_a_row_do_not_see_each_other(ids):
    model = eager("llama")
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None]
    with torch.no_grad(), top_k_attention(model, LENGTH):
        packed = model(ids[:1], position_ids=positions, use_cache=False).logits[:, 10:]
        torch.testing.assert_close(packed, model(ids[:1, 10:]).logits, rtol=1e-4, atol=2e-5)


def test_a_mask_of_the_callers_own(ids):
    """Bool or added to the scores, of four dimensions: transformers hands it on as it is."""
    model = eager("llama")
    own = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    own[..., 3] = own[..., 3] & torch.eye(LENGTH, dtype=torch.bool)[3]  # only the fourth token sees itself
    added = torch.zeros(own.shape).masked_fill(~own, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, attention_mask=added).logits
        with top_k_attention(model, LENGTH):
            for mask in (own, added):
                torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=2e-5)


def test_a_call_may_say_itself_whether_it_is_causal(registered):
    attend = AttentionInterface()[register_top_k(3)]
    query, key, value = (torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    for is_causal in (False, True):
        expected = top_k_oracle.attention(query, key, value, 3, causal=is_causal).transpose(1, 2)
        given, weights = attend(torch.nn.Module(), query, key, value, None, is_causal=is_causal)
        torch.testing.assert_close(given, expected)
        assert weights is None


def test_a_model_that_reads_in_both_directions(ids, mask):
    config = AutoConfig.for_model(
        "bert", vocab_size=250, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for seen in (torch.ones_like(mask), mask):
            expected = model(ids, attention_mask=seen).last_hidden_state
            with top_k_attention(model, LENGTH, chunk_size=5):
                given = model(ids, attention_mask=seen).last_hidden_state
            torch.testing.assert_close(given[seen.bool()], expected[seen.bool()], rtol=1e-4, atol=2e-5)


def test_what_a_model_keeps_for_the_gradient_doubles_with_the_length():
    model = tiny_model("llama")
    sizes = {"eager": [], "top-k": []}
    for length in (128, 256, 512):
        ids = torch.zeros(1, length, dtype=torch.long)
        for name, found in sizes.items():
            model.set_attn_implementation(register_top_k(16) if name == "top-k" else "eager")
            found.append(saved_bytes(lambda ids=ids: model(ids, use_cache=False), *model.parameters()))
    assert sizes["top-k"][2] / sizes["top-k"][1] == pytest.approx(2, abs=0.05)
    assert sizes["eager"][2] / sizes["eager"][1] > 3


@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "bloom", "mpt", "falcon"])
def test_models_that_compute_attention_by_themselves_are_refused(family):
    with pytest.raises(UnsupportedArchitecture, match="computes attention by itself"):
        top_k_attention(tiny_model(family))


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_such_models_are_refused_by_name_too(family, ids, registered):
    """They ask for a mask as others do, and then go their own way."""
    model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation=register_top_k())
    with pytest.raises(UnsupportedArchitecture, match="computes attention by itself"):
        model(ids)


def test_what_is_refused(ids, registered):
    model = tiny_model("llama")
    for k, chunk_size in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match="expected at least 1"):
            top_k_attention(model, k, chunk_size=chunk_size)
    for name in ("eager", "sdpa"):
        with pytest.raises(ConfigError, match="another attention implementation"):
            register_top_k(name=name)
    with top_k_attention(model), pytest.raises(ConfigError, match="already"):
        top_k_attention(model)
    change = top_k_attention(model)
    with pytest.raises(ModelError, match="no attention weights"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), (torch.ones(1, 2, 8), torch.zeros(1, 2, 8)), None, output_attentions=True
        )
    with pytest.raises(UnsupportedArchitecture, match="LlamaAttention: it has learned position biases"):
        model(ids, position_bias=torch.zeros(1))
    change.remove()
    with pytest.raises(ModelError, match="removed already"):
        change.remove()


def test_a_copy_of_the_model_keeps_its_attention(ids):
    model = eager("llama")
    with top_k_attention(model, 3), torch.no_grad():
        copied, few = copy.deepcopy(model), model(ids).logits
    with torch.no_grad():
        assert torch.equal(copied(ids).logits, few)
        assert not torch.equal(model(ids).logits, few)


def test_the_page_runs_as_it_is_written(tmp_path, registered):
    page = (Path(__file__).parent.parent / "docs" / "top-k.md").read_text()
    in_place, by_name = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(in_place, "in place", "exec"), names)
    assert names["lm"].model.config._attn_implementation == "sdpa"
    assert names["lm"].model.get_input_embeddings().weight.grad.any()
    names["lm"].model.zero_grad()
    exec(compile(by_name.replace('"gpt2"', repr(str(tiny_folder("gpt2", tmp_path)))), "by name", "exec"), names)
    assert names["model"].config._attn_implementation == "memlm_topk_32"

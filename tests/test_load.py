"""Loading models, and the fingerprints by which a datastore knows them again."""

import json
import re

import pytest
import torch
from transformers import BertConfig, BertModel
from transformers.utils import logging

import memlm
from memlm.errors import ConfigError, ModelError
from memlm.models import LanguageModel
from memlm.models._identity import encoder_fingerprint, tokenizer_fingerprint
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_folder, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder("llama", tmp_path_factory.mktemp("models") / "my-llama")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "bloom", "falcon", "cohere"])
def test_a_folder_is_loaded(family, tmp_path):
    lm = memlm.load(tiny_folder(family, tmp_path / f"my-{family}"), device="cpu")
    assert lm.name == f"my-{family}"
    assert not lm.model.training
    assert lm.device == torch.device("cpu")
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    ids = lm.tokenize(memlm.Document(id="a", text="the rain")).ids
    original = tiny_model(family)
    with torch.no_grad():
        expected = original(torch.from_numpy(ids)[None]).logits.log_softmax(dim=-1)[0, range(len(ids) - 1), ids[1:]]
    (batch,) = lm.score([ids])
    assert torch.allclose(batch.log_probs, expected, atol=1e-5)
    assert lm.identity["encoder"]["sha256"] == LanguageModel(original, lm.tokenizer, "").identity["encoder"]["sha256"]


def test_settings_reach_the_language_model(folder):
    lm = memlm.load(str(folder), device="cpu", key_site="final_norm_output", context=9, stride=4, batch_tokens=32)
    assert (lm.site.name, lm.windows.context, lm.windows.stride, lm.batch_tokens) == ("final_norm_output", 9, 4, 32)
    assert repr(lm) == "LanguageModel('my-llama', keys from model output)"


@pytest.mark.parametrize(
    ("dtype", "loaded"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("auto", torch.float32)]
)
def test_types(dtype, loaded, folder):
    lm = memlm.load(folder, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in lm.model.parameters()} == {loaded}
    assert lm.identity["encoder"]["dtype"] == str(loaded).removeprefix("torch.")
    (batch,) = lm.score([lm.tokenize(memlm.Document(id="a", text="the rain")).ids])
    assert batch.log_probs.dtype == torch.float32
    assert batch.keys.dtype == loaded


def test_bad_type(folder):
    with pytest.raises(ConfigError, match=r"dtype is 'int3'; expected one of float32, bfloat16, float16, auto"):
        memlm.load(folder, dtype="int3")


def broken(folder, kind):
    """Make a folder that holds something else than a causal language model; return what is said of it."""
    folder.mkdir()
    if kind == "empty":
        return "holds no config.json"
    if kind == "encoder":
        BertModel(BertConfig(vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                             intermediate_size=16)).save_pretrained(folder)  # fmt: skip
        tiny_tokenizer().save_pretrained(folder)
        return "lacks .* weights of a BertLMHeadModel"
    tiny_folder("llama", folder)
    if kind == "no head":  # transformers would draw one at random
        (folder / "model.safetensors").unlink()
        tiny_model("llama").model.save_pretrained(folder)
        return r"lacks 1 of the weights of a LlamaForCausalLM .lm_head\.weight"
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
        return "model.safetensors"
    if kind == "truncated weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
        return "incomplete"
    if kind == "other shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
        return "cannot load"
    if kind == "damaged config":
        (folder / "config.json").write_text("{")
        return r"config\.json"
    if kind == "unknown architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"model_type": "martian", "architectures": ["Martian"]})
        )
        return "martian"
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return "tokenizer"


KINDS = ["empty", "encoder", "no head", "no weights", "truncated weights", "other shapes", "damaged config"]


@pytest.mark.parametrize("kind", [*KINDS, "unknown architecture", "no tokenizer"])
def test_a_folder_that_cannot_be_loaded(kind, tmp_path):
    said = broken(tmp_path / "broken", kind)
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "broken"))) as error:
        memlm.load(tmp_path / "broken")
    assert re.search(said, str(error.value))
    assert "\n" not in str(error.value)


def test_a_missing_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"there is no folder .*nowhere.*save_pretrained.*hub"):
        memlm.load(tmp_path / "nowhere")


# What a datastore is bound to


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_fingerprint_does_not_depend_on_the_type_loaded(dtype, folder):
    one, other = memlm.load(folder, device="cpu").identity, memlm.load(folder, dtype=dtype, device="cpu").identity
    assert one["encoder"]["sha256"] == other["encoder"]["sha256"]
    assert one["tokenizer"] == other["tokenizer"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fingerprint_knows_every_tensor_below_the_head(family):
    model = tiny_model(family)
    decoder = LanguageModel(model, tiny_tokenizer(), family).model.base_model
    before = encoder_fingerprint(decoder)
    assert encoder_fingerprint(tiny_model(family).base_model) == before
    assert encoder_fingerprint(tiny_model(family, seed=1).base_model) != before
    for _, parameter in decoder.named_parameters():
        with torch.no_grad():
            saved = parameter.clone()
            parameter.mul_(1.05)
            assert encoder_fingerprint(decoder) != before
            parameter.copy_(saved)
    assert encoder_fingerprint(decoder) == before


def test_fingerprint_of_the_tokenizer():
    before = tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(tiny_tokenizer()) == before
    assert tokenizer_fingerprint(tiny_tokenizer("reversed")) != before
    used = tiny_tokenizer()
    used(["the rain", "a"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(used) == before, "padding and truncation are ways of use"
    for change in ({"bos_token": None}, {"eos_token": None}):
        other = tiny_tokenizer()
        for name, value in change.items():
            setattr(other, name, value)
        assert tokenizer_fingerprint(other) != before
    larger = tiny_tokenizer()
    larger.add_tokens(["martian"])
    assert tokenizer_fingerprint(larger) != before


def test_saved_tokenizer_has_the_same_fingerprint(folder):
    assert memlm.load(folder, device="cpu").identity["tokenizer"]["sha256"] == tokenizer_fingerprint(tiny_tokenizer())


def test_identity_names_the_key_site_and_windows():
    identity = LanguageModel(tiny_model("gpt_neox"), tiny_tokenizer(), "neox", context=9, stride=4).identity
    assert identity["encoder"]["key_site"] == {"name": "final_norm_output", "path": "gpt_neox", "tensor": "output"}
    assert identity["encoder"]["architecture"] == "GPTNeoXForCausalLM"
    assert identity["windows"] == {"context": 9, "stride": 4}
    assert identity["tokenizer"]["vocab_size"] == VOCAB_SIZE
    json.dumps(identity)


def test_encoder_fingerprint_differs_by_settings_that_change_the_keys():
    plain, other = (tiny_model("llama").base_model for _ in range(2))
    assert encoder_fingerprint(plain) == encoder_fingerprint(other)
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 5.0}
    assert encoder_fingerprint(plain) != encoder_fingerprint(other)

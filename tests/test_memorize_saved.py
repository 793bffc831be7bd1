"""Attention memory on disk."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from memlm.errors import ConfigError, FormatVersionError, ModelError, ShapeError
from memlm.layers import forget, load_attention_memory, memorize, memory_of, save_attention_memory
from memorized import SOME, logits, text
from tiny_models import tiny_model


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
        tensors | {"remembered.1.written": -tensors["remembered.1.written"]},
    ):
        rewritten(wrong)
        with pytest.raises(ModelError, match="does not fit this model"):
            load_attention_memory(model, tmp_path)
    for layers in ("1", ["1"], None):
        rewritten(tensors, layers=layers)
        with pytest.raises(ModelError, match="damaged"):
            load_attention_memory(model, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged"):
        load_attention_memory(model, tmp_path)
    with pytest.raises(ModelError, match="has no attention memory"):
        memory_of(model)


def test_a_device_may_be_one_of_torch(tmp_path):
    model = tiny_model("llama")
    memorize(model, layers=[1], size=16, top_k=4, device=torch.device("cpu"))
    save_attention_memory(model, tmp_path)
    forget(model)
    assert load_attention_memory(model, tmp_path).settings.device == "cpu"


def test_what_another_model_remembers_is_refused(tmp_path):
    model, other = tiny_model("llama"), tiny_model("gpt2")
    memory = memorize(model, layers=[1], size=16, top_k=4)
    logits(model, text())
    save_attention_memory(model, tmp_path)
    with pytest.raises(ModelError, match=r"does not fit this model: keys have shape \(2, 2, 16, 8\)"):
        load_attention_memory(other, tmp_path)
    with pytest.raises(ModelError, match="has no attention memory"):
        memory_of(other)
    with pytest.raises(ShapeError, match="the state is of layers 1; the memories are of layers 0"):
        memorize(other, layers=[0], size=16, top_k=4).load_state_dict(memory.state_dict())

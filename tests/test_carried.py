"""Reading in segments with carried keys and values equals reading at once; nothing crosses documents or gradients."""

import pytest
import torch

from memlm.errors import ConfigError, ModelError, UnsupportedArchitecture
from memlm.models import CarriedCache
from tiny_models import MAX_POSITIONS, tiny_model

FAMILIES = ["llama", "qwen2", "qwen3", "gpt_neox", "gpt2", "bloom", "opt"]


def close(family="llama"):
    """BLOOM computes its biases and its softmax in float32 whatever the model's type."""
    return {"rtol": 1e-5, "atol": 1e-6} if family == "bloom" else {"rtol": 1e-10, "atol": 1e-10}


def double(family):
    return tiny_model(family).double().eval()


def ids_of(rows, length, seed=0):
    return torch.randint(1, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def begins(*flags):
    return torch.tensor(flags)


def in_segments(model, ids, size, length):
    carried, logits = CarriedCache(model, length), []
    for number, part in enumerate(ids.split(size, dim=1)):
        logits.append(carried(part, torch.full((len(ids),), number == 0)).logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_equal_one_long_pass(family):
    model, ids = double(family), ids_of(2, 50)
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(in_segments(model, ids, 12, 64), whole, **close(family))
        assert not torch.allclose(in_segments(model, ids, 12, 1), whole, atol=1e-4)  # without what is carried


def test_wrong_positions_are_noticed():
    """The test above can fail: with positions that begin anew in every segment, logits differ."""
    model, ids = double("llama"), ids_of(2, 50)
    carried, logits = CarriedCache(model, 64), []
    with torch.no_grad():
        for number, part in enumerate(ids.split(12, dim=1)):
            if carried._next is not None:
                carried._next = torch.zeros_like(carried._next)
            logits.append(carried(part, torch.full((2,), number == 0)).logits)
        assert not torch.allclose(torch.cat(logits, dim=1), model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom"])
def test_the_oldest_are_dropped(family):
    """One layer, whose keys depend on nothing before them: the whole pass with a mask says what is to come out."""
    model = double(family)
    layers = model.base_model.layers if family != "bloom" else model.base_model.h
    del layers[1:]
    model.config.num_hidden_layers = 1
    ids, size, length = ids_of(1, 40), 8, 12
    with torch.no_grad():
        found = in_segments(model, ids, size, length)
        for place in (7, 20, 39):
            first = max(0, place // size * size - length)
            mask = torch.ones(1, 40, dtype=torch.long)
            mask[:, :first] = 0
            positions = {} if family == "bloom" else {"position_ids": torch.arange(40)[None]}
            expected = model(ids, attention_mask=mask, **positions).logits[:, place]
            torch.testing.assert_close(found[:, place], expected, **close(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_begins_another_document_while_the_others_go_on(family):
    model, long, short = double(family), ids_of(1, 36), ids_of(1, 24, seed=1)
    carried = CarriedCache(model, 64)
    with torch.no_grad():
        carried(torch.cat([long[:, :12], ids_of(1, 12, seed=2)]), begins(True, True))
        parts = [
            carried(torch.cat([long[:, 12:24], short[:, :12]]), begins(False, True)).logits,
            carried(torch.cat([long[:, 24:], short[:, 12:]]), begins(False, False)).logits,
        ]
        found = torch.cat(parts, dim=1)
        torch.testing.assert_close(found[:1], model(long).logits[:, 12:], **close(family))
        torch.testing.assert_close(found[1:], model(short).logits, **close(family))


def test_padding_is_not_seen():
    model, ids = double("llama"), ids_of(2, 30)
    carried = CarriedCache(model, 64)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        carried(ids[:, :10], begins(True, True), mask)
        found = carried(ids[:, 10:], begins(False, False)).logits
        row = torch.cat([ids[1, :6], ids[1, 10:]])[None]
        torch.testing.assert_close(found[1:], model(row).logits[:, 6:], **close())
        torch.testing.assert_close(found[:1], model(ids[:1]).logits[:, 10:], **close())


def test_no_gradient_reaches_earlier_segments():
    model, ids = double("llama"), ids_of(1, 16)
    embedding = model.get_input_embeddings()
    only = 251  # a token of the first segment alone
    ids[0, 3] = only
    model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.detach().clone())

    def gradient(carried):
        model.zero_grad()
        carried(ids[:, :8], begins(True))
        if hasattr(carried, "attached"):
            carried._cache = carried.attached
        carried(ids[:, 8:], begins(False), labels=ids[:, 8:]).loss.backward()
        return float(embedding.weight.grad[only].abs().max())

    assert gradient(CarriedCache(model, 64)) == 0
    careless = CarriedCache(model, 64)
    careless._keep = lambda cache: setattr(careless, "attached", cache)  # the control: nothing is detached
    assert gradient(careless) > 0


def test_learned_positions_end():
    model, ids = double("gpt2"), ids_of(1, MAX_POSITIONS + 8)
    carried = CarriedCache(model, 32)
    with torch.no_grad():
        for start in range(0, MAX_POSITIONS, 32):
            carried(ids[:, start : start + 32], begins(start == 0))
        with pytest.raises(
            ConfigError, match=f"reached position {MAX_POSITIONS + 8}, and .* has learned {MAX_POSITIONS}"
        ):
            carried(ids[:, MAX_POSITIONS:], begins(False))
        carried(ids[:, :32], begins(True))


def test_rotary_positions_go_on():
    """Beyond the length that the model was made for, only differences of positions count."""
    model, ids = double("llama"), ids_of(1, 3 * MAX_POSITIONS)
    with torch.no_grad():
        found = in_segments(model, ids, 64, 1000)
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_sliding_windows_are_refused(family):
    with pytest.raises(UnsupportedArchitecture, match="expected full attention in every layer"):
        CarriedCache(tiny_model(family).eval(), 16)


def test_bad_settings():
    model = double("llama")
    with pytest.raises(ConfigError, match="length is 0; expected at least 1"):
        CarriedCache(model, 0)
    carried = CarriedCache(model, 8)
    carried(ids_of(2, 4), begins(True, True))
    with pytest.raises(ConfigError, match="the batch has 3 rows, the one before had 2"):
        carried(ids_of(3, 4), begins(False, False, False))
    carried.reset()
    carried(ids_of(3, 4), begins(True, True, True))
    model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(ModelError, match="gradient checkpointing keeps no keys"):
        carried(ids_of(3, 4), begins(False, False, False))


def test_half_precision_and_autocast():
    model, ids = tiny_model("llama").eval(), ids_of(2, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(in_segments(model, ids, 8, 64), model(ids).logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ["mpt", "gpt_neo"])
def test_models_that_count_places_refuse_to_go_on_behind_padding(family):
    """Padding within a document would count as distance; behind a document's end it does not matter."""
    carried = CarriedCache(tiny_model(family), 20)
    ids = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    first = torch.ones(2, dtype=torch.bool)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    carried(ids, first, mask)
    with pytest.raises(ModelError, match="counts distances by places in its cache"):
        carried(ids, ~first)
    carried.reset()
    carried(ids, first, mask)
    begins = torch.tensor([False, True])
    found = carried(ids, begins).logits[1]
    assert found.allclose(CarriedCache(tiny_model(family), 20)(ids[1:], first[1:]).logits[0], atol=1e-4)

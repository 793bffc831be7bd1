"""Readers of external weights inside models of all families: exact no-ops at first, reversible, written by one pass."""

import json

import numpy as np
import pytest
import torch

from memlm import ops
from memlm.errors import (
    ConfigError,
    DatastoreCorrupt,
    DatastoreMismatch,
    FormatVersionError,
    ModelError,
    UnsupportedArchitecture,
)
from memlm.layers import (
    Bank,
    RowReader,
    TensorRows,
    add_row_reader,
    create_fact_bank,
    delete_facts,
    load_row_reader,
    owner_of,
    remove_beside,
    save_row_reader,
    write_facts,
)
from memlm.training import Asked, train_reader
from memlm.training import _reader as reader_training
from tiny_models import FAMILIES, tiny_model

SETTINGS = {"key_width": 8, "value_width": 8, "top_k": 3}
WITHOUT = {"opt", "opt_post_norm"}  # two linear maps in the layer, and no feed-forward module
FACTS = {"rain": "the rain was on the roof", "cat": "the cat is in the house", "bird": "a bird was singing"}
IDS = torch.randint(200, (2, 12), generator=torch.Generator().manual_seed(0))


def trained(reader, seed=0):
    """Give a reader weights as if it had been trained, so that it reads something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        reader.out.weight.copy_(torch.randn(reader.out.weight.shape, generator=generator))
        reader.threshold.fill_(0.0)
    return reader


def some_rows(reader, count=20):
    generator = torch.Generator().manual_seed(1)
    keys = torch.nn.functional.normalize(torch.randn(count, reader.key.out_features, generator=generator), dim=-1)
    return TensorRows(keys, torch.randn(count, reader.value.out_features, generator=generator))


@pytest.fixture
def written(tiny_lm, tmp_path):
    """A tiny Llama with a reader, and a table with three facts."""
    lm = tiny_lm()
    reader = trained(add_row_reader(lm.model, 0, **SETTINGS))
    with create_fact_bank(lm, reader, tmp_path / "bank", rows=200) as bank:
        write_facts(lm, bank, FACTS)
        bank.commit()
        yield lm, reader, bank


def test_reading_is_that_of_an_oracle():
    generator = np.random.default_rng(0)
    queries, keys, values = (generator.normal(size=shape) for shape in ((3, 4), (3, 5, 4), (3, 5, 2)))
    present = generator.random((3, 5)) < 0.6
    present[2] = False
    scale, threshold = 3.0, 0.2
    read, amount = ops.read_rows(
        *(torch.from_numpy(item) for item in (queries, keys, values, present)),
        torch.tensor(scale).double(),
        torch.tensor(threshold).double(),
    )
    for row in range(3):
        weights = np.exp(scale * (keys[row][present[row]] @ queries[row] - threshold))
        total = 1 + weights.sum()
        np.testing.assert_allclose(read[row], (weights[:, None] * values[row][present[row]]).sum(axis=0) / total)
        np.testing.assert_allclose(amount[row], 1 - 1 / total, atol=1e-12)
    assert (read[2].abs().sum(), amount[2]) == (0, 0)


def test_absent_rows_of_any_content_are_not_read():
    present = torch.tensor([[True, False]])
    keys, values = torch.ones(1, 2, 1), torch.tensor([[[1.0], [torch.inf]]])
    read, _ = ops.read_rows(torch.ones(1, 1), keys, values, present, torch.tensor(1.0), torch.tensor(1.0))
    assert read.tolist() == [[0.5]]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITHOUT))
def test_it_starts_as_nothing_reads_something_and_is_removed(family):
    model = tiny_model(family)
    names, before = list(model.state_dict()), model(IDS).logits
    reader = add_row_reader(model, 1, **SETTINGS)
    rows = some_rows(reader)
    assert model(IDS).logits.equal(before)
    with reader.reading(rows):
        assert model(IDS).logits.equal(before), "out is zero"
    trained(reader)
    assert model(IDS).logits.equal(before), "there are no rows"
    reader.rows = TensorRows(rows.keys[:0], rows.values[:0])
    assert model(IDS).logits.equal(before), "the table is empty"
    reader.rows = rows
    with torch.no_grad():
        changed = model(IDS).logits
    assert (changed - before).abs().max() > 1e-4
    # a prefix, and the rest with the model's cache, give the same as the whole
    first = model(IDS[:, :7], use_cache=True)
    rest = model(IDS[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), changed, atol=2e-3, rtol=2e-3)
    # the model's own weights keep their names
    assert set(names) < set(model.state_dict())
    model.load_state_dict(model.state_dict())
    remove_beside(model, reader)
    assert model(IDS).logits.equal(before)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family", sorted(WITHOUT))
def test_a_layer_without_a_feed_forward_module_is_refused(family):
    with pytest.raises(UnsupportedArchitecture, match="has no feed-forward module of its own"):
        add_row_reader(tiny_model(family), 0)


def test_what_cannot_be_added_or_removed():
    model = tiny_model("llama")
    for layer in (2, -3):
        with pytest.raises(ConfigError, match=rf"layer is {layer}; expected one of the 2 layers"):
            add_row_reader(model, layer)
    for name in SETTINGS:
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            add_row_reader(model, 0, **SETTINGS | {name: 0})
    reader = add_row_reader(model, -1)
    with pytest.raises(ConfigError, match="has a RowReader already"):
        add_row_reader(model, 1)
    remove_beside(model, reader)
    with pytest.raises(ModelError, match="removed already"):
        remove_beside(model, reader)


def test_a_fact_is_found_by_its_own_beginning_and_no_longer_when_it_is_deleted(written):
    lm, reader, bank = written
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer(FACTS["cat"])["input_ids"]]])
    seen = []
    with reader.reading(None):
        hook = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        lm.model(ids)
        hook.remove()
    queries = torch.nn.functional.normalize(reader.query(_normed(seen[0][0])), dim=-1)
    cosines = (queries[:-1, None] * bank.nearest(queries[:-1], 1).keys).sum(dim=-1)
    torch.testing.assert_close(cosines, torch.ones_like(cosines))
    owners = bank.owners[_nearest_ids(bank, queries[3:-1])]
    assert (owners == owner_of("cat")).all()
    assert delete_facts(bank, ["cat"]) == ids.shape[1] - 1
    assert (bank.owners != owner_of("cat")).all()
    with pytest.raises(ConfigError, match="no fact 'cat'"):
        delete_facts(bank, ["cat"])


def _normed(hidden):
    return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])


def _nearest_ids(bank, queries):
    return (queries @ bank.keys[: len(bank)].T).argmax(dim=1)


def test_rows_depend_neither_on_order_nor_on_what_is_in_the_table(written):
    lm, _, bank = written
    rows = {name: bank.keys[bank.owners == owner_of(name)].clone() for name in FACTS}
    delete_facts(bank, FACTS)
    write_facts(lm, bank, {"other": "the house is on the letter"})
    for name in reversed(FACTS):
        write_facts(lm, bank, {name: FACTS[name]})
    for name in FACTS:
        torch.testing.assert_close(bank.keys[bank.owners == owner_of(name)], rows[name], atol=1e-5, rtol=1e-5)
    before = bank.values[bank.owners == owner_of("cat")].clone()
    count = len(bank)
    write_facts(lm, bank, {"cat": FACTS["cat"]})  # the same again takes the place of the old
    assert len(bank) == count
    torch.testing.assert_close(bank.values[bank.owners == owner_of("cat")], before)


def test_rows_of_the_end_alone(written):
    lm, _, bank = written
    start = FACTS["cat"].index("house")
    write_facts(lm, bank, {"cat": FACTS["cat"]}, starts={"cat": start})
    tokens = lm.tokenizer(FACTS["cat"], return_offsets_mapping=True)
    wanted = [
        token for token, (_, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True) if end > start
    ]
    assert int((bank.owners == owner_of("cat")).sum()) == len(wanted)
    for text, start in (("", 0), ("cat", 3)):
        with pytest.raises(ConfigError, match="no token to be written"):
            write_facts(lm, bank, {"cat": text}, starts={"cat": start})


def test_another_readers_rows_are_refused(written, tiny_lm):
    _, reader, bank = written
    reader.read_from(bank)
    other = tiny_lm(seed=1)
    torch.manual_seed(5)
    stranger = add_row_reader(other.model, 0, **SETTINGS)
    with pytest.raises(DatastoreMismatch, match="are those of reader"):
        stranger.read_from(bank)
    with pytest.raises(DatastoreMismatch, match="are those of reader"):
        write_facts(other, bank, FACTS)
    with pytest.raises(ModelError, match="has 0 readers"):
        write_facts(tiny_lm(), bank, FACTS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_in_batches_is_that_of_single_texts(tiny_lm, family, beams):
    lm = tiny_lm(family)
    plain = tiny_lm(family)
    reader = trained(add_row_reader(lm.model, 0, **SETTINGS))
    reader.rows = some_rows(reader)
    lm.tokenizer.padding_side = "left"
    prompts = ["the cat was", "in the morning the rain was over and a"]
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    batch = lm.tokenizer(prompts, return_tensors="pt", padding=True)
    together = lm.model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    changed = False
    for prompt, row in zip(prompts, together, strict=True):
        single = lm.tokenizer(prompt, return_tensors="pt")
        alone = lm.model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
        assert row[: len(alone)].equal(alone)
        without = plain.model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
        changed = changed or not alone.equal(without)
    assert changed, "reading changes nothing that is generated"


def test_a_table_on_disk_reads_as_one_in_memory(written):
    lm, reader, bank = written
    with torch.no_grad():
        reader.rows = bank
        on_disk = lm.model(IDS).logits
        reader.rows = TensorRows(bank.keys[: len(bank)], bank.values[: len(bank)])
        torch.testing.assert_close(lm.model(IDS).logits, on_disk)
        bank.publish(bank.folder.with_name("published"))
        with Bank(bank.folder.with_name("published")) as published:
            reader.read_from(published)
            assert lm.model(IDS).logits.equal(on_disk)


@pytest.mark.parametrize("how", ["plain", "checkpointed", "autocast"])
def test_gradients_reach_the_reader(how):
    model = tiny_model("llama")
    reader = trained(add_row_reader(model, 0, **SETTINGS))
    rows = some_rows(reader)
    rows.keys.requires_grad_()
    model.requires_grad_(False)
    reader.requires_grad_(True)
    model.train()
    if how == "checkpointed":
        model.activation_checkpointing_enable({"use_reentrant": False})
    with reader.reading(rows), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    for name in ("query", "out"):
        assert getattr(reader, name).weight.grad.abs().sum() > 0
    assert reader.threshold.grad.abs() > 0
    assert rows.keys.grad.abs().sum() > 0
    assert all(item.grad is None for name, item in model.named_parameters() if "added" not in name)


def test_half_precision_models_read(tiny_lm):
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = model(IDS).logits
    reader = trained(add_row_reader(model, 0, **SETTINGS))
    assert model(IDS).logits.equal(before)
    reader.rows = some_rows(reader)
    after = model(IDS).logits
    assert after.dtype == torch.bfloat16
    assert not after.equal(before)


def test_saving_and_loading(written, tmp_path, tiny_lm):
    lm, reader, bank = written
    reader.read_from(bank)
    with torch.no_grad():
        expected = lm.model(IDS).logits
    save_row_reader(lm.model, tmp_path / "reader")
    lm.model.save_pretrained(tmp_path / "model")  # with the reader in it: the model's own names are kept
    loaded = tiny_lm().model
    again = load_row_reader(loaded, tmp_path / "reader")
    again.read_from(bank)
    assert loaded(IDS).logits.equal(expected)
    with pytest.raises(ConfigError, match="has a RowReader already"):
        load_row_reader(loaded, tmp_path / "reader")
    remove_beside(loaded, again)
    assert loaded(IDS).logits.equal(tiny_lm().model(IDS).logits)


def test_what_cannot_be_loaded(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="holds no reader"):
        load_row_reader(model, tmp_path)
    add_row_reader(model, 1, **SETTINGS)
    save_row_reader(model, tmp_path)
    for other in (tiny_model("gpt2"), tiny_model("llama", vocab_size=300)):
        if other.config.model_type == "llama":
            load_row_reader(other, tmp_path)  # the vocabulary's size does not matter
        else:
            with pytest.raises(DatastoreMismatch, match="was trained in a llama"):
                load_row_reader(other, tmp_path)
            add_row_reader(other, 1)  # nothing was left behind
    path = tmp_path / "reader.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"version": 2}))
    with pytest.raises(FormatVersionError, match="update memlm"):
        load_row_reader(tiny_model("llama"), tmp_path)
    path.write_text(json.dumps(described)[:-9])
    with pytest.raises(DatastoreCorrupt, match="is damaged"):
        load_row_reader(tiny_model("llama"), tmp_path)
    path.write_text(json.dumps(described))
    weights = tmp_path / "reader.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DatastoreCorrupt, match="is damaged"):
        load_row_reader(tiny_model("llama"), tmp_path)


def test_what_was_read_can_be_watched():
    reader = trained(RowReader(16, 16, **SETTINGS))
    reader.rows = some_rows(reader)
    reader(torch.randn(2, 5, 16))
    assert reader.amount.shape == (10,)
    assert ((reader.amount > 0) & (reader.amount < 1)).all()


def test_a_window_is_the_position_beside_those_before_it():
    reader = RowReader(6, 5, **SETTINGS, window=3)
    hidden = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    normed = ((hidden - hidden.mean(-1, keepdim=True)) / hidden.std(-1, correction=0, keepdim=True)).double().numpy()
    windows = reader.windows(hidden).double().numpy()
    for place in range(4):
        for back in range(3):
            expected = normed[:, place - back] if place >= back else 0.0
            np.testing.assert_allclose(
                windows[:, place, 6 * back : 6 * back + 6], expected * np.ones((2, 6)), atol=1e-4
            )
    with pytest.raises(ModelError, match="without their order; use a window of 1"):
        reader.windows(hidden[0])
    with pytest.raises(ConfigError, match="window is 0"):
        RowReader(6, 5, window=0)


def test_a_window_tells_names_of_two_tokens_apart(tiny_lm, tmp_path):
    """With a window of one the state of the last token decides; here the layer cannot look back."""
    found = {}
    for window in (1, 2):
        lm = tiny_lm()
        with torch.no_grad():
            lm.model.model.layers[0].self_attn.o_proj.weight.zero_()
        reader = add_row_reader(lm.model, 0, **SETTINGS, window=window)
        with create_fact_bank(lm, reader, tmp_path / str(window), rows=50) as bank:
            write_facts(lm, bank, {"one": "ab c", "two": "xb d"}, starts={"one": 2, "two": 2})
            keys = bank.keys[:2] if len(bank.keys[0]) else bank.keys
            found[window] = float((keys[0] * keys[1]).sum())
    assert found[1] > 0.99
    assert found[2] < 0.95


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_window(tiny_lm, family):
    lm = tiny_lm(family)
    reader = trained(add_row_reader(lm.model, 0, **SETTINGS, window=2))
    reader.rows = some_rows(reader)
    lm.tokenizer.padding_side = "left"
    prompts = ["the cat was", "in the morning the rain was over and a"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    batch = lm.tokenizer(prompts, return_tensors="pt", padding=True)
    together = lm.model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for prompt, row in zip(prompts, together, strict=True):
        single = lm.tokenizer(prompt, return_tensors="pt")
        alone = lm.model.generate(**single, **settings)[0, single["input_ids"].shape[1] :]
        assert row[: len(alone)].equal(alone)
    with pytest.raises(ModelError, match=r"looks at the last 2 positions.*use_cache=False"):
        lm.model.generate(**batch, **settings | {"use_cache": True})
    remove_beside(lm.model, reader)
    lm.model.generate(**batch, **settings | {"use_cache": True})  # nothing is left of it


def test_a_window_is_saved(tiny_lm, tmp_path):
    model = tiny_lm().model
    reader = trained(add_row_reader(model, 0, **SETTINGS, window=2))
    save_row_reader(model, tmp_path)
    other = tiny_lm().model
    again = load_row_reader(other, tmp_path)
    assert again.window == 2
    rows = some_rows(reader)
    reader.rows = again.rows = rows
    assert model(IDS, use_cache=False).logits.equal(other(IDS, use_cache=False).logits)


def test_training_never_has_two_rows_of_one_name(monkeypatch):
    """A name that is written again with another answer could not be told from itself."""
    model = tiny_model("llama")
    reader = add_row_reader(model, 0, **SETTINGS)
    seen = []

    def loss(model, reader, asked, text, others=None):
        found, made = real(model, reader, asked, text, others)
        seen.append((len(asked), 0 if others is None else len(others)))
        return found, made

    real = reader_training.reader_loss
    monkeypatch.setattr(reader_training, "reader_loss", loss)
    generator = np.random.default_rng(0)

    def episodes():
        while True:
            names = generator.permutation(6)[:4]
            answers = generator.integers(100, 120, size=4)
            pairs = zip(names.tolist(), answers.tolist(), strict=True)
            asked = [Asked([0, 10 + name, answer], 2, [0, 50, 10 + name, answer], 3) for name, answer in pairs]
            yield asked, IDS

    train_reader(model, reader, episodes(), 12, show_progress=False)
    assert seen[0] == (4, 0)
    assert all(asked + others <= 6 for asked, others in seen), "six names are all there are"
    assert seen[-1][1] == 2

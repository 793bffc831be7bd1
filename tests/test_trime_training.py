"""Training with memory: batches, the loss of whole models, and the Trainer that takes it."""

import json
import math
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback, TrainingArguments

from memlm import ops
from memlm.errors import ConfigError, ModelError
from memlm.models import find_key_site
from memlm.training import (
    External,
    Local,
    LongTerm,
    Segments,
    TrimeLoss,
    TrimeTrainer,
    _trime,
    bm25_chain,
    bm25_segments,
    consecutive_segments,
)
from oracle import teacher_forced
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

LENGTH = 8
FAMILY = ["llama", "gpt2", "gpt_neox"]


def documents_of(*lengths, seed=0, vocabulary=VOCAB_SIZE - 1):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, length) for length in lengths]


def batch_of(dataset, number=0):
    rows = [dataset[number * dataset.rows_per_batch + row] for row in range(dataset.rows_per_batch)]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda values: max(values) > 1)


@given(lengths, st.integers(2, 9), st.integers(1, 4), st.integers(1, 4))
def test_every_token_but_a_documents_first_is_a_target_once(sizes, length, streams, consecutive):
    documents = [np.arange(size) + 100 * number for number, size in enumerate(sizes)]
    segments = consecutive_segments(documents, length, streams=streams, consecutive=consecutive, padding=999)
    targets, numbers = [], []
    for row in (segments[number] for number in range(len(segments))):
        wanted = row["labels"][1:][row["labels"][1:] != -100]
        targets += wanted.tolist()
        if row["segment"] >= 0:
            numbers.append(row["segment"])
            text = documents[row["document"]][row["position"] :][:length]
            assert row["input_ids"].tolist() == [*text, *[999] * (length - len(text))]
            assert row["labels"].tolist() == [-100, *text[1:], *[-100] * (length - len(text))]
        else:
            assert not len(wanted), "padding has no targets"
    assert sorted(targets) == sorted(token for document in documents for token in document[1:])
    assert sorted(numbers) == list(range(len(segments.cuts))), "each segment exactly once"
    assert len(segments) % segments.rows_per_batch == 0, "batches are whole"
    assert segments.rows_per_batch == streams * consecutive


@given(lengths, st.integers(1, 4), st.integers(1, 4))
def test_a_stream_goes_through_its_part_of_the_text_in_order(sizes, streams, consecutive):
    segments = consecutive_segments(documents_of(*sizes), 4, streams=streams, consecutive=consecutive)
    order = segments.order.reshape(-1, streams, consecutive)
    parts = [part[part >= 0].tolist() for part in order.transpose(1, 0, 2).reshape(streams, -1)]
    assert list(chain.from_iterable(parts)) == list(range(len(segments.cuts))), "one stream after the other is the text"
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * consecutive


def test_a_batch_of_two_streams():
    segments = consecutive_segments(documents_of(22, 8), LENGTH, streams=2, consecutive=2)
    assert segments.order.tolist() == [0, 1, 2, 3]
    rows = [segments[number] for number in range(4)]
    assert [(row["document"], row["position"]) for row in rows] == [(0, 0), (0, 7), (0, 14), (1, 0)]
    assert rows[0]["input_ids"][-1] == rows[1]["input_ids"][0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: consecutive_segments(documents_of(9), 1), "segments of 1 tokens have no target"),
        (lambda: consecutive_segments(documents_of(1, 0), 4), "no document has two tokens"),
        (lambda: consecutive_segments(documents_of(9), 4, streams=0), "streams is 0"),
        (lambda: consecutive_segments(documents_of(9), 4, consecutive=0), "consecutive is 0"),
        (lambda: bm25_segments(documents_of(9), 4, rows=0), "rows is 0"),
        (lambda: TrimeLoss(memories=[], warmup=1.5), "warmup is 1.5"),
    ],
)
def test_settings_that_cannot_work(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def near_duplicates(count=30, size=40):
    """Pairs (i, count + i) that share three quarters of their tokens; all else is random."""
    generator = np.random.default_rng(1)
    first = generator.integers(0, 2000, (count, size))
    second = first.copy()
    second[:, : size // 4] = generator.integers(0, 2000, (count, size // 4))
    return list(np.concatenate([first, second]))


def test_a_chain_puts_near_duplicates_side_by_side():
    segments = near_duplicates()
    order = bm25_chain(segments, seed=3)
    assert sorted(order) == list(range(60))
    place = np.argsort(order)
    assert (np.abs(place[:30] - place[30:]) == 1).all()
    assert order.tolist() == bm25_chain(segments, seed=3).tolist()
    assert order.tolist() != bm25_chain(segments, seed=4).tolist()
    shuffled = np.argsort(np.random.default_rng(0).permutation(60))
    assert (np.abs(shuffled[:30] - shuffled[30:]) == 1).sum() < 5, "which chance does not do"


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=25), st.integers(1, 30))
def test_a_chain_has_every_segment_once(tokens, hits):
    segments = [np.array(part) for part in tokens]
    assert sorted(bm25_chain(segments, hits=hits)) == list(range(len(segments)))


def test_the_next_of_a_chain_is_the_best_unused():
    """By the formula: one rare token shared beats two common ones; a segment that shares nothing comes by chance."""
    segments = [np.array(part) for part in ([1, 2, 3], [2, 3, 9], [2, 3, 8], [1, 7, 6], [2, 3, 5])]
    for seed in range(5):
        order = bm25_chain(segments, seed=seed).tolist()
        if 0 in order[:-1] and 3 not in order[: order.index(0)]:
            assert order[order.index(0) + 1] == 3
            return
    pytest.fail("no seed put the first segment before its likeness")


def test_a_chain_across_groups():
    segments = near_duplicates()
    pairs = np.tile(np.arange(30), 2)
    order = bm25_chain(segments, hits=60, groups=pairs, seed=3)
    assert sorted(order) == list(range(60))
    assert (pairs[order[1:]] == pairs[order[:-1]]).sum() <= 1, "the last two may be left over"
    alone = bm25_chain(segments, hits=60, groups=np.arange(60), seed=3)
    assert alone.tolist() == bm25_chain(segments, hits=60, seed=3).tolist()


def test_batches_of_a_chain_across_documents():
    documents = [
        np.concatenate(parts) for parts in zip(near_duplicates(10, 12)[:10], near_duplicates(10, 12)[10:], strict=True)
    ]
    for across in (False, True):
        segments = bm25_segments(documents, 13, rows=2, hits=20, across_documents=across)
        owners = segments.cuts[segments.order, 0]
        share = (owners[1:] == owners[:-1]).mean()
        assert share < 0.1 if across else share > 0.4


def test_batches_of_a_chain():
    texts = near_duplicates(10, 12)
    segments = bm25_segments(texts, 12, rows=3, seed=3)
    assert segments.order.tolist() == [*bm25_chain(texts, seed=3), -1]
    assert segments.rows_per_batch == 3


MEMORIES = {
    "local": [Local()],
    "long": [Local(), LongTerm()],
    "external": [Local(), External(drop_own=0.5)],
    "none": [],
}


def explicit_loss(model, site, batch, kind, dropped=()):
    """Return log P of every target by loops, with keys and logits from plain passes, one row at a time."""
    entries, logits = [], []
    for row in range(len(batch["input_ids"])):
        log_probs, keys = teacher_forced(model, site, batch["input_ids"][row])
        for place in range(LENGTH - 1):
            target = batch["labels"][row, place + 1].item()
            if target != -100:
                where = [batch[name][row].item() for name in ("segment", "document", "position")]
                entries.append((where[0], where[1], where[2] + place, keys[place], target))
                logits.append(log_probs[place])
    result = []
    for (segment, document, position, query, target), scores in zip(entries, logits, strict=True):
        mass = np.exp(scores)
        for other, other_document, other_position, key, token in entries:
            earlier = document == other_document and other_position < position
            own = segment == other
            if own:
                seen = earlier and segment not in dropped and kind != "none"
            else:
                seen = {"long": earlier, "external": True}.get(kind, False)
            if seen:
                mass[token] += math.exp(query @ key / math.sqrt(len(key)))
        result.append(np.log(mass[target] / mass.sum()))
    return np.array(result)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("kind", sorted(MEMORIES))
def test_the_loss_of_a_model(family, kind):
    """Log-probabilities in the place of logits: where the vocabulary's normalizer is one, the numbers are the same."""
    model = tiny_model(family)
    head = model.get_output_embeddings()
    site = find_key_site(model)
    batch = batch_of(consecutive_segments(documents_of(22, 20, 5), LENGTH, streams=2, consecutive=4))
    assert (batch["segment"] == -1).any(), "rows of padding"
    assert (batch["labels"][batch["segment"] >= 0] == -100).any(), "short segments"
    # raw logits enter the softmax, not log-probabilities: a constant on all of them changes the weight of the memory
    head.register_forward_hook(lambda _, __, output: output.log_softmax(dim=-1))
    loss = TrimeLoss(memories=MEMORIES[kind], warmup=0.0)
    found = loss.log_probs(model, batch)
    expected = explicit_loss(model, site, batch, kind)
    np.testing.assert_allclose(found.with_memory.detach(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.without_memory, explicit_loss(model, site, batch, "none"), rtol=1e-4, atol=1e-4)
    assert not found.without_memory.requires_grad
    if kind != "none":
        assert (found.with_memory - found.without_memory).abs().max() > 0.1
    mean = loss(model, batch, update=0, updates=10)
    assert mean.item() == pytest.approx(-expected.mean(), rel=1e-4) or kind == "external"
    assert loss(model, batch, update=0, updates=10, targets=7).item() == pytest.approx(mean.item() * len(expected) / 7)


def test_own_segments_are_dropped_in_training_alone():
    model = tiny_model("llama")
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: output.log_softmax(dim=-1))
    site = find_key_site(model)
    batch = batch_of(consecutive_segments(documents_of(22, 20, 5), LENGTH, streams=2, consecutive=4))
    loss = TrimeLoss(memories=MEMORIES["external"], seed=5)
    numbers = torch.arange(7)
    dropped = numbers[MEMORIES["external"][1].drops(numbers, (5, 30))].tolist()
    assert 0 < len(dropped) < 7
    expected = explicit_loss(model, site, batch, "external", dropped)
    assert loss(model, batch, update=30, updates=100).item() == pytest.approx(-expected.mean(), rel=1e-4)
    whole = explicit_loss(model, site, batch, "external")
    np.testing.assert_allclose(loss.log_probs(model, batch).with_memory.detach(), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILY)
def test_the_first_updates_take_the_plain_loss(family):
    model, batch = tiny_model(family), batch_of(consecutive_segments(documents_of(40), LENGTH, consecutive=6))
    plain = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
    loss = TrimeLoss(memories=[Local()])
    assert loss(model, batch, update=4, updates=100).item() == pytest.approx(plain, rel=1e-5)
    assert abs(loss(model, batch, update=5, updates=100).item() - plain) > 0.01


def test_gradients_reach_the_keys_of_the_memory():
    """Only as an entry is the first segment of use to the targets of the second."""
    model = tiny_model("llama")
    batch = batch_of(consecutive_segments(documents_of(15), LENGTH, consecutive=2))
    found = TrimeLoss(memories=[LongTerm()]).log_probs(model, batch).with_memory
    embeddings = model.get_input_embeddings().weight
    gradient = torch.autograd.grad(found[7:].sum(), embeddings)[0]
    only_first = sorted(set(batch["input_ids"][0, :-1].tolist()) - set(batch["input_ids"][1].tolist()))
    assert len(only_first) > 3
    assert (gradient[only_first].abs().sum(dim=1) > 1e-5).all()


def test_a_plain_batch_is_one_segment_and_document_a_row():
    model = tiny_model("gpt2")
    dataset = consecutive_segments(documents_of(LENGTH, LENGTH), LENGTH, consecutive=2)
    full = batch_of(dataset)
    plain = {name: full[name] for name in ("input_ids", "labels")}
    for memories in ([Local()], [Local(), External()]):
        loss = TrimeLoss(memories=memories)
        assert loss(model, plain, update=9, updates=9).equal(loss(model, full, update=9, updates=9))
    with pytest.raises(ConfigError, match="the batch has the fields input_ids, labels; LongTerm needs segment"):
        TrimeLoss(memories=[LongTerm()])(model, plain, update=9, updates=9)


@pytest.mark.parametrize("kind", sorted(MEMORIES))
@pytest.mark.parametrize("size", [1, 100, 10**4])
def test_chunks_change_neither_the_loss_nor_its_gradients(kind, size, monkeypatch):
    """In float64, with 44 targets: one of them at a time, two, or all."""
    batch = batch_of(consecutive_segments(documents_of(22, 20, 5), LENGTH, streams=2, consecutive=4))
    loss, results, model = TrimeLoss(memories=MEMORIES[kind], seed=5), [], tiny_model("llama").double()
    sizes = []
    plain = ops.similarities
    monkeypatch.setattr(ops, "similarities", lambda queries, keys: sizes.append(len(queries)) or plain(queries, keys))
    for chunk in (10**6, size):
        monkeypatch.setattr(_trime, "_CHUNK", chunk)
        model.zero_grad()
        sizes.clear()
        value = loss(model, batch, update=30, updates=100)
        assert value.dtype == torch.float64
        value.backward()
        results.append((value, gradients(model)))
    assert set(sizes) == {min(max(1, size // 44), 44)}
    (dense, expected), (value, found) = results
    torch.testing.assert_close(value, dense, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        whole = loss.log_probs(model, batch)
        monkeypatch.setattr(_trime, "_CHUNK", 10**6)
        torch.testing.assert_close(whole, loss.log_probs(model, batch), rtol=1e-13, atol=1e-13)


def test_a_batch_without_targets_has_no_loss():
    model = tiny_model("llama")
    batch = batch_of(consecutive_segments(documents_of(20), LENGTH, consecutive=3))
    batch["labels"][:] = -100
    for update in (0, 5):
        loss = TrimeLoss(memories=[Local(), LongTerm(), External()], warmup=0.5)(model, batch, update=update, updates=9)
        loss.backward()
        assert loss.item() == 0
        assert all(not part.any() for part in gradients(model).values())


@pytest.mark.parametrize("family", FAMILY)
def test_checkpointed_activations_change_nothing(family):
    batch = batch_of(consecutive_segments(documents_of(40), LENGTH, consecutive=6))
    loss, results = TrimeLoss(memories=[Local(), LongTerm()]), []
    for checkpointed in (False, True):
        model = tiny_model(family).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
            assert model.is_activation_checkpointing
        value = loss(model, batch, update=9, updates=9)
        value.backward()
        results.append((value, gradients(model)))
    (plain, expected), (value, found) = results
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(found, expected)


def test_reentrant_checkpointing_is_refused_where_it_cuts_gradients():
    batch = batch_of(consecutive_segments(documents_of(40), LENGTH, consecutive=6))
    loss = TrimeLoss(memories=[Local()])
    model = tiny_model("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModelError, match=r"have no gradient: .*use_reentrant"):
        loss(model, batch, update=9, updates=9)
    model = tiny_model("gpt_neox").train()  # its keys are read after the layers
    model.activation_checkpointing_enable({"use_reentrant": True})
    loss(model, batch, update=9, updates=9).backward()
    frozen = tiny_model("llama").requires_grad_(False)
    frozen.get_output_embeddings().weight = torch.nn.Parameter(frozen.get_output_embeddings().weight.clone())
    loss(frozen, batch, update=9, updates=9).backward()


def test_autocast_is_close_to_single_precision():
    model, batch = tiny_model("llama"), batch_of(consecutive_segments(documents_of(40), LENGTH, consecutive=6))
    loss = TrimeLoss(memories=[Local(), LongTerm()])
    plain = loss(model, batch, update=9, updates=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = loss(model, batch, update=9, updates=9)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(plain.item(), rel=0.02)
    assert all(part.isfinite().all() for part in gradients(model).values())


def test_accumulation_is_one_big_batch():
    """Local memory does not look beyond a row, so how rows are batched must not matter; some rows are padding."""
    batch = batch_of(consecutive_segments(documents_of(20, 27, 5), LENGTH, streams=2, consecutive=4))
    targets = int((batch["labels"][:, 1:] != -100).sum())
    loss, model = TrimeLoss(memories=[Local()]), tiny_model("gpt2")
    whole = loss(model, batch, update=9, updates=9)
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    for part in range(0, 8, 2):
        rows = {name: value[part : part + 2] for name, value in batch.items()}
        value = loss(model, rows, update=9, updates=9, targets=targets)
        whole = whole - value
        value.backward()
    assert whole.item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-5)


# The Trainer


class StopAt(TrainerCallback):
    """Stops as an interruption after a checkpoint would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def words():
    """Three documents in which a run of tokens comes back."""
    parts = documents_of(30, 30, 30, vocabulary=20)
    return [np.concatenate([part, part, part]) for part in parts]


def trainer(folder, dataset, loss, model=None, valid=None, callbacks=(), **settings):
    settings = {
        "max_steps": 12,
        "save_steps": 6,
        "logging_steps": 1,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": dataset.rows_per_batch,
        "per_device_eval_batch_size": dataset.rows_per_batch,
        "max_grad_norm": 1.0,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    } | settings
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    model = tiny_model("gpt2") if model is None else model
    return TrimeTrainer(
        model, arguments, train_dataset=dataset, eval_dataset=valid, loss=loss, callbacks=list(callbacks)
    )


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def with_dropout():
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


def test_resuming_gives_the_losses_of_a_run_that_was_not_interrupted(tmp_path):
    """With dropout and dropped memories; 7 batches an epoch, so that the checkpoint is in the middle of one."""
    dataset = consecutive_segments(words(), LENGTH, streams=2, consecutive=3)
    assert len(dataset) / dataset.rows_per_batch == 7
    loss = TrimeLoss(memories=[Local(), LongTerm(), External(drop_own=0.5)], warmup=0.2)
    whole = trainer(tmp_path / "whole", dataset, loss, with_dropout())
    whole.train()
    part = trainer(tmp_path / "part", dataset, loss, with_dropout(), callbacks=[StopAt(6)])
    part.train()
    assert len(losses_of(part)) == 6
    resumed = trainer(tmp_path / "part", dataset, loss, with_dropout())
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-6"))
    assert len(losses_of(whole)) == 12
    assert losses_of(resumed) == pytest.approx(losses_of(whole), abs=1e-6)
    assert losses_of(part) == pytest.approx(losses_of(whole)[:6], abs=1e-6)
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    assert json.loads((tmp_path / "part" / "checkpoint-12" / "trainer_state.json").read_text())["global_step"] == 12


class Seen(TrimeLoss):
    """Keeps the segment numbers of the batches and the updates."""

    def __call__(self, model, batch, *, update, updates, targets=None):
        self.memories.append((update, updates, batch.get("segment", torch.empty(0)).tolist(), int(targets)))
        return TrimeLoss(memories=[Local()])(model, batch, update=update, updates=updates, targets=targets)


def test_rows_come_in_the_order_of_the_dataset(tmp_path):
    dataset = consecutive_segments(words(), LENGTH, streams=2, consecutive=3)
    seen = []
    run = trainer(tmp_path, dataset, Seen(memories=seen), max_steps=5, gradient_accumulation_steps=2)
    run.train()
    batches = dataset.order.reshape(7, 6).tolist()
    assert [numbers for _, _, numbers, _ in seen] == (batches + batches)[: len(seen)]
    assert [(update, updates) for update, updates, _, _ in seen] == [(k, 5) for k in (0, 0, 1, 1, 2, 2, 3, 4, 4)]
    whole = sum(int((dataset[row]["labels"][1:] != -100).sum()) for row in range(12))
    assert [targets for *_, targets in seen[:2]] == [whole, whole]
    plain = [{name: dataset[row][name] for name in ("input_ids",)} for row in range(6)]
    for row in plain:
        row["labels"] = row["input_ids"]
    seen.clear()
    run = TrimeTrainer(tiny_model("gpt2"), run.args, train_dataset=plain, loss=Seen(memories=seen))
    run.args.max_steps, run.args.gradient_accumulation_steps = 1, 1
    run.train()
    assert seen[0][3] == 6 * (LENGTH - 1), "in other datasets, too, a row's first label is no target"


def test_accumulation_in_the_trainer(tmp_path):
    """Two updates by batches of two rows, two at a time, are two updates by batches of four."""
    documents, results = words(), []
    for rows, steps in ((4, 1), (2, 2)):
        dataset = consecutive_segments(documents, LENGTH, consecutive=rows)
        settings = {"max_steps": 2, "gradient_accumulation_steps": steps, "optim": "sgd"}
        run = trainer(tmp_path / str(rows), dataset, TrimeLoss(memories=[Local()], warmup=0), **settings)
        run.train()
        results.append((losses_of(run), list(run.model.parameters())))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_evaluation_with_memory_and_without(tmp_path):
    """On a last batch that is mostly padding, as on the first, every target counts once."""
    train = consecutive_segments(words(), LENGTH, streams=2, consecutive=3)
    valid = consecutive_segments(words()[:1], LENGTH, streams=2, consecutive=3)
    loss = TrimeLoss(memories=[Local(), LongTerm()])
    run = trainer(tmp_path, train, loss, valid=valid, eval_strategy="steps", eval_steps=6, bf16=True)
    run.train()
    rows = [row for row in run.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in rows] == [6, 12]
    found = run.evaluate()
    batches = [batch_of(valid, number) for number in range(len(valid) // 6)]
    assert len(batches) == 3
    with torch.no_grad():
        parts = [loss.log_probs(run.model, batch) for batch in batches]
    for suffix, name in (("", "with_memory"), ("_without_memory", "without_memory")):
        expected = -torch.cat([getattr(part, name) for part in parts]).mean().item()
        assert found[f"eval_loss{suffix}"] == pytest.approx(expected, rel=1e-3)
        assert found[f"eval_perplexity{suffix}"] == pytest.approx(math.exp(expected), rel=1e-2)
        assert rows[1][f"eval_loss{suffix}"] == pytest.approx(expected, rel=0.02)
    assert found["eval_loss"] < found["eval_loss_without_memory"] - 0.1, "the text repeats itself"
    assert found["eval_samples_per_second"] > 0


@pytest.mark.parametrize("family", FAMILY)
def test_training_with_memory_learns_to_use_it(family, tmp_path):
    """On text that repeats itself after 30 tokens, beyond a segment; the same model without memory cannot see that."""
    texts = [np.tile(part, 3) for part in documents_of(*[30] * 12, vocabulary=200)]
    train = consecutive_segments(texts[:8], 16, consecutive=6)
    valid = consecutive_segments(texts[8:], 16, consecutive=6)
    loss = TrimeLoss(memories=[Local(), LongTerm()])
    settings = {"max_steps": 40, "activation_checkpointing": True, "save_strategy": "no", "learning_rate": 1e-2}
    run = trainer(tmp_path, train, loss, tiny_model(family), valid, **settings)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.5
    assert after["eval_loss"] < after["eval_loss_without_memory"] - 0.5


def test_the_trainer_refuses_torn_batches_and_other_losses(tmp_path):
    dataset = consecutive_segments(words(), LENGTH, streams=2, consecutive=3)
    loss = TrimeLoss(memories=[Local()])
    with pytest.raises(ConfigError, match="per_device_train_batch_size is 4, but 6 rows of the train dataset"):
        trainer(tmp_path, dataset, loss, per_device_train_batch_size=4)
    with pytest.raises(ConfigError, match="per_device_eval_batch_size is 5, but 6 rows of the eval dataset"):
        trainer(tmp_path, dataset, loss, valid=dataset, per_device_eval_batch_size=5)
    with pytest.raises(ConfigError, match="label smoothing"):
        trainer(tmp_path, dataset, loss, label_smoothing_factor=0.1)


def test_the_families_have_both_key_sites():
    assert set(FAMILY) <= set(FAMILIES)
    sites = [find_key_site(tiny_model(family)).tensor for family in FAMILY]
    assert sites == ["input", "input", "output"]
    assert isinstance(consecutive_segments(words(), LENGTH), Segments)

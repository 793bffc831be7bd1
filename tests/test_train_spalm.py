"""Training with neighbors' next tokens: the loss, what comes with a batch, and runs from recipes."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import TrainingArguments

import memlm
from command_line import refused, run
from memlm import Datastore, Document, evaluate
from memlm.datastore._manifest import Manifest
from memlm.errors import ConfigError, CorpusError, ModelError, UnsupportedArchitecture
from memlm.mixtures import SpalmMixture, load_mixture
from memlm.training import (
    SpalmBatches,
    SpalmLoss,
    SpalmRecipe,
    SpalmSettings,
    TrimeSchedule,
    TrimeTrainer,
    add_spalm_gate,
    load_spalm_recipe,
    neighbor_tokens,
    spalm_segments,
    train_spalm,
)
from memlm.training import _trime_run as running
from tiny_memories import lm_of
from tiny_models import tiny_folder, tiny_model

RECIPE = """
train = ["train"]
valid = ["valid"]
from = "tiny"
license = "made up"

[memory]
gates = "vector"

[batches]
length = 16
streams = 3
carry = 10

[schedule]
steps = 8
learning_rate = 0.003
warmup_steps = 2
accumulate = 2
evaluate_every = 3
checkpoint_every = 3
valid_tokens = 120
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Texts in which sentences come back in other documents, a tiny Llama, and a recipe."""
    folder = tmp_path_factory.mktemp("spalm")
    generator = np.random.default_rng(0)
    sentences = ["".join(generator.choice(list("abcdefghijklmnop ."), 40)) for _ in range(5)]
    for split, count in (("train", 8), ("valid", 2), ("test", 2)):
        (folder / split).mkdir()
        for number in range(count):
            chosen = generator.choice(sentences, 3)
            (folder / split / f"{number}.txt").write_text(f"{number} " + " ".join(chosen))
    tiny_folder("llama", folder / "tiny")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def recipe(place):
    return load_spalm_recipe(place / "recipe.toml")


@pytest.fixture(scope="module")
def finished(place, recipe):
    return place / "whole", train_spalm(recipe, place / "whole", device="cpu", show_progress=False)


def losses_of(output):
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def batch_of(rows, length=7, k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (rows, length), generator=generator)
    neighbors = torch.randint(-1, 40, (rows, length, k), generator=generator)
    neighbors[0, 2] = -1  # a position that found nothing
    labels = ids.clone()
    labels[1, 4:] = -100
    return {"input_ids": ids, "labels": labels, "neighbors": neighbors}


def opened(family="llama", gates="scalar"):
    model = tiny_model(family)
    gate = add_spalm_gate(model, gates=gates)
    with torch.no_grad():
        for part in (gate.weight, gate.bias):
            part.copy_(0.3 * torch.randn(part.shape, generator=torch.Generator().manual_seed(1)))
        gate.log_size.fill_(0.7)
    return model, gate


@pytest.mark.parametrize("gates", ["scalar", "vector"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_the_loss_is_the_equation_in_float64(family, gates):
    model, gate = opened(family, gates)
    batch = batch_of(2)
    with torch.no_grad():
        loss = SpalmLoss()(model, batch, update=0, updates=1)
        hidden = model.base_model(batch["input_ids"]).last_hidden_state.double().numpy()
    head = model.get_output_embeddings()
    weight = head.weight.detach().double().numpy()
    bias = 0.0 if getattr(head, "bias", None) is None else head.bias.detach().double().numpy()
    G, c = gate.weight.detach().double().numpy(), gate.bias.detach().double().numpy()
    total, count = 0.0, 0
    for row in range(2):
        for place in range(6):
            target = int(batch["labels"][row, place + 1])
            if target == -100:
                continue
            h = hidden[row, place]
            near = batch["neighbors"][row, place].numpy()
            z = h
            if (near >= 0).any():
                e = weight[near[near >= 0]]
                a = np.exp(e @ h - (e @ h).max())
                g = 1 / (1 + np.exp(-(G @ h + c)))
                z = (1 - g) * np.exp(0.7) * ((a / a.sum()) @ e) + g * h
            logits = weight @ z + bias
            top = logits.max()
            total -= logits[target] - top - np.log(np.exp(logits - top).sum())
            count += 1
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


def test_gradients_reach_the_model_its_embeddings_and_the_gate():
    model, gate = opened()
    SpalmLoss()(model, batch_of(2), update=0, updates=1).backward()
    for part in (gate.weight, gate.bias, gate.log_size, model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight):
        assert part.grad is not None
        assert bool((part.grad != 0).any())


def test_without_neighbors_it_is_cross_entropy():
    model, _ = opened()
    batch = batch_of(2)
    batch["neighbors"] = torch.full((2, 7, 3), -1)
    found = SpalmLoss().log_probs(model, batch)
    expected = model(batch["input_ids"], labels=batch["labels"]).loss
    assert (-found.with_memory.mean()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.without_memory.allclose(found.with_memory, atol=1e-5)
    # the control: with neighbors it is something else
    found = SpalmLoss().log_probs(model, batch_of(2))
    assert (found.with_memory - found.without_memory).abs().max() > 0.01


def test_a_model_without_a_gate_and_a_gate_without_a_kind_are_refused():
    with pytest.raises(ModelError, match="has no gate; give it one by add_spalm_gate"):
        SpalmLoss()(tiny_model("llama"), batch_of(2), update=0, updates=1)
    with pytest.raises(ConfigError, match="gates is 'both'; expected 'scalar', or 'vector'"):
        add_spalm_gate(tiny_model("llama"), gates="both")
    with pytest.raises(ModelError, match="scales or caps its logits"):
        add_spalm_gate(tiny_model("gemma2"))
    with pytest.raises(ConfigError, match="carry is -1"):
        SpalmLoss(-1)


def test_carried_tokens_are_seen_without_gradient():
    """A segment behind its context is scored as the whole is; a row that has none sees none."""
    model, _ = opened()
    whole = torch.randint(1, 40, (2, 12), generator=torch.Generator().manual_seed(3))
    neighbors = torch.randint(0, 40, (2, 12, 3), generator=torch.Generator().manual_seed(4))
    context = torch.zeros(2, 6, dtype=torch.long)
    context[0, :5] = whole[0, :5]
    batch = {"input_ids": whole[:, 5:], "labels": whole[:, 5:], "neighbors": neighbors[:, 5:]}
    behind = batch | {"context": context, "context_tokens": torch.tensor([5, 0])}
    loss = SpalmLoss(carry=6)
    found = loss.log_probs(model, behind).with_memory.view(2, 6)
    full = SpalmLoss().log_probs(model, {"input_ids": whole, "labels": whole, "neighbors": neighbors}).with_memory
    alone = SpalmLoss().log_probs(model, batch).with_memory.view(2, 6)
    assert found[0].allclose(full.view(2, 11)[0, 5:], atol=1e-4)
    assert found[1].allclose(alone[1], atol=1e-4)
    assert not found[0].allclose(alone[0], atol=1e-3)
    # keys and values of the context are constants: its embeddings get no gradient
    only = {name: value[:1] for name, value in behind.items()}
    only["context"], only["input_ids"] = torch.full((1, 6), 41), only["input_ids"]
    model.zero_grad()
    loss(model, only, update=0, updates=1).backward()
    assert (
        not model.get_input_embeddings().weight.grad[41].any()
        or model.lm_head.weight is model.model.embed_tokens.weight
    )


def test_neighbors_come_with_their_positions(tmp_path):
    lm = lm_of("llama")
    texts = ["the cat was in the house", "x", "the cat was on the roof of the house and sang"]
    memory = Datastore.build(
        lm, [Document(id=str(n), text=text) for n, text in enumerate(texts)], tmp_path / "s", show_progress=False
    )
    ids = [lm.tokenize(Document(id="", text=text)).ids for text in texts]
    found = neighbor_tokens(lm, ids, texts, memory, 3, show_progress=False)
    assert found.shape == (sum(len(item) - 1 for item in ids), 3)
    own = neighbor_tokens(lm, ids, texts, memory, 3, own_document=True, show_progress=False)
    targets = np.concatenate([item[1:] for item in ids])
    # a stored token is its own nearest neighbor; where two texts begin alike, it may be the other's
    assert (own == targets[:, None]).any(axis=1).all()
    assert (found == targets[:, None]).any(axis=1).mean() < 0.9
    segments = spalm_segments(ids, own, 5, streams=2, carry=3)
    seen = 0
    for index in range(len(segments)):
        row = segments[index]
        for place in range(4):
            if row["labels"][place + 1] != -100:
                assert row["labels"][place + 1] in row["neighbors"][place]
                seen += 1
            else:
                assert (row["neighbors"][place] == -1).all()
        if row["document"] >= 0:
            start = row["position"]
            before = ids[row["document"]][max(0, start - 3) : start]
            assert row["context_tokens"] == len(before)
            assert (row["context"][: len(before)] == before).all()
    assert seen == len(targets)


def test_with_the_trainer_of_transformers(tmp_path):
    lm = lm_of("llama")
    texts = ["the cat was in the house. " * 4, "the cat was on the roof. " * 4]
    memory = Datastore.build(
        lm, [Document(id=str(n), text=text) for n, text in enumerate(texts)], tmp_path / "s", show_progress=False
    )
    ids = [lm.tokenize(Document(id="", text=text)).ids for text in texts]
    data = spalm_segments(ids, neighbor_tokens(lm, ids, texts, memory, 2, show_progress=False), 12, streams=2)
    model = tiny_model("llama")
    add_spalm_gate(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = TrimeTrainer(model, arguments, train_dataset=data, eval_dataset=data, loss=SpalmLoss())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5


def test_what_a_run_leaves(finished, recipe, place):
    output, summary = finished
    assert summary["steps"] == 8
    assert len(losses_of(output)) == 8
    assert set(summary["valid"]["valid"]) >= {"perplexity", "perplexity_without_memory"}
    mixture = load_mixture(output / "spalm.json")
    assert isinstance(mixture, SpalmMixture)
    assert mixture.gate.shape[0] == mixture.gate.shape[1] > 1
    assert mixture.gate.any()
    assert mixture.k == 4
    assert sum(map(len, safetensors.numpy.load_file(output / "valid-0.safetensors").values())) <= 120 + 3
    assert "SPALM, Yogatama et al. 2021" in (output / "model" / "README.md").read_text()
    lm = memlm.load(output / "model", device="cpu")
    assert not hasattr(lm.model, "spalm_gate")
    assert not any("spalm" in name for name in lm.model.state_dict())
    started = memlm.load(place / "tiny", device="cpu").model.state_dict()
    assert any(not part.equal(started[name]) for name, part in lm.model.state_dict().items())


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(finished, recipe, place, monkeypatch):
    output = place / "stopped"

    def dies(staging, target):
        real(staging, target)
        raise Stop

    real = running.replace_folder
    with monkeypatch.context() as patch:
        patch.setattr(running, "replace_folder", dies)
        with pytest.raises(Stop):
            train_spalm(recipe, output, device="cpu", show_progress=False)
    assert (output / "checkpoint-3").is_dir()
    assert not (output / "model").exists()
    train_spalm(recipe, output, device="cpu", show_progress=False)
    assert losses_of(output) == losses_of(finished[0])
    assert load_mixture(output / "spalm.json").gate.equal(load_mixture(finished[0] / "spalm.json").gate)


class Stop(BaseException):
    """As if the process died."""


def stops(*arguments, **settings):
    raise Stop


def test_a_run_that_is_through_but_for_its_last_files_keeps_its_gate(finished, recipe, place, monkeypatch):
    expected = load_mixture(finished[0] / "spalm.json")
    output = place / "last"
    with monkeypatch.context() as patch:
        patch.setattr(SpalmMixture, "save", stops)
        with pytest.raises(Stop):
            train_spalm(recipe, output, device="cpu", show_progress=False)
    train_spalm(recipe, output, device="cpu", show_progress=False)
    again = place / "again"
    shutil.copytree(finished[0], again)
    train_spalm(recipe, again, device="cpu", show_progress=False)
    for folder in (output, again):
        found = load_mixture(folder / "spalm.json")
        assert found.gate.equal(expected.gate)
        assert found.size == expected.size


def test_a_run_that_died_before_its_datastore_had_a_version_goes_on(finished, recipe, place, monkeypatch):
    output = place / "early"
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "publish", stops)
        with pytest.raises(Stop):
            train_spalm(recipe, output, device="cpu", show_progress=False)
    (output / "datastore").mkdir()  # a process that dies cannot tidy up
    (output / ".recipe.json.1.tmp").touch()
    train_spalm(recipe, output, device="cpu", show_progress=False)
    assert losses_of(output) == losses_of(finished[0])


def test_a_text_that_is_there_twice_does_not_find_its_copy(place, recipe, tmp_path):
    for number in range(4):
        text = (place / "train" / f"{number}.txt").read_text()
        for name in (f"{number}", f"{number}-copy"):
            (tmp_path / "train").mkdir(exist_ok=True)
            (tmp_path / "train" / f"{name}.txt").write_text(text)
    twice = dataclasses.replace(recipe, train=[str(tmp_path / "train")])
    train_spalm(twice, tmp_path / "run", device="cpu", show_progress=False)
    assert Datastore(tmp_path / "run" / "datastore").manifest.documents == 4
    found = safetensors.numpy.load_file(tmp_path / "run" / "train-neighbors.safetensors")["neighbors"]
    stored = safetensors.numpy.load_file(tmp_path / "run" / "train.safetensors")
    spans = itertools.pairwise(stored["starts"].tolist())
    targets = np.concatenate([stored["ids"][first + 1 : stop] for first, stop in spans])
    assert len(found) == len(targets)
    assert (found[:, 0] == targets).mean() < 0.9


def test_the_recipe_s_carry_is_that_of_the_loss(place, recipe, monkeypatch):
    seen = []
    real = SpalmLoss.__init__
    monkeypatch.setattr(SpalmLoss, "__init__", lambda self, carry=0: seen.append(carry) or real(self, carry))
    short = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, steps=1))
    train_spalm(short, place / "carries", device="cpu", show_progress=False)
    assert seen == [10]


def test_what_cannot_be_carried_is_refused_before_anything_is_written(place, recipe, tmp_path):
    for family, carry, error, said in (
        ("gpt2", 125, ConfigError, "need 141 positions, and gpt2 has learned 128"),
        ("mistral", 10, UnsupportedArchitecture, "keeps states that cannot be carried"),
    ):
        folder = tiny_folder(family, tmp_path / family)
        trial = dataclasses.replace(recipe, from_=str(folder), batches=SpalmBatches(length=16, carry=carry))
        with pytest.raises(error, match=said):
            train_spalm(trial, tmp_path / "run", device="cpu", show_progress=False)
        assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError):
        train_spalm(dataclasses.replace(recipe, valid=[str(tmp_path / "empty")]), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_what_a_loss_is_divided_by():
    model, _ = opened()
    batch = batch_of(2)
    with torch.no_grad():
        own, given = (SpalmLoss()(model, batch, update=0, updates=1, targets=targets) for targets in (None, 36))
    assert float(given) == pytest.approx(float(own) * 9 / 36, rel=1e-5)


def test_padding_behind_the_text_takes_no_position():
    model, _ = opened("gpt2")
    limit = model.config.n_positions
    ids = torch.randint(1, 40, (1, limit - 2), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 5:] = -100
    neighbors = torch.full((1, limit - 2, 2), -1)
    batch = {"input_ids": ids, "labels": labels, "neighbors": neighbors}
    behind = batch | {"context": ids[:, :40], "context_tokens": torch.tensor([40])}
    found = SpalmLoss(carry=40).log_probs(model, behind).with_memory
    assert found.shape == (4,)
    whole = torch.cat([ids[:, :40], ids[:, :5]], dim=1)
    with torch.no_grad():
        expected = model(whole).logits.log_softmax(dim=-1)[0, 40:44].gather(1, whole[0, 41:, None])[:, 0]
    assert found.allclose(expected, atol=1e-4)


def test_a_loss_serves_one_model_after_the_other():
    loss, whole = SpalmLoss(carry=3), {name: part[:1] for name, part in batch_of(2).items()}
    batch = whole | {"context": torch.tensor([[1, 2, 3]]), "context_tokens": torch.tensor([3])}
    for seed in (0, 1):
        model = tiny_model("llama", seed)
        add_spalm_gate(model)
        assert loss.log_probs(model, batch).with_memory.equal(SpalmLoss(carry=3).log_probs(model, batch).with_memory)


def test_the_gate_alone(recipe, place):
    frozen = dataclasses.replace(recipe, memory=SpalmSettings(trained="gate"))
    summary = train_spalm(frozen, place / "frozen", device="cpu", show_progress=False)
    started = memlm.load(place / "tiny", device="cpu").model.state_dict()
    ended = memlm.load(place / "frozen" / "model", device="cpu").model.state_dict()
    assert all(part.equal(started[name]) for name, part in ended.items())
    assert load_mixture(summary["mixture"]).gate.abs().max() > 0


def test_what_may_find_itself_learns_to_copy(place, recipe):
    """The trap of the method: the loss of the training text falls, that of other text does not."""
    losses = {}
    for own in (False, True):
        schedule = dataclasses.replace(recipe.schedule, steps=60, learning_rate=0.05, evaluate_every=100, accumulate=1)
        memory = SpalmSettings(trained="gate", own_document=own, gates="scalar")
        trial = dataclasses.replace(recipe, memory=memory, schedule=schedule, batches=SpalmBatches(length=16))
        summary = train_spalm(trial, place / f"own-{own}", device="cpu", show_progress=False)
        losses[own] = np.mean(losses_of(place / f"own-{own}")[-10:]), summary["valid"]["valid"]["nats_per_token"]
    assert losses[True][0] < losses[False][0] - 0.5
    assert losses[True][1] > losses[True][0] + 0.5
    assert losses[True][1] > losses[False][1] - 0.05


def test_the_whole_way_by_the_command_line(place, tmp_path):
    output = tmp_path / "run"
    trained = run("train", "spalm", place / "recipe.toml", output, "--device", "cpu", "--json")
    assert trained.code == 0, trained.err
    summary = json.loads(trained.out)
    built = run("build", output / "model", place / "train", "--output", tmp_path / "memory")
    assert built.code == 0, built.err
    scored = run(
        "eval", output / "model", tmp_path / "memory", place / "test", "--mixture", summary["mixture"], "--json"
    )
    assert scored.code == 0, scored.err
    assert [row["method"] for row in json.loads(scored.out)["results"]] == ["lm", "spalm"]
    gate = "--mixture", summary["mixture"], "--json"
    told = run("explain", output / "model", tmp_path / "memory", "abc abc", *gate)
    assert told.code == 0, told.err
    wrote = run("generate", output / "model", tmp_path / "memory", "abc", *gate, "--max-new-tokens", "5")
    assert wrote.code == 0, wrote.err
    lm = memlm.load(output / "model", device="cpu")
    result = evaluate(
        lm, [str(place / "test")], Datastore(tmp_path / "memory"), load_mixture(summary["mixture"]), show_progress=False
    )
    assert result.results[1].perplexity == pytest.approx(json.loads(scored.out)["results"][1]["perplexity"], rel=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('gates = "vector"', 'gates = "many"', "memory has gates = 'many'; expected scalar or vector"),
        ('gates = "vector"', 'trained = "none"', "memory has trained = 'none'; expected all or gate"),
        ('gates = "vector"', "k = 0", "memory has k = 0; expected at least 1"),
        ("length = 16", "length = 1", "batches has length = 1; expected at least 2"),
        ("length = 16", "length = 1600", "is longer than the"),
        ("carry = 10", "carry = -1", "batches has carry = -1; expected at least 0"),
        ("steps = 8", "steps = 8\ngradient_checkpointing = true", "gradient checkpointing keeps no keys and values"),
        ('from = "tiny"', "", "has no from; add it"),
        ('valid = ["valid"]', "valid = []", "valid = []; expected at least one path"),
        ('train = ["train"]', 'train = ["nothing"]', "nothing does not exist"),
    ],
)
def test_recipes_that_cannot_work(place, tmp_path, old, new, said):
    path = place / "wrong.toml"
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new))
    assert said in refused("train", "spalm", path, tmp_path / "run", "--device", "cpu", place=tmp_path)


def test_another_recipe_needs_another_folder(finished, recipe):
    with pytest.raises(ConfigError, match="expected the same or a new folder"):
        train_spalm(dataclasses.replace(recipe, memory=SpalmSettings(k=2)), finished[0], device="cpu")


def test_a_recipe_in_python():
    made = SpalmRecipe(train=["a"], valid=["b"], from_="reference", schedule=TrimeSchedule(steps=1))
    assert made.describe()["method"] == "spalm"
    assert made.memory.k == 4

"""Training with neighbors' next tokens: runs from recipes; the loss is in test_spalm_loss.py."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from transformers import TrainingArguments

import memlm
from command_line import refused, run
from memlm import Datastore, Document, evaluate
from memlm.datastore._manifest import Manifest
from memlm.errors import ConfigError, CorpusError, UnsupportedArchitecture
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

"""Training with memory from a recipe: runs that are killed and go on, what they write, and models that work."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils
from transformers.utils import logging

import memlm
from command_line import refused, run
from memlm.cache import Cache
from memlm.errors import ConfigError
from memlm.mixtures import load_mixture
from memlm.training import (
    Batches,
    MemorySettings,
    TrimeLoss,
    TrimeRecipe,
    TrimeSchedule,
    _run_trainer,
    load_trime_recipe,
    train_trime,
)
from memlm.training._trime_data import Clock, _segments, train_segments, valid_segments
from tiny_models import tiny_model, tiny_tokenizer

WORDS = ["the", "cat", "house", "rain", "was", "on", "roof", "and", "bird", "in", "a", "morning", "letter", "box"]

# A tiny GPT-2 that has dropout goes on, with everything that a resumed run has to restore.
EXTERNAL = """
train = ["train"]
valid = ["valid"]
from = "gpt2"
license = "made up"

[memory]
kinds = ["local", "external"]
drop_own = 0.5
warmup = 0.2

[batches]
order = "bm25"
length = 24
rows = 3

[schedule]
steps = 10
learning_rate = 0.003
warmup_steps = 2
accumulate = 2
gradient_checkpointing = true
evaluate_every = 3
checkpoint_every = 4
valid_tokens = 200
"""

LONG_TERM = """
train = ["train"]
valid = ["valid"]

[model]
vocab_size = 300
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 64

[memory]
kinds = ["local", "long-term"]

[batches]
length = 16
streams = 2
consecutive = 4

[schedule]
steps = 60
learning_rate = 0.01
warmup_steps = 2
autocast = false
evaluate_every = 100
"""


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Texts in which a passage comes back, a tiny GPT-2 with dropout, and the recipes."""
    folder = tmp_path_factory.mktemp("trime")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("valid", 2), ("test", 2)):
        (folder / split).mkdir()
        for number in range(count):
            passage = "".join(generator.choice(list("abcdefghijklmnop ."), 50))
            (folder / split / f"{number}.txt").write_text(" ".join([passage] * 3))
    model = tiny_model("gpt2")
    model.config.update({"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1})
    model.save_pretrained(folder / "gpt2")
    tiny_tokenizer().save_pretrained(folder / "gpt2")
    (folder / "external.toml").write_text(EXTERNAL)
    (folder / "long.toml").write_text(LONG_TERM)
    return folder


@pytest.fixture(scope="module")
def recipe(place):
    return load_trime_recipe(place / "external.toml")


@pytest.fixture(scope="module")
def finished(place, recipe):
    return place / "whole", train_trime(recipe, place / "whole", device="cpu", show_progress=False)


def rows_of(output):
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


def losses_of(output):
    return [(row["step"], row["loss"], row.get("valid")) for row in rows_of(output)]


def changed(recipe, part, **values):
    return dataclasses.replace(recipe, **{part: dataclasses.replace(getattr(recipe, part), **values)})


def test_what_a_run_leaves(finished, recipe):
    output, summary = finished
    rows = rows_of(output)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if "valid" in row] == [3, 6, 9, 10]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-10"]
    assert rows[0]["rate"] == pytest.approx(0.0015)
    assert rows[1]["rate"] == pytest.approx(0.003)
    assert rows[-1]["rate"] == pytest.approx(0.003 / 6)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert summary["valid"] == rows[-1]["valid"]
    assert (summary["steps"], summary["tokens"]) == (10, rows[-1]["tokens"])
    card = (output / "model" / "README.md").read_text()
    assert "with local, external memory (TRIME, Zhong et al. 2022)" in card
    assert "bm25, 1 × 3 segments of 24 tokens" in card
    assert "made up" in card
    assert str(output.parent) not in card
    assert json.loads((output / "recipe.json").read_text()) == recipe.describe()


def test_what_is_said_of_validation_text(finished, recipe, place):
    """On the published model, by the loss itself; the first batch of the rest of a text counts like any other."""
    output, summary = finished
    lm = memlm.load(output / "model", device="cpu")
    segments = valid_segments(recipe, lm, output, False)["valid"]
    assert int(segments.targets.sum()) == sum(len(ids) - 1 for ids in segments.documents)
    assert sum(len(ids) for ids in segments.documents) == 200
    loss, found = TrimeLoss(memories=recipe.memory.memories()), []
    for first in range(0, len(segments), 3):
        rows = [segments[first + number] for number in range(3)]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(loss.log_probs(lm.model, batch))
    for name, suffix in (("with_memory", ""), ("without_memory", "_without_memory")):
        expected = -torch.cat([getattr(part, name) for part in found]).mean().item()
        row = summary["valid"]["valid"]
        assert row[f"nats_per_token{suffix}"] == pytest.approx(expected, rel=1e-3)
        assert row[f"perplexity{suffix}"] == pytest.approx(math.exp(row[f"nats_per_token{suffix}"]))


def test_tokens_are_counted(recipe, finished):
    output, summary = finished
    lm = memlm.load(output / "model", device="cpu")
    segments = train_segments(recipe, lm, output, False)
    clock = Clock(segments, 2)
    counts = segments.targets.reshape(-1, 3).sum(axis=1)
    assert clock.updates == math.ceil(len(counts) / 2)
    for updates in range(2 * clock.updates + 2):
        seen = [counts[number % len(counts)] for number in range(2 * updates)]
        if len(counts) % 2 == 0:
            assert clock.tokens(updates) == sum(seen)
    assert clock.tokens(clock.updates) == summary["tokens_per_epoch"] == counts.sum()
    assert clock.tokens(clock.updates + 1) == counts.sum() + counts[:2].sum()


KILLED = """
import os, signal, sys
from memlm.training import _trime_run as code
from memlm.cli import main
step, save = code.RunTrainer.training_step, code.replace_folder
def dies_in_a_step(self, *arguments, **settings):
    if self.state.global_step == 6 and self.losses:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments, **settings)
def dies_before_a_checkpoint_is_whole(staging, target):
    if target.name == "checkpoint-8":
        os.kill(os.getpid(), signal.SIGKILL)
    save(staging, target)
if sys.argv[1] == "step":
    code.RunTrainer.training_step = dies_in_a_step
else:
    code.replace_folder = dies_before_a_checkpoint_is_whole
main(["train", "trime", *sys.argv[2:]])
"""


def test_a_run_that_was_killed_twice_has_the_losses_of_one_that_was_not(finished, place):
    """Between two batches of an update, and while a checkpoint is written; then it ends the same, to the last bit."""
    whole, summary = finished
    output = place / "killed"
    for where, steps in (("step", 4), ("checkpoint", 8)):
        command = [sys.executable, "-c", KILLED, where, str(place / "external.toml"), str(output), "--device", "cpu"]
        died = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert not (output / "model").exists()
        assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
        assert len(rows_of(output)) >= steps
        with (output / "losses.jsonl").open("a") as log:
            log.write('{"step": 99, "lo')
    result = run("train", "trime", place / "external.toml", output, "--device", "cpu", "--json")
    assert result.code == 0, result.err
    assert losses_of(output) == losses_of(whole)
    assert json.loads(result.out)["valid"] == summary["valid"]
    mine, other = (load_file(folder / "model" / "model.safetensors") for folder in (output, whole))
    assert mine.keys() == other.keys()
    assert all(mine[name].equal(other[name]) for name in mine)
    assert not list((output / "trainer").glob("checkpoint-*"))


def test_how_often_one_looks_does_not_change_a_run(finished, recipe, place):
    """With dropout, whose random numbers come from where a data loader takes its own."""
    rarely = changed(recipe, "schedule", evaluate_every=100, checkpoint_every=100)
    train_trime(rarely, place / "rarely", device="cpu", show_progress=False)
    assert [row["loss"] for row in rows_of(place / "rarely")] == [row["loss"] for row in rows_of(finished[0])]


def test_another_recipe_needs_another_folder(finished, recipe, place):
    output, _ = finished
    others = {
        "train": dataclasses.replace(recipe, train=recipe.valid),
        "from": dataclasses.replace(recipe, from_="reference"),
        "memory": changed(recipe, "memory", warmup=0.3),
        "batches": changed(recipe, "batches", rows=2),
        r"schedule\.learning_rate": changed(recipe, "schedule", learning_rate=0.1),
    }
    for key, other in others.items():
        with pytest.raises(ConfigError, match=f"holds a run with {key} = .*; expected the same or a new folder"):
            train_trime(other, output, device="cpu", show_progress=False)
    assert json.loads((output / "recipe.json").read_text()) == recipe.describe(), "it is still the old run"
    with pytest.raises(ConfigError, match=r"holds .*, which no run made; name a new folder"):
        train_trime(recipe, place, device="cpu", show_progress=False)


def test_a_recipe_that_failed_before_the_first_step_may_be_mended(place, recipe, monkeypatch):
    """What was prepared for the first one is not taken for the second."""
    output = place / "mended"
    with monkeypatch.context() as patch:
        patch.setattr(TrimeLoss, "__call__", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_trime(recipe, output, device="cpu", show_progress=False)
    assert (output / "chain.npy").exists()
    other = dataclasses.replace(recipe, train=recipe.valid)
    other = changed(changed(other, "batches", rows=2, length=20), "schedule", steps=2)
    train_trime(other, output, device="cpu", show_progress=False)
    train_trime(other, place / "right", device="cpu", show_progress=False)
    assert losses_of(output) == losses_of(place / "right")


def test_a_finished_run_is_published_again_made_longer_and_not_shorter(finished, recipe, place, monkeypatch):
    output = place / "copy"
    shutil.copytree(finished[0], output)
    shutil.rmtree(output / "model")
    with monkeypatch.context() as patch:
        patch.setattr(_run_trainer, "validate", pytest.fail)  # what is known is not measured again
        again = train_trime(recipe, output, device="cpu", show_progress=False)
    assert again["valid"] == finished[1]["valid"]
    longer = train_trime(changed(recipe, "schedule", steps=13), output, device="cpu", show_progress=False)
    assert longer["steps"] == 13
    rows = rows_of(output)
    assert [row["step"] for row in rows] == list(range(1, 14))
    assert rows[:10] == rows_of(finished[0])
    assert rows[10]["rate"] == pytest.approx(0.003 * 3 / 7.8), "of the longer schedule"
    state = torch.load(output / "checkpoint-13" / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["lr"] == 0
    shorter = train_trime(changed(recipe, "schedule", steps=5), output, device="cpu", show_progress=False)
    assert (shorter["steps"], shorter["valid"]) == (13, longer["valid"])


def test_the_rate_of_the_first_step_of_a_longer_run_is_that_of_the_longer_schedule(finished, recipe, place):
    """The checkpoint has the rate at the end of the shorter one: zero, with which nothing would be learned."""
    output = place / "one-more"
    shutil.copytree(finished[0], output)
    before = load_file(output / "model" / "model.safetensors")
    train_trime(changed(recipe, "schedule", steps=11), output, device="cpu", show_progress=False)
    after = load_file(output / "model" / "model.safetensors")
    moved = max((after[name] - before[name]).abs().max().item() for name in before)
    assert moved == pytest.approx(0.003 / 6.6, rel=0.3)


def test_accumulation_checkpointed_activations_and_autocast(place):
    """Local memory does not look beyond a row, so two batches of two rows are an update of four."""
    long = changed(load_trime_recipe(place / "long.toml"), "schedule", steps=4, warmup_steps=1)
    plain = changed(changed(long, "memory", kinds=["local"], warmup=0.0), "batches", streams=1, consecutive=4)
    halves = changed(changed(plain, "batches", consecutive=2), "schedule", accumulate=2)
    results = {}
    for name, other in {
        "plain": plain,
        "halves": halves,
        "checkpointed": changed(plain, "schedule", gradient_checkpointing=True),
        "autocast": changed(plain, "schedule", autocast=True),
    }.items():
        train_trime(other, place / name, device="cpu", show_progress=False)
        results[name] = [row["loss"] for row in rows_of(place / name)]
    assert results["checkpointed"] == pytest.approx(results["plain"], rel=1e-6)
    assert results["halves"] == pytest.approx(results["plain"], rel=1e-4)
    assert results["autocast"] == pytest.approx(results["plain"], rel=0.01)
    assert results["autocast"] != results["plain"]
    assert max(results["plain"]) - min(results["plain"]) > 0.1


class Reported(TrainerCallback):
    logs: ClassVar = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append((state.global_step, dict(logs)))


def test_metrics_are_reported(place, recipe, monkeypatch):
    with pytest.raises(ConfigError, match=r"report_to names 'tensorbord'; expected any of .*tensorboard"):
        train_trime(changed(recipe, "schedule", report_to=["tensorbord"]), place / "no", device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(_run_trainer, "get_available_reporting_integrations", list)
        with pytest.raises(ConfigError, match="report_to names tensorboard, which is not installed"):
            train_trime(changed(recipe, "schedule", report_to=["tensorboard"]), place / "no", device="cpu")
    assert not (place / "no").exists()
    monkeypatch.setattr(_run_trainer, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Reported)
    Reported.logs.clear()
    reporting = changed(recipe, "schedule", report_to=["tensorboard"], steps=3)
    train_trime(reporting, place / "reported", device="cpu", show_progress=False)
    rows = rows_of(place / "reported")
    step, logs = Reported.logs[0]
    assert step == 3
    assert logs["loss"] == pytest.approx(sum(row["loss"] for row in rows) / 3)
    assert logs["learning_rate"] == rows[-1]["rate"]
    step, logs = Reported.logs[1]
    assert step == 3
    assert logs["eval_valid_perplexity"] == rows[-1]["valid"]["valid"]["perplexity"]
    assert logs["eval_valid_perplexity_without_memory"] > 1


def test_a_loss_that_is_not_finite_ends_the_run(place, recipe):
    wild = changed(recipe, "schedule", learning_rate=1e30, clip=1e30)
    with pytest.raises(ConfigError, match=r"the loss of step \d is not finite; lower learning_rate or clip"):
        train_trime(wild, place / "wild", device="cpu", show_progress=False)
    assert all(math.isfinite(row["loss"]) for row in rows_of(place / "wild"))
    assert not (place / "wild" / "model").exists()


def test_from_scratch_to_every_command(place, tmp_path):
    """What `memlm train trime` makes is a model like any other, and its memory is worth having."""
    trained = run("train", "trime", place / "long.toml", tmp_path / "run", "--device", "cpu")
    assert trained.code == 0, trained.err
    assert "training: " in trained.err
    model = tmp_path / "run" / "model"
    assert trained.out.startswith(f"{model}: ")
    assert "  valid: perplexity " in trained.out
    again = json.loads(run("train", "trime", place / "long.toml", tmp_path / "run", "--json").out)
    valid = again["valid"]["valid"]
    assert valid["perplexity"] < 0.9 * valid["perplexity_without_memory"]

    memory, saved = tmp_path / "memory", tmp_path / "trime.json"
    built = run("build", model, place / "train", "--output", memory, "--metric", "inner-product")
    assert built.code == 0, built.err
    for datastore in ("none", memory):
        options = ["--mixture", "trime", "--cache", 60, "--save", saved]
        tuned = run("tune", model, datastore, place / "valid", *options)
        assert tuned.code == 0, tuned.err
        assert tuned.out.startswith("memory helps: perplexity ")
        evaluated = run("eval", model, datastore, place / "test", "--mixture", saved, "--json")
        alone, mixed = (row["perplexity"] for row in json.loads(evaluated.out)["results"][:2])
        assert mixed < 0.9 * alone
    wrote = run("generate", model, memory, "abc", "--mixture", saved, "--max-new-tokens", 3)
    assert wrote.code == 0, wrote.err

    hugging, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    inputs = tokenizer("abc", return_tensors="pt")
    with memlm.attach(hugging, [memlm.Datastore(memory), Cache(60)], load_mixture(saved)):
        ids = hugging.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(ids[0, 1:]).startswith("abc")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[memory]", "[memories]", "has an unknown key 'memories'; did you mean 'memory'?"),
        (
            '"external"',
            '"extern"',
            "memory has kinds = ['local', 'extern']; expected any of local, long-term, external",
        ),
        ('"external"', '"local"', "each once"),
        ('"external"', '"long-term"', "long-term memory sees earlier segments"),
        ('order = "bm25"', 'order = "random"', "batches has order = 'random'; expected 'consecutive' or 'bm25'"),
        ("rows = 3", "rows = 1", "external memory sees other segments"),
        ("rows = 3", "streams = 3", "batches has streams, which is for order = 'consecutive'; leave it out"),
        ("rows = 3", "rows = 0", "batches has rows = 0; expected at least 1"),
        ("length = 24", "length = 1", "batches has length = 1; expected at least 2"),
        ("length = 24", "length = 500", "length = 500 is longer than the 128 positions of gpt2"),
        ("steps = 10", "", "schedule needs either steps or epochs; give one of them"),
        ("steps = 10", "steps = 10\nepochs = 1", "schedule needs either steps or epochs; give one of them"),
        ("steps = 10", 'steps = "ten"', "schedule has steps = 'ten'; expected int"),
        ("warmup = 0.2", "warmup = 2", "memory has warmup = 2; expected a share between 0 and 1"),
        ("warmup = 0.2", "temperature = 0", "memory has temperature = 0; expected a number above 0"),
        ('from = "gpt2"', "", "the recipe needs either `from`"),
        ('from = "gpt2"', 'from = "no/such/model"', "there is no folder"),
        ('valid = ["valid"]', "valid = []", "valid = []; expected at least one path"),
        ('valid = ["valid"]', 'valid = ["nowhere"]', "nowhere does not exist; expected a file or a folder of text"),
    ],
)
def test_recipes_that_cannot_work(place, tmp_path, old, new, said):
    assert EXTERNAL.count(old) >= 1
    path = place / "wrong.toml"
    path.write_text(EXTERNAL.replace(old, new))
    assert said in refused("train", "trime", path, tmp_path / "run", "--device", "cpu")
    assert not (tmp_path / "run").exists()


def test_where_to_train(place, tmp_path, monkeypatch):
    path = place / "external.toml"
    command = ["train", "trime", path, tmp_path / "a", "--device"]
    assert "device is 'tpu'; expected cpu, or cuda" in refused(*command, "tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device is 'cuda'; expected cpu" in refused(*command, "cuda")
    assert not (tmp_path / "a").exists()


def test_without_the_own_document_batches_go_across_documents():
    def chain_of(own_document):
        memory = MemorySettings(kinds=["external"], own_document=own_document)
        batches = Batches(order="bm25", length=4, rows=2)
        schedule = TrimeSchedule(steps=1)
        recipe = TrimeRecipe(train=["a"], valid=["b"], from_="c", memory=memory, batches=batches, schedule=schedule)
        (external,) = recipe.memory.memories()
        assert external.own_document == own_document
        lm = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=0))
        # either document repeats itself, and resembles the other a little
        documents = [np.array([first, first + 1, 9] * 4) for first in (1, 5)]
        segments = _segments(recipe, lm, documents)
        return segments.cuts[segments.chain, 0]

    assert (np.diff(chain_of(False)) != 0).all()
    assert (np.diff(chain_of(True)) == 0).sum() >= 4

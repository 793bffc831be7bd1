"""Training the reference model: recipes that are checked, runs that can be stopped, a folder that loads."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging

import memlm
from memlm.errors import ConfigError
from memlm.training import _language_model as training
from memlm.training import load_recipe, train_language_model

WORDS = ["the", "cat", "house", "rain", "was", "on", "roof", "and", "bird", "in", "a", "morning", "letter", "box"]

RECIPE = """
train = ["train"]
valid = ["valid.txt"]
license = "made up"

[model]
vocab_size = 300
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 64

[schedule]
steps = 12
batch = 4
micro_batch = 2
block = 16
warmup_steps = 2
evaluate_every = 5
checkpoint_every = 4
autocast = false
"""


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    generator = np.random.default_rng(0)
    (folder / "train").mkdir()
    for number in range(8):
        (folder / "train" / f"{number}.txt").write_text(" ".join(generator.choice(WORDS, 100)))
    (folder / "valid.txt").write_text(" ".join(generator.choice(WORDS, 120)))
    (folder / "recipe.toml").write_text(RECIPE)
    return load_recipe(folder / "recipe.toml")


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "whole"
    return output, train_language_model(recipe, output, show_progress=False)


def losses(output):
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


def weights(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)["model"]


def test_a_run(finished, recipe):
    output, summary = finished
    rows = losses(output)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["tokens"] for row in rows] == [64 * step for step in range(1, 13)]
    assert [row["step"] for row in rows if "valid" in row] == [5, 10, 12]
    assert rows[0]["loss"] == pytest.approx(math.log(300), abs=0.5)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5, "it learns"
    assert [row["rate"] for row in rows[:3]] == [0.5, 1.0, 1.0]
    assert rows[-1]["rate"] == pytest.approx(1 / 7.2)
    assert (summary["steps"], summary["tokens"]) == (12, 768)
    valid = summary["valid"]["valid"]
    assert valid["nats_per_token"] == rows[-1]["valid"]["valid"]
    text = Path(recipe.valid[0]).read_text()
    tokens = len(memlm.load(output / "model", device="cpu").tokenizer(text)["input_ids"])  # the start is one
    assert valid["bits_per_byte"] == pytest.approx(valid["nats_per_token"] * tokens / len(text) / math.log(2))


def test_the_published_model_loads_and_writes(finished):
    output, _ = finished
    lm = memlm.load(output / "model", dtype="auto", device="cpu")
    assert lm.model.dtype == torch.bfloat16
    assert lm.tokenizer.bos_token_id == lm.tokenizer.eos_token_id is not None
    for name, tensor in weights(output).items():
        assert torch.equal(lm.model.state_dict()[name], tensor.bfloat16()), name
    ids = lm.tokenizer("the cat", return_tensors="pt")
    written = lm.model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert written.shape[1] == ids["input_ids"].shape[1] + 5
    assert ids["input_ids"][0, 0] == lm.tokenizer.bos_token_id, "text begins where a document begins"
    assert lm.tokenizer.decode(lm.tokenizer("a 1890 ünder\n")["input_ids"][1:]) == "a 1890 ünder\n"
    assert lm.tokenizer.tokenize("1890") == ["1", "8", "9", "0"]
    card = (output / "model" / "README.md").read_text()
    assert "made up" in card
    assert "12 steps of 64 tokens" in card
    assert (output / "model" / "losses.png").stat().st_size > 1000


@pytest.mark.parametrize("stop_at", [3, 4, 11])
def test_an_interrupted_run_ends_like_the_whole_one(stop_at, finished, recipe, tmp_path, monkeypatch):
    """Stopped before the first checkpoint, right at one, and between the last two."""
    output = tmp_path / "run"
    step, taken = training._step, []

    def interrupted(*arguments):
        if len(taken) == stop_at:
            raise KeyboardInterrupt
        taken.append(step(*arguments))
        return taken[-1]

    monkeypatch.setattr(training, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_language_model(recipe, output, show_progress=False)
    assert len(losses(output)) == stop_at
    with (output / "losses.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')  # as a kill in the middle of writing leaves it
    assert not (output / "model").exists()
    monkeypatch.undo()
    summary = train_language_model(recipe, output, show_progress=False)
    whole, whole_summary = finished
    assert [row["step"] for row in losses(output)] == list(range(1, 13)), "no step is listed twice"
    for mine, other in zip(losses(output), losses(whole), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert mine.get("valid") == pytest.approx(other.get("valid"), abs=1e-6)
    assert summary["valid"]["valid"] == pytest.approx(whole_summary["valid"]["valid"], abs=1e-6)
    for name, tensor in weights(whole).items():
        assert torch.allclose(weights(output)[name], tensor, atol=1e-6)


def test_a_finished_run_can_be_published_again_and_made_longer(finished, recipe, tmp_path):
    whole, summary = finished
    output = tmp_path / "copy"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "model")
    again = train_language_model(recipe, output, show_progress=False)
    assert again["valid"]["valid"] == pytest.approx(summary["valid"]["valid"])
    assert (output / "model" / "config.json").exists()
    longer = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, steps=14))
    assert train_language_model(longer, output, show_progress=False)["steps"] == 14
    assert [row["step"] for row in losses(output)] == list(range(1, 15))
    shorter = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, steps=5))
    assert train_language_model(shorter, output, show_progress=False)["steps"] == 14, "trained is trained"
    assert "14 steps of" in (output / "model" / "README.md").read_text()


def test_another_model_or_other_data_needs_a_new_folder(finished, recipe):
    output, _ = finished
    other_shape = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=2))
    for other in (other_shape, dataclasses.replace(recipe, train=recipe.valid)):
        with pytest.raises(ConfigError, match="expected the same or a new folder"):
            train_language_model(other, output, show_progress=False)
    described = {"method": "lm"} | dataclasses.asdict(recipe)
    assert json.loads((output / "recipe.json").read_text()) == described, "it is still the old run"


def test_too_little_text(recipe, tmp_path):
    (tmp_path / "short.txt").write_text("the cat")
    for split, name in (("train", "train"), ("valid", "short")):
        short = dataclasses.replace(recipe, **{split: [str(tmp_path / "short.txt")]})
        with pytest.raises(ConfigError, match=f"the text of {name} has . tokens; expected more than a block"):
            train_language_model(short, tmp_path / split, show_progress=False)


def test_little_validation_text_is_used_whole(recipe, tmp_path):
    (tmp_path / "short.txt").write_text("the cat was on the roof and the bird was in the house in the morning")
    schedule = dataclasses.replace(recipe.schedule, steps=1)
    short = dataclasses.replace(recipe, valid=[str(tmp_path / "short.txt")], schedule=schedule)
    summary = train_language_model(short, tmp_path / "run", show_progress=False)
    assert math.isfinite(summary["valid"]["short"]["nats_per_token"])


def test_every_block_once_an_epoch():
    schedule = training.Schedule(batch=3, micro_batch=3, block=4)
    tokens = np.arange(4 * 9 + 1)
    seen = [int(row[0]) for step in range(6) for row in training._batch(tokens, step, schedule)]
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(0, 36, 4))
    assert seen[:9] != seen[9:], "in another order"
    assert training._batch(tokens, 5, schedule).tolist() == training._batch(tokens, 5, schedule).tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("hidden_size", "hidden_sise"), "model has an unknown key 'hidden_sise'; did you mean 'hidden_size'"),
        (("warmup_steps", "warm_up_steps"), "schedule has an unknown key 'warm_up_steps'; did you mean 'warmup_steps'"),
        (("license", "licence"), "unknown key 'licence'; did you mean 'license'"),
        (("[schedule]", "[training]"), "unknown key 'training'"),
        (('valid = ["valid.txt"]', ""), "valid"),
        (("micro_batch = 2", "micro_batch = 3"), "micro_batch that divides batch"),
        (("micro_batch = 2", "micro_batch = 0"), "micro_batch that divides batch"),
        (("steps = 12", "steps = 0"), "steps = 0.*at least 1"),
        (("steps = 12", 'steps = "12"'), "steps = '12'; expected int"),
        (("hidden_size = 32", "hidden_size = 3.2"), "hidden_size = 3.2; expected int"),
        (("batch = 4", "batch = true"), "batch = True; expected int"),
        (("block = 16", "block = 65"), "longer than max_position_embeddings"),
        (("[model]", "[model"), "not valid TOML"),
        (('train = ["train"]', 'train = "train"'), r"train = 'train'; expected list\[str\]"),
        (("[model]", "model = 3\n[other]"), "model is 3; expected a table"),
    ],
)
def test_bad_recipe(change, said, tmp_path):
    assert change[0] in RECIPE
    (tmp_path / "recipe.toml").write_text(RECIPE.replace(*change))
    with pytest.raises(ConfigError, match=said):
        load_recipe(tmp_path / "recipe.toml")


def test_recipe_paths_are_relative_to_the_file(recipe, tmp_path):
    assert recipe.train[0].endswith("/train")
    assert (recipe.schedule.steps, recipe.schedule.seed) == (12, 0)
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")

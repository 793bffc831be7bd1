"""The examples of docs/training.md, as they are written there."""

import re
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments, default_data_collator

import memlm
from memlm.training import load_spalm_recipe, load_trime_recipe

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
SETTINGS = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", PAGE, re.M)


def example(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_recipe_is_one_and_the_defaults_are_those_of_the_page(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(example("toml")[0])
    recipe = load_trime_recipe(path)
    assert recipe.batches.layout == (4, 4)
    assert recipe.memory.kinds == ["local", "long-term"]
    bare = re.sub(r"^(kinds|length|streams|consecutive|learning_rate) = .*$", "", path.read_text(), flags=re.M)
    path.write_text(bare.replace('from = "gpt2"', "[model]"))
    tables = load_trime_recipe(path).describe()
    defaults = {
        key: value for name in ("memory", "batches", "schedule", "model") for key, value in tables[name].items()
    }
    defaults |= {"streams": 1, "consecutive": 4, "rows": 4}
    said = 0
    for names, values in SETTINGS:
        values = values.replace(",000", "000").replace("`", "").replace('"', "").split(", ")
        for name, value in zip(re.findall("`(\\w+)`", names), values, strict=False):
            if value not in ("", "default") and name not in ("local", "external"):
                known = defaults.pop(name)
                said += 1
                assert str(known).lower() == value or float(known) == float(value), name
    assert said > 25
    assert sorted(defaults) == ["epochs", "steps"], "every setting is on the page"


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_loops_run_as_they_are_written(tmp_path, monkeypatch, tiny_lm):
    monkeypatch.chdir(tmp_path)
    Path("texts/train").mkdir(parents=True)
    Path("texts/train/one.txt").write_text("The cat was on the roof of the house. " * 40)
    lm = tiny_lm("llama")
    before = lm.model.get_input_embeddings().weight.clone()
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=1e-3)
    names = {"lm": lm, "memlm": memlm, "torch": torch, "optimizer": optimizer, "TrainingArguments": TrainingArguments}
    loop, trainer, carried = example("python")
    exec(compile(loop, "a loop of your own", "exec"), names)
    after = lm.model.get_input_embeddings().weight.clone()
    assert not after.equal(before)
    exec(compile(trainer, "the Trainer", "exec"), names)
    assert not lm.model.get_input_embeddings().weight.equal(after)
    lm.model.eval()
    names["documents"] = [torch.arange(1, 40).numpy()]
    exec(compile(carried, "carried keys and values", "exec"), names)
    assert names["logits"].isfinite().all()


def test_the_recipe_of_the_spalm_page_is_one(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "spalm.md").read_text()
    path = tmp_path / "recipe.toml"
    path.write_text(re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0])
    recipe = load_spalm_recipe(path)
    assert (recipe.memory.k, recipe.memory.gates, recipe.memory.trained) == (4, "scalar", "all")
    assert (recipe.batches.length, recipe.batches.streams, recipe.batches.carry) == (256, 8, 256)


def test_the_loop_of_the_spalm_page_runs_as_it_is_written(tmp_path, tiny_lm):
    page = (Path(__file__).parent.parent / "docs" / "spalm.md").read_text()
    lm, documents = tiny_lm(), [memlm.Document(id=str(n), text=f"The cat {n} was on the roof. " * 9) for n in range(3)]
    memory = memlm.Datastore.build(lm, documents, tmp_path / "memory", show_progress=False)
    names = {"lm": lm, "documents": documents, "memory": memory}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    batch = default_data_collator([names["segments"][0]])
    assert names["loss_of"](lm.model, batch, update=0, updates=1).isfinite()
    assert names["mixture"].k == 4

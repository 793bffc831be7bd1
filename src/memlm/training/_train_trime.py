"""Train a causal LM with memory from a recipe; every step can be interrupted and resumed.

A checkpoint is written beside the others and renamed when it is whole, so that what has a checkpoint's name is one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from ..errors import ConfigError
from ..files import write_json
from ..models import LanguageModel, load
from ._card import write_trime_card
from ._run import check_recipe, published
from ._run_trainer import begun, check_reports, check_texts, device_of, last_checkpoint, run_to_the_end
from ._scratch import llama_config, train_tokenizer
from ._trime import TrimeLoss
from ._trime_data import train_segments, valid_segments
from ._trime_recipe import TrimeRecipe


def train_trime(
    recipe: TrimeRecipe, output: str | Path, *, device: str | None = None, show_progress: bool = True
) -> dict[str, Any]:
    """Train a model from a recipe into the folder `output/model`; continue where an earlier run was stopped.

    On a CPU, a run that was stopped, even killed, has the losses of one that was not, to the last bit.

    Args:
        recipe: Data, start, memory and schedule.
        output: Folder of the run: tokens, the last checkpoint, `losses.jsonl`, and at the end `model`.
        device: "cpu" or "cuda"; None means CUDA where there is one.
        show_progress: Show rate and time left on stderr.

    Returns:
        Steps, tokens, parameters, and for each validation text nats a token and perplexity with memory and without. The
        memory of a token is what its batch shows.

    Raises:
        ConfigError: A setting cannot work, the folder holds another run, or the loss is not finite.
        CorpusError: Text cannot be read.
        ModelError: The model cannot be loaded.
    """
    output = Path(output)
    device = device_of(device, recipe.schedule.autocast)
    check_reports(recipe.schedule.report_to)
    check_texts([*recipe.train, *recipe.valid])
    check_recipe(recipe.describe(), recipe.fixed() if begun(output) else ["method"], output)
    if not begun(output):
        _forget_another(recipe, output)
    lm = _start(recipe, output, last_checkpoint(output), device)
    train = train_segments(recipe, lm, output, show_progress)
    valid = valid_segments(recipe, lm, output, show_progress)
    memory, seed = recipe.memory, recipe.schedule.seed
    loss = TrimeLoss(memories=memory.memories(), warmup=memory.warmup, temperature=memory.temperature, seed=seed)
    options = {"device": device, "show": show_progress}
    finished = run_to_the_end(recipe.schedule, lm, loss, train, valid, output, **options)
    summary = {"model": str(output / "model"), "memory": recipe.memory.kinds, **finished.summary(lm)}
    with published(output / "model") as folder:
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        write_trime_card(folder / "README.md", recipe, summary)
    return summary


def _forget_another(recipe: TrimeRecipe, output: Path) -> None:
    """Remove what was prepared for another recipe: one that failed before its first step may be mended."""
    path = output / "recipe.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != recipe.describe():
        for kept in (*output.glob("*.safetensors"), *output.glob("chain.npy")):
            kept.unlink()
        shutil.rmtree(output / "tokenizer", ignore_errors=True)


def _start(recipe: TrimeRecipe, output: Path, checkpoint: Path | None, device: str) -> LanguageModel:
    """Return the model as it is at the beginning of this run, and bind the folder to the recipe.

    What can be wrong with a model that is named is found before anything is written.
    """
    name = checkpoint or recipe.from_
    lm = load(name, device=device) if name is not None else None
    if lm is not None and recipe.batches.length > lm.positions:
        raise ConfigError(f"length = {recipe.batches.length} is longer than the {lm.positions} positions of {lm.name}")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "recipe.json", recipe.describe())
    if lm is None:
        assert recipe.model is not None  # one of the two, says the recipe
        shape = recipe.model
        tokenizer = train_tokenizer(shape.vocab_size, shape.max_position_embeddings, recipe.train, output / "tokenizer")
        torch.manual_seed(recipe.schedule.seed)
        model: Any = LlamaForCausalLM(llama_config(recipe.model, tokenizer))
        lm = LanguageModel(model.to(device).eval(), tokenizer, "a new model")
    return lm

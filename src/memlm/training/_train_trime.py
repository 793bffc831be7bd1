"""Train a causal LM with memory from a recipe; every step can be interrupted and resumed.

A checkpoint is written beside the others and renamed when it is whole, so that what has a checkpoint's name is one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..documents import Corpus
from ..errors import ConfigError
from ..files import sync_file, write_atomically, write_json
from ..models import LanguageModel, load
from ..progress import progress
from ._card import write_trime_card
from ._run import check_recipe, cut_log, file_names, published, relative_rate, replace_folder
from ._scratch import llama_config, train_tokenizer
from ._segments import Ids, Segments, bm25_segments, consecutive_segments
from ._trainer import TrimeTrainer
from ._trime import TrimeLoss
from ._trime_recipe import BM25, TrimeRecipe

_WORK = "trainer"  # where the Trainer writes: checkpoints that are not whole yet, and what it reports to TensorBoard


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
    _check(recipe, device)
    check_recipe(recipe.describe(), recipe.fixed() if (output / "losses.jsonl").exists() else ["method"], output)
    checkpoint = _last_checkpoint(output)
    lm = _start(recipe, output, checkpoint)
    if recipe.batches.length > lm.positions:
        raise ConfigError(f"length = {recipe.batches.length} is longer than the {lm.positions} positions of {lm.name}")
    _bind(recipe, output)
    if lm.name == _NEW:
        lm = _new_model(recipe, output)
    train = _train_segments(recipe, lm, output, show_progress)
    valid = _valid_segments(recipe, lm, output, show_progress)
    clock = _Clock(train, recipe.schedule.accumulate)
    steps = recipe.schedule.steps or math.ceil((recipe.schedule.epochs or 0) * clock.updates)

    trainer = _trainer(recipe, lm, output, train, steps, device)
    first = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    cut_log(output / "losses.jsonl", first)
    if first < steps:
        run = _Run(recipe, lm, output, trainer, steps, clock, valid)
        trainer.add_callback(run)
        with progress("training", clock.tokens(steps) - clock.tokens(first), show=show_progress) as run.advance:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        losses = run.valid_losses
    else:
        losses = _validate(trainer, valid, show_progress)

    steps = max(first, steps)  # a recipe made shorter than the run was does not undo what was trained
    summary: dict[str, Any] = {
        "model": str(output / "model"),
        "memory": recipe.memory.kinds,
        "steps": steps,
        "tokens": clock.tokens(steps),
        "tokens_per_epoch": clock.tokens(clock.updates),
        "parameters": lm.model.num_parameters(),
        "valid": losses,
    }
    with published(output / "model") as folder:
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        write_trime_card(folder / "README.md", recipe, summary)
    return summary

"""Train a causal LM with memory from a recipe; every step can be interrupted and resumed.

A checkpoint is written beside the others and renamed when it is whole, so that what has a checkpoint's name is one.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PrinterCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..errors import ConfigError
from ..files import write_json
from ..models import LanguageModel, load
from ..progress import progress
from ._card import write_trime_card
from ._run import check_recipe, cut_log, published, relative_rate
from ._scratch import llama_config, train_tokenizer
from ._segments import Segments
from ._trime import TrimeLoss
from ._trime_data import Clock, train_segments, valid_segments
from ._trime_recipe import TrimeRecipe
from ._trime_run import WORK, RunTrainer, TrimeRun, validate


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
    device = _device(device, recipe.schedule.autocast)
    _check_reports(recipe.schedule.report_to)
    _check_texts([*recipe.train, *recipe.valid])
    begun = (output / "losses.jsonl").exists() and (output / "losses.jsonl").stat().st_size > 0
    check_recipe(recipe.describe(), recipe.fixed() if begun else ["method"], output)
    if not begun:
        _forget_another(recipe, output)
    checkpoint = _last_checkpoint(output)
    lm = _start(recipe, output, checkpoint, device)
    train = train_segments(recipe, lm, output, show_progress)
    valid = valid_segments(recipe, lm, output, show_progress)
    clock = Clock(train, recipe.schedule.accumulate)
    steps = recipe.schedule.steps or math.ceil((recipe.schedule.epochs or 0) * clock.updates)

    first = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    cut_log(output / "losses.jsonl", first)
    for half in (output / WORK).glob("checkpoint-*"):
        shutil.rmtree(half)
    trainer = _trainer(recipe, lm, output, train, steps, device)
    if first < steps:
        run = TrimeRun(recipe, lm, output, trainer, steps, clock, valid)
        trainer.add_callback(run)
        with progress("training", clock.tokens(steps) - clock.tokens(first), show=show_progress) as run.advance:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        losses = run.valid_losses
    else:
        losses = _logged(output / "losses.jsonl", first) or validate(trainer, valid)

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


def _device(name: str | None, autocast: bool) -> str:
    """Return where to train."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device is {name!r}; expected cpu, or cuda where there is one")
    if name == "cuda" and torch.cuda.device_count() > 1:
        raise ConfigError("several GPUs are visible; choose one by CUDA_VISIBLE_DEVICES")
    if name == "cuda" and autocast and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("this GPU has no bfloat16; set autocast = false")
    return name


def _check_reports(names: list[str]) -> None:
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to names {name!r}; expected any of {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"report_to names {name}, which is not installed; install it, or leave it out")


def _check_texts(paths: list[str]) -> None:
    """Find a wrong path before a model is loaded and half of the text is read."""
    for path in paths:
        if not Path(path).exists():
            raise ConfigError(f"{path} does not exist; expected a file or a folder of text")


def _forget_another(recipe: TrimeRecipe, output: Path) -> None:
    """Remove what was prepared for another recipe: one that failed before its first step may be mended."""
    path = output / "recipe.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != recipe.describe():
        for kept in (*output.glob("*.safetensors"), *output.glob("chain.npy")):
            kept.unlink()
        shutil.rmtree(output / "tokenizer", ignore_errors=True)


def _last_checkpoint(output: Path) -> Path | None:
    found = {int(path.name.rpartition("-")[2]): path for path in output.glob("checkpoint-*") if path.is_dir()}
    return found[max(found)] if found else None


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
        tokenizer = train_tokenizer(recipe.model, recipe.train, output / "tokenizer")
        torch.manual_seed(recipe.schedule.seed)
        model: Any = LlamaForCausalLM(llama_config(recipe.model, tokenizer))
        lm = LanguageModel(model.to(device).eval(), tokenizer, "a new model")
    return lm


def _logged(log: Path, step: int) -> dict[str, Any]:
    """Return what was found on validation text after a step, if anything was."""
    lines = log.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1]) if lines else {}
    return row.get("valid", {}) if row.get("step") == step else {}


def _trainer(
    recipe: TrimeRecipe, lm: LanguageModel, output: Path, train: Segments, steps: int, device: str
) -> RunTrainer:
    schedule, memory = recipe.schedule, recipe.memory
    if schedule.gradient_checkpointing:
        model: Any = lm.model  # the name changed within transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    arguments = TrainingArguments(
        output_dir=str(output / WORK),
        max_steps=steps,
        per_device_train_batch_size=train.rows_per_batch,
        per_device_eval_batch_size=train.rows_per_batch,
        gradient_accumulation_steps=schedule.accumulate,
        learning_rate=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.clip,
        bf16=schedule.autocast,
        seed=schedule.seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        dataloader_num_workers=0,
        logging_strategy="no",  # logging, validation and checkpoints are in _Run
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=schedule.report_to or "none",
        disable_tqdm=True,
    )
    loss = TrimeLoss(
        memories=memory.memories(), warmup=memory.warmup, temperature=memory.temperature, seed=schedule.seed
    )
    trainer = RunTrainer(lm.model, arguments, train_dataset=train, loss=loss)
    trainer.remove_callback(PrinterCallback)
    optimizer = trainer.create_optimizer()
    trainer.lr_scheduler = LambdaLR(
        optimizer, lambda step: relative_rate(step, steps, schedule.warmup_steps, schedule.decay_fraction)
    )
    return trainer

"""Running a recipe by the Trainer from the last checkpoint to the end, whatever the loss is."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..documents import Corpus
from ..errors import ConfigError
from ..models import LanguageModel
from ..progress import progress
from ._run import cut_log, relative_rate
from ._segments import Segments
from ._trainer import MemoryLoss
from ._trime_data import Clock
from ._trime_recipe import TrimeSchedule
from ._trime_run import WORK, RunTrainer, TrimeRun, validate


class Finished(NamedTuple):
    """What a run came to: steps, its clock, and what was found on validation text."""

    steps: int
    clock: Clock
    valid: dict[str, Any]

    def summary(self, lm: LanguageModel) -> dict[str, Any]:
        """Return what a command tells of it."""
        return {
            "steps": self.steps,
            "tokens": self.clock.tokens(self.steps),
            "tokens_per_epoch": self.clock.tokens(self.clock.updates),
            "parameters": lm.model.num_parameters(),
            "valid": self.valid,
        }


def run_to_the_end(
    schedule: TrimeSchedule,
    lm: LanguageModel,
    loss: MemoryLoss,
    train: Segments,
    valid: Mapping[str, Segments],
    output: Path,
    *,
    device: str,
    show: bool,
) -> Finished:
    """Train from the last checkpoint in `output`, or from the model as it is, and keep losses and checkpoints there."""
    checkpoint = last_checkpoint(output)
    clock = Clock(train, schedule.accumulate)
    steps = schedule.steps or math.ceil((schedule.epochs or 0) * clock.updates)
    first = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    cut_log(output / "losses.jsonl", first)
    for half in (output / WORK).glob("checkpoint-*"):
        shutil.rmtree(half)
    trainer = _trainer(schedule, lm, loss, output, train, steps, device)
    if first < steps:
        run = TrimeRun(schedule, lm, output, trainer, steps, clock, dict(valid))
        trainer.add_callback(run)
        with progress("training", clock.tokens(steps) - clock.tokens(first), show=show) as run.advance:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        losses = run.valid_losses
    else:
        losses = _logged(output / "losses.jsonl", first) or validate(trainer, dict(valid))
    # a recipe made shorter than the run was does not undo what was trained
    return Finished(max(first, steps), clock, losses)


def begun(output: Path) -> bool:
    """Return whether a run has made a step in this folder."""
    log = output / "losses.jsonl"
    return log.exists() and log.stat().st_size > 0


def device_of(name: str | None, autocast: bool) -> str:
    """Return where to train."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device is {name!r}; expected cpu, or cuda where there is one")
    if name == "cuda" and torch.cuda.device_count() > 1:
        raise ConfigError("several GPUs are visible; choose one by CUDA_VISIBLE_DEVICES")
    if name == "cuda" and autocast and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("this GPU has no bfloat16; set autocast = false")
    return name


def check_reports(names: list[str]) -> None:
    """Find a report that cannot be made before anything is done."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to names {name!r}; expected any of {', '.join(INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"report_to names {name}, which is not installed; install it, or leave it out")


def check_texts(paths: list[str]) -> None:
    """Find a wrong path, or one without text, before a model is loaded and half of the text is read."""
    for path in paths:
        if not Path(path).exists():
            raise ConfigError(f"{path} does not exist; expected a file or a folder of text")
        next(iter(Corpus([path])))  # raises where there is no text


def last_checkpoint(output: Path) -> Path | None:
    """Return the folder of the last checkpoint; None where there is none."""
    found = {int(path.name.rpartition("-")[2]): path for path in output.glob("checkpoint-*") if path.is_dir()}
    return found[max(found)] if found else None


def _logged(log: Path, step: int) -> dict[str, Any]:
    """Return what was found on validation text after a step, if anything was."""
    lines = log.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1]) if lines else {}
    return row.get("valid", {}) if row.get("step") == step else {}


def _trainer(
    schedule: TrimeSchedule,
    lm: LanguageModel,
    loss: MemoryLoss,
    output: Path,
    train: Segments,
    steps: int,
    device: str,
) -> RunTrainer:
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
    trainer = RunTrainer(lm.model, arguments, train_dataset=train, loss=loss)
    trainer.remove_callback(PrinterCallback)
    optimizer = trainer.create_optimizer()
    trainer.lr_scheduler = LambdaLR(
        optimizer, lambda step: relative_rate(step, steps, schedule.warmup_steps, schedule.decay_fraction)
    )
    return trainer

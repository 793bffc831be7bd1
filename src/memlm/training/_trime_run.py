"""What happens around the steps of training with memory: losses are written, text is validated, checkpoints kept."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import ConfigError
from ..files import sync_file
from ..models import LanguageModel
from ..progress import Advance
from ._run import relative_rate, replace_folder
from ._segments import Segments
from ._trainer import TrimeTrainer
from ._trime_data import Clock
from ._trime_recipe import TrimeSchedule

WORK = "trainer"  # where the Trainer writes: checkpoints that are not whole yet, and what it reports to TensorBoard
_LOG_EVERY = 10  # steps whose losses are fetched from the device at once


class RunTrainer(TrimeTrainer):
    """Keeps the losses of the batches of an update where they are: fetching each would hold the device up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step of the Trainer, and keep its loss."""
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss)
        return loss


class TrimeRun(TrainerCallback):
    """Writes losses, validates, and keeps the last checkpoint that is whole."""

    def __init__(
        self,
        schedule: TrimeSchedule,
        lm: LanguageModel,
        output: Path,
        trainer: RunTrainer,
        steps: int,
        clock: Clock,
        valid: dict[str, Segments],
    ) -> None:
        self.schedule = schedule
        self.lm, self.output, self.trainer, self.steps, self.clock, self.valid = (
            lm,
            output,
            trainer,
            steps,
            clock,
            valid,
        )
        self.advance: Advance = lambda amount: None
        self.valid_losses: dict[str, Any] = {}
        self.pending: list[Tensor] = []  # losses of the last steps, on the device
        self.since = time.perf_counter()

    def _rate(self, step: int) -> float:
        """Return the learning rate with which a step is made, counted from 0."""
        schedule = self.schedule
        share = relative_rate(step, self.steps, schedule.warmup_steps, schedule.decay_fraction)
        return schedule.learning_rate * share

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rate of the first step; a checkpoint has that of the steps there were to be when it was made."""
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = self._rate(state.global_step)
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write down losses, validate, and ask for a checkpoint, each when it is time."""
        step = state.global_step
        self.pending.append(torch.stack(self.trainer.losses).sum())
        self.trainer.losses.clear()
        self.advance(self.clock.tokens(step) - self.clock.tokens(step - 1))
        last = step == self.steps
        evaluate = last or step % self.schedule.evaluate_every == 0
        control.should_save = last or step % self.schedule.checkpoint_every == 0
        if evaluate or control.should_save or len(self.pending) == _LOG_EVERY:
            self._write(step, evaluate)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put a checkpoint in its place, now that it is whole."""
        name = f"checkpoint-{state.global_step}"
        staging = self.output / WORK / name
        self.lm.tokenizer.save_pretrained(staging)
        replace_folder(staging, self.output / name)
        for other in self.output.glob("checkpoint-*"):
            if other.name != name:
                shutil.rmtree(other)
        self.since = time.perf_counter()

    def _write(self, step: int, evaluate: bool) -> None:
        losses = torch.stack(self.pending).tolist()  # waits for the device
        self.pending.clear()
        first = step - len(losses)
        tokens = self.clock.tokens(step) - self.clock.tokens(first)
        speed = tokens / (time.perf_counter() - self.since)
        rows: list[dict[str, Any]] = [
            {
                "step": number + 1,
                "tokens": self.clock.tokens(number + 1),
                "loss": loss,
                "rate": self._rate(number),
                "tokens_per_second": speed,
            }
            for number, loss in enumerate(losses, first)
        ]
        finite = [row for row in rows if math.isfinite(row["loss"])]
        if len(finite) == len(rows):
            mean = sum(losses) / len(losses)
            self.trainer.log({"loss": mean, "learning_rate": rows[-1]["rate"], "tokens_per_second": speed})
            if evaluate:
                rows[-1]["valid"] = self.valid_losses = validate(self.trainer, self.valid)
        with (self.output / "losses.jsonl").open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(row) + "\n" for row in finite)
        sync_file(self.output / "losses.jsonl")  # before a checkpoint that counts on it
        if len(finite) < len(rows):
            number = next(row["step"] for row in rows if row not in finite)
            raise ConfigError(
                f"the loss of step {number} is not finite; lower learning_rate or clip, and start in a new folder"
            )
        self.since = time.perf_counter()


def validate(trainer: TrimeTrainer, valid: dict[str, Segments]) -> dict[str, Any]:
    """Return nats a token and perplexity with memory and without, for each validation text."""
    found: dict[str, Any] = {}
    device = trainer.args.device.type
    with torch.random.fork_rng(devices=[]):  # looking must not change the run
        for name, segments in valid.items():
            prefix = f"eval_{name}"
            with torch.autocast(device, torch.bfloat16, enabled=trainer.args.bf16):
                metrics: dict[str, float] = trainer.evaluate(segments, metric_key_prefix=prefix)  # type: ignore[arg-type]
            found[name] = {
                f"{ours}{suffix}": metrics[f"{prefix}_{theirs}{suffix}"]
                for suffix in ("", "_without_memory")
                for ours, theirs in (("nats_per_token", "loss"), ("perplexity", "perplexity"))
            }
    return found

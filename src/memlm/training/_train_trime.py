"""Train a causal LM with memory from a recipe; every step can be interrupted and resumed.

A checkpoint is written beside the others and renamed when it is whole, so that what has a checkpoint's name is one.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..documents import Corpus
from ..errors import ConfigError
from ..files import atomic_writer, sync_file, write_json
from ..models import LanguageModel, load
from ..progress import Advance, progress
from ._card import write_trime_card
from ._run import check_recipe, cut_log, file_names, published, relative_rate, replace_folder
from ._scratch import llama_config, train_tokenizer
from ._segments import Ids, Segments, bm25_segments, consecutive_segments
from ._trainer import TrimeTrainer
from ._trime import TrimeLoss
from ._trime_recipe import BM25, TrimeRecipe

_WORK = "trainer"  # where the Trainer writes: checkpoints that are not whole yet, and what it reports to TensorBoard
_LOG_EVERY = 10  # steps whose losses are fetched from the device at once


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
    check_recipe(recipe.describe(), recipe.fixed(), output)
    checkpoint = _last_checkpoint(output)
    lm = _start(recipe, output, checkpoint, device)
    train = _train_segments(recipe, lm, output, show_progress)
    valid = _valid_segments(recipe, lm, output, show_progress)
    clock = _Clock(train, recipe.schedule.accumulate)
    steps = recipe.schedule.steps or math.ceil((recipe.schedule.epochs or 0) * clock.updates)

    first = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    cut_log(output / "losses.jsonl", first)
    trainer = _trainer(recipe, lm, output, train, steps, device)
    losses: dict[str, Any] = {}
    if first < steps:
        run = _Run(recipe, lm, output, trainer, steps, clock, valid)
        trainer.add_callback(run)
        with progress("training", clock.tokens(steps) - clock.tokens(first), show=show_progress) as run.advance:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        losses = run.valid_losses

    steps = max(first, steps)  # a recipe made shorter than the run was does not undo what was trained
    summary: dict[str, Any] = {
        "model": str(output / "model"),
        "memory": recipe.memory.kinds,
        "steps": steps,
        "tokens": clock.tokens(steps),
        "tokens_per_epoch": clock.tokens(clock.updates),
        "parameters": lm.model.num_parameters(),
        "valid": losses or _validate(trainer, valid),
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
        model = LlamaForCausalLM(llama_config(recipe.model, tokenizer)).to(device).eval()
        lm = LanguageModel(model, tokenizer, "a new model")
    return lm


def _train_segments(recipe: TrimeRecipe, lm: LanguageModel, output: Path, show: bool) -> Segments:
    documents = _documents(recipe.train, lm, output / "train.safetensors", None, show)
    if recipe.batches.order != BM25:
        return _segments(recipe, lm, documents)
    path = output / "chain.npy"  # of the search by BM25, which takes minutes
    chain = np.load(path) if path.exists() else None
    segments = _segments(recipe, lm, documents, chain=chain, show_progress=show)
    if chain is None:
        with atomic_writer(path) as file:
            np.save(file, segments.chain)
    return segments


def _valid_segments(recipe: TrimeRecipe, lm: LanguageModel, output: Path, show: bool) -> dict[str, Segments]:
    """Return the segments of each validation text, which shows a batch as much memory as in training."""
    limit = recipe.schedule.valid_tokens
    files = [output / f"valid-{number}.safetensors" for number in range(len(recipe.valid))]
    return {
        name: _segments(recipe, lm, _documents([path], lm, file, limit, show))
        for name, path, file in zip(file_names(recipe.valid), recipe.valid, files, strict=True)
    }


def _segments(recipe: TrimeRecipe, lm: LanguageModel, documents: list[Ids], **options: Any) -> Segments:
    batches, (streams, rows) = recipe.batches, recipe.batches.layout
    padding = lm.tokenizer.eos_token_id or 0
    if batches.order == BM25:
        options |= {"rows": rows, "seed": recipe.schedule.seed}
        return bm25_segments(documents, batches.length, padding=padding, **options)
    return consecutive_segments(documents, batches.length, streams=streams, consecutive=rows, padding=padding)


def _documents(paths: list[str], lm: LanguageModel, cache: Path, limit: int | None, show: bool) -> list[Ids]:
    """Return the token ids of documents, of the first `limit` tokens; they are kept in a file."""
    if not cache.exists():
        pieces: list[Ids] = []
        left = math.inf if limit is None else limit
        with progress(f"tokenizing {cache.stem}", None, show=show) as advance:
            for document in Corpus(paths):
                ids = lm.tokenize(document).ids.astype(np.int32)
                pieces.append(ids if len(ids) <= left else ids[: int(left)])
                left -= len(pieces[-1])
                advance(len(pieces[-1]))
                if left <= 0:
                    break
        starts = np.cumsum([0, *(len(piece) for piece in pieces)])
        with atomic_writer(cache) as file:
            file.write(safetensors.numpy.save({"ids": np.concatenate(pieces), "starts": starts}))
    stored = safetensors.numpy.load_file(cache)
    return [stored["ids"][first:stop] for first, stop in pairwise(stored["starts"].tolist())]


class _Clock:
    """Counts the targets that were seen after so many updates; an epoch ends with an update."""

    def __init__(self, segments: Segments, accumulate: int) -> None:
        per_update = segments.rows_per_batch * accumulate
        counts = np.add.reduceat(segments.targets, np.arange(0, len(segments), per_update))
        self.updates = len(counts)  # of an epoch
        self._totals = np.cumsum([0, *counts.tolist()])

    def tokens(self, updates: int) -> int:
        epochs, rest = divmod(updates, self.updates)
        return int(epochs * self._totals[-1] + self._totals[rest])


class _Trainer(TrimeTrainer):
    """Keeps the losses of the batches of an update where they are: fetching each would hold the device up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss)
        return loss


def _trainer(
    recipe: TrimeRecipe, lm: LanguageModel, output: Path, train: Segments, steps: int, device: str
) -> _Trainer:
    schedule, memory = recipe.schedule, recipe.memory
    if schedule.gradient_checkpointing:
        model: Any = lm.model  # the name changed within transformers 5
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    arguments = TrainingArguments(
        output_dir=str(output / _WORK),
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
    trainer = _Trainer(lm.model, arguments, train_dataset=train, loss=loss)
    trainer.remove_callback(PrinterCallback)
    optimizer = trainer.create_optimizer()
    trainer.lr_scheduler = LambdaLR(
        optimizer, lambda step: relative_rate(step, steps, schedule.warmup_steps, schedule.decay_fraction)
    )
    return trainer


class _Run(TrainerCallback):
    """Writes losses, validates, and keeps the last checkpoint that is whole."""

    def __init__(
        self,
        recipe: TrimeRecipe,
        lm: LanguageModel,
        output: Path,
        trainer: _Trainer,
        steps: int,
        clock: _Clock,
        valid: dict[str, Segments],
    ) -> None:
        self.schedule = recipe.schedule
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
        staging = self.output / _WORK / name
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
                rows[-1]["valid"] = self.valid_losses = _validate(self.trainer, self.valid)
        with (self.output / "losses.jsonl").open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(row) + "\n" for row in finite)
        sync_file(self.output / "losses.jsonl")  # before a checkpoint that counts on it
        if len(finite) < len(rows):
            number = next(row["step"] for row in rows if row not in finite)
            raise ConfigError(
                f"the loss of step {number} is not finite; lower learning_rate or clip, and start in a new folder"
            )
        self.since = time.perf_counter()


def _validate(trainer: TrimeTrainer, valid: dict[str, Segments]) -> dict[str, Any]:
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

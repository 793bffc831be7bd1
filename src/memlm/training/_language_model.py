"""Train a small Llama model and its tokenizer from documents; every step can be interrupted and resumed.

The matrices inside the layers are trained by Muon (Jordan et al. 2024), everything else by AdamW; the learning rates
warm up, stay, and fall linearly to zero.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from ..documents import Corpus
from ..errors import ConfigError
from ..files import atomic_writer, write_json
from ..progress import progress
from ._card import plot_losses, write_card
from ._recipe import Recipe, Schedule
from ._run import check_recipe, cut_log, file_names, published, relative_rate
from ._scratch import llama_config, train_tokenizer


def train_language_model(recipe: Recipe, output: str | Path, *, show_progress: bool = True) -> dict[str, Any]:
    """Train a model from a recipe into the folder `output/model`; continue where an earlier run was stopped.

    Args:
        recipe: Data, shape and schedule.
        output: Folder of the run: tokenizer, tokens, checkpoint, `losses.jsonl`, and at the end `model`.
        show_progress: Show rate and time left on stderr.

    Returns:
        Steps, tokens and final validation loss (nats a token, bits a byte, per corpus).
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    described = {"method": "lm"} | dataclasses.asdict(recipe)
    check_recipe(described, ["method", "train", "valid", "model"], output)  # the schedule's length may change
    write_json(output / "recipe.json", described)
    shape = recipe.model
    tokenizer = train_tokenizer(shape.vocab_size, shape.max_position_embeddings, recipe.train, output / "tokenizer")
    train = _tokens(recipe.train, tokenizer, output / "train.npy", show_progress)
    valid = {
        name: _tokens([path], tokenizer, output / f"valid-{number}.npy", show_progress)
        for number, (name, path) in enumerate(zip(file_names(recipe.valid), recipe.valid, strict=True))
    }
    schedule = recipe.schedule
    for name, (tokens, _) in {"train": train, **valid}.items():
        if len(tokens) <= schedule.block:
            raise ConfigError(
                f"the text of {name} has {len(tokens)} tokens; expected more than a block ({schedule.block})"
            )

    torch.manual_seed(schedule.seed)
    model = LlamaForCausalLM(llama_config(recipe.model, tokenizer))
    optimizers = _optimizers(model, schedule)
    loss_of = _loss_function(model, schedule)
    first = _load_checkpoint(output / "checkpoint.pt", model, optimizers)
    cut_log(output / "losses.jsonl", first)
    valid_losses: dict[str, float] = {}
    tokens_a_step = schedule.batch * schedule.block
    with progress("training", (schedule.steps - first) * tokens_a_step, show=show_progress) as advance:
        for step in range(first, schedule.steps):
            started = time.perf_counter()
            rate = relative_rate(step, schedule.steps, schedule.warmup_steps, schedule.decay_fraction)
            loss = _step(loss_of, _batch(train[0], step, schedule), optimizers, rate, schedule)
            row: dict[str, Any] = {"step": step + 1, "tokens": (step + 1) * tokens_a_step, "loss": loss, "rate": rate}
            row["tokens_per_second"] = tokens_a_step / (time.perf_counter() - started)
            last = step + 1 == schedule.steps
            if last or (step + 1) % schedule.evaluate_every == 0:
                valid_losses = {name: _validate(loss_of, tokens, schedule) for name, (tokens, _) in valid.items()}
                row["valid"] = valid_losses
            with (output / "losses.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            if last or (step + 1) % schedule.checkpoint_every == 0:
                _save_checkpoint(output / "checkpoint.pt", model, optimizers, step + 1)
            advance(tokens_a_step)
    if not valid_losses:
        valid_losses = {name: _validate(loss_of, tokens, schedule) for name, (tokens, _) in valid.items()}

    steps = max(first, schedule.steps)  # a recipe made shorter than the run was does not undo what was trained
    summary: dict[str, Any] = {
        "steps": steps,
        "tokens": steps * tokens_a_step,
        "train_tokens": len(train[0]),
        "parameters": model.num_parameters(),
        "valid": {
            name: {"nats_per_token": loss, "bits_per_byte": loss * len(valid[name][0]) / valid[name][1] / math.log(2)}
            for name, loss in valid_losses.items()
        },
    }
    _publish(model, tokenizer, recipe, summary, output)
    return summary


def _tokens(paths: list[str], tokenizer: Any, cache: Path, show: bool) -> tuple[np.ndarray, int]:
    """Return all documents as one stream of ids, an end-of-text before each, and the bytes of text in it."""
    if not cache.exists():
        size = 0
        pieces: list[np.ndarray] = []
        with progress(f"tokenizing {cache.stem}", None, "bytes", show=show) as advance:
            for document in Corpus(paths):
                ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
                pieces.append(np.array([tokenizer.bos_token_id, *ids], dtype=np.uint32))
                size += len(document.text.encode())
                advance(len(document.text))
        with atomic_writer(cache.with_suffix(".json")) as file:
            file.write(json.dumps({"bytes": size}).encode())
        with atomic_writer(cache) as file:
            np.save(file, np.concatenate(pieces))
    return np.load(cache, mmap_mode="r"), json.loads(cache.with_suffix(".json").read_text(encoding="utf-8"))["bytes"]


def _optimizers(model: LlamaForCausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside_layer = parameter.ndim == 2 and ".layers." in name
        (matrices if inside_layer else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=schedule.matrix_learning_rate, weight_decay=schedule.weight_decay),
        torch.optim.AdamW(others, lr=schedule.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _loss_function(model: LlamaForCausalLM, schedule: Schedule) -> Callable[[torch.Tensor], torch.Tensor]:
    def loss(block: torch.Tensor) -> torch.Tensor:  # block: (batch, tokens + 1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=schedule.autocast):
            hidden = model.model(block[:, :-1]).last_hidden_state
            logits = model.lm_head(hidden)  # (batch, tokens, vocabulary)
        return F.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten())

    return torch.compile(loss) if schedule.compile else loss


def _batch(tokens: np.ndarray, step: int, schedule: Schedule) -> torch.Tensor:
    """Blocks of one step: every block once an epoch, in an order that only seed and epoch decide."""
    blocks = (len(tokens) - 1) // schedule.block
    rows = []
    for position in range(step * schedule.batch, (step + 1) * schedule.batch):
        epoch, place = divmod(position, blocks)
        order = np.random.default_rng((schedule.seed, epoch)).permutation(blocks)
        start = int(order[place]) * schedule.block
        rows.append(tokens[start : start + schedule.block + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def _step(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    batch: torch.Tensor,
    optimizers: Iterable[torch.optim.Optimizer],
    rate: float,
    schedule: Schedule,
) -> float:
    total = 0.0
    parts = schedule.batch // schedule.micro_batch
    for part in batch.split(schedule.micro_batch):
        loss = loss_of(part) / parts
        loss.backward()
        total += loss.item()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * rate
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def _validation_blocks(tokens: np.ndarray, schedule: Schedule, limit: int = 64) -> Iterator[torch.Tensor]:
    """At most `limit` blocks, evenly spread over the corpus."""
    blocks = (len(tokens) - 1) // schedule.block
    chosen = np.unique(np.linspace(0, blocks - 1, min(limit, blocks)).astype(int)) if blocks else np.array([], int)
    width = min(schedule.micro_batch, len(chosen))
    for start in range(0, len(chosen) - len(chosen) % width, width):
        rows = [tokens[n * schedule.block : (n + 1) * schedule.block + 1] for n in chosen[start : start + width]]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def _validate(loss_of: Callable[[torch.Tensor], torch.Tensor], tokens: np.ndarray, schedule: Schedule) -> float:
    losses = [loss_of(batch).item() for batch in _validation_blocks(tokens, schedule)]
    return sum(losses) / len(losses) if losses else math.nan


def _save_checkpoint(path: Path, model: Any, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    state = {"step": step, "model": model.state_dict(), "optimizers": [item.state_dict() for item in optimizers]}
    with atomic_writer(path) as file:
        torch.save(state, file)


def _load_checkpoint(path: Path, model: Any, optimizers: list[torch.optim.Optimizer]) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def _publish(model: Any, tokenizer: Any, recipe: Recipe, summary: dict[str, Any], output: Path) -> None:
    """Write the model in bfloat16 with its card, in one step."""
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    rows = [json.loads(line) for line in (output / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    with published(output / "model") as folder:
        plain.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        plot_losses(rows, folder / "losses.png")
        write_card(folder / "README.md", recipe, summary)

"""The work on one arm: train, then read the test documents."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ...documents import Corpus
from ...layers import AttentionMemories
from ...training import ModelShape, StreamBatch, document_streams
from .._copying import CopyingLM, PlainLM, losses_of
from .._experiment import Measured, Row, Task
from . import _rows as rows
from ._sizes import Sizes

_WARM, _FALLING = 0.05, 0.6  # shares of the steps in which the learning rate rises, and falls to zero
DEEP = ("deep", "deep-plain")
_TOGETHER = 2  # documents read side by side


def measure(task: Task) -> Measured:
    """Train and measure one arm."""
    sizes, started = task.size, time.process_time()
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(task.folder / "tokenizer")
    train_ids, test_ids = (
        [np.array([*tokenizer(item.text)["input_ids"], tokenizer.eos_token_id]) for item in Corpus(path)]
        for path in (task.folder / "text" / f"{name}.jsonl" for name in ("train", "test"))
    )
    model = new_model(sizes, task.arm, task.seed)
    memory = model.remember(sizes.memory if task.arm == "squat-memory" else 0, sizes.top_k)
    train(model, memory, task.arm, train_ids, sizes, task.seed, task.advance)
    trained = time.process_time()
    test_ids.sort(key=len)  # of the two that are read side by side, neither waits long
    losses = read(model, memory, test_ids, length_of(sizes, task.arm))
    seconds = time.process_time() - trained
    seen = [last_seen(ids, sizes.length) for ids in test_ids]
    found = {name: _row(losses, [part == kind for part in seen]) for kind, name in enumerate(KINDS)}
    found[rows.ALL] = _row(losses, [np.ones(len(part), bool) for part in losses])
    if task.arm == "squat-memory":
        for name, way in ((rows.EMPTY, "empty"), (rows.OTHER, "other")):
            other = read(model, memory, test_ids, length_of(sizes, task.arm), way)
            found[name] = _row(other, [np.ones(len(part), bool) for part in other])
    counts = [len(part) for part in losses]
    return Measured(
        counts=counts,
        groups="documents",
        rows=found,
        facts={
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tokens a second": sum(counts) / seconds,
            "bytes of state": state_bytes(sizes, task.arm),
            "processor seconds of training": trained - started,
            "shares": {name: float((np.concatenate(seen) == kind).mean()) for kind, name in enumerate(KINDS)},
        },
    )


def length_of(sizes: Sizes, arm: str) -> int:
    """Return the tokens of a segment."""
    return sizes.long if arm == "squat-long" else sizes.length


def new_model(sizes: Sizes, arm: str, seed: int) -> CopyingLM | PlainLM:
    """Return a small model that copies, or a plain one; all else of it is random."""
    deep = arm in DEEP
    shape = ModelShape(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.deep_width if deep else sizes.width,
        intermediate_size=sizes.deep_feed_forward if deep else sizes.feed_forward,
        num_hidden_layers=sizes.deep_layers if deep else sizes.layers,
        num_attention_heads=sizes.deep_heads if deep else sizes.heads,
        max_position_embeddings=length_of(sizes, arm),
    )
    return (PlainLM if arm == "deep-plain" else CopyingLM)(shape, seed)


def train(
    model: CopyingLM | PlainLM,
    memory: AttentionMemories,
    arm: str,
    documents: Sequence[np.ndarray],
    sizes: Sizes,
    seed: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Train a model in place, on documents that are read in order, over and over in another order of documents."""
    length = length_of(sizes, arm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / sizes.steps / _WARM, (1 - step / sizes.steps) / _FALLING)
    )
    model.train()
    batches = _batches(documents, sizes, length, seed)
    for batch, before in itertools.islice(batches, sizes.steps):
        memory.reset(batch.begins)
        losses_of(model, batch, before).sum().div((batch.targets >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance(batch.input_ids.numel())
    model.eval()


def _batches(
    documents: Sequence[np.ndarray], sizes: Sizes, length: int, seed: int
) -> Iterator[tuple[StreamBatch, Tensor]]:
    """Yield segments and the token before each: as many tokens a batch, out of as many documents, whatever the length.

    Where segments are long, a batch takes the next few of the rows, which read as many documents at a time as all.
    """
    count = sizes.rows * sizes.length // length
    before = torch.zeros(sizes.rows, 1, dtype=torch.int64)
    for batch in document_streams(_endless(documents, seed), sizes.rows, length):
        for first in range(0, sizes.rows, count):
            rows = slice(first, first + count)
            yield StreamBatch(*(part[rows] for part in batch)), before[rows]
        before = batch.input_ids[:, -1:]


def _endless(documents: Sequence[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(len(documents))
        yield from (documents[number] for number in order)


@torch.no_grad()
def read(
    model: CopyingLM | PlainLM,
    memory: AttentionMemories,
    documents: Sequence[np.ndarray],
    length: int,
    way: str = "own",
) -> list[np.ndarray]:
    """Return the nats of every target of each document, shape (tokens − 1,), two documents side by side.

    Args:
        model: In evaluation mode.
        memory: Of the model.
        documents: Token ids of each, shape (tokens,).
        length: Tokens a segment.
        way: "own", or a control: "empty" empties the memory before every segment, "other" reads that of the other
            document; one without a partner has none.
    """
    found: list[np.ndarray] = []
    for start in range(0, len(documents), _TOGETHER):
        pair = documents[start : start + _TOGETHER]
        parts: list[list[np.ndarray]] = [[] for _ in pair]
        memory.reset()
        before = torch.zeros(len(pair), 1, dtype=torch.int64)
        for batch in document_streams(pair, len(pair), length):
            if way == "empty":
                memory.reset()
            with memory.reading_from([*range(len(pair))][::-1]) if way == "other" else nullcontext():
                losses = losses_of(model, batch, before)
            before = batch.input_ids[:, -1:]
            for row, part in enumerate(parts):
                part.append(losses[row][batch.targets[row] >= 0].double().numpy())
        found += [np.concatenate(part) for part in parts]
    return found


KINDS = (rows.NEW, rows.NEAR, rows.FAR)


def last_seen(ids: np.ndarray, window: int) -> np.ndarray:
    """Return for every token but the first its place in `KINDS`, int64, shape (tokens − 1,)."""
    last: dict[int, int] = {}
    kinds = np.zeros(len(ids), np.int64)
    for place, token in enumerate(ids.tolist()):
        if token in last:
            kinds[place] = 1 if place - last[token] <= window else 2
        last[token] = place
    return kinds[1:]


def _row(losses: Sequence[np.ndarray], chosen: Sequence[np.ndarray]) -> Row:
    """Return the sums over chosen targets, such that the mean over all targets is theirs."""
    share = sum(int(mask.sum()) for mask in chosen) / sum(len(part) for part in losses)
    return Row([float(part[mask].sum()) / max(share, 1e-9) for part, mask in zip(losses, chosen, strict=True)])


def state_bytes(sizes: Sizes, arm: str) -> int:
    """Return the bytes of keys and values that must be kept of one text, float32."""
    layers, width = (sizes.deep_layers, sizes.deep_width) if arm in DEEP else (sizes.layers, sizes.width)
    remembered = sizes.memory if arm == "squat-memory" else 0
    return 2 * 4 * width * (layers * length_of(sizes, arm) + remembered)

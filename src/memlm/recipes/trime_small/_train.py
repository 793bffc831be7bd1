"""Training one arm: the same model, text, order and number of steps for all; only what may be seen differs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, default_data_collator

from ...training import (
    External,
    Local,
    LongTerm,
    Segments,
    TrainingMemory,
    TrimeLoss,
    bm25_segments,
    consecutive_segments,
)
from ._sizes import Sizes

MEMORIES: Mapping[str, Sequence[TrainingMemory]] = {
    "cross-entropy": [],
    "trime-local": [Local()],
    "trime-long": [Local(), LongTerm()],
    "trime-external": [Local(), External(drop_own=0.9, own_document=False)],
}
_HITS = 100  # of which some are of the same document
_WARM, _FALLING = 0.05, 0.6  # shares of the steps in which the learning rate rises, and falls to zero


def new_model(sizes: Sizes, seed: int, end: int) -> LlamaForCausalLM:
    """Return a small Llama with random weights; `end` is the token that ends a document."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.feed_forward,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    arm: str,
    documents: Sequence[np.ndarray],
    sizes: Sizes,
    seed: int,
    advance: Callable[[int], None],
) -> None:
    """Train a model in place.

    Args:
        model: From `new_model`.
        arm: What it may see; see `MEMORIES`.
        documents: Token ids of the training documents, each of shape (tokens,).
        sizes: How long and how fast.
        seed: Of the order of the documents, the BM25 chain, and the segments that may not look at themselves.
        advance: Called with the tokens of every step.
    """
    loss_of = TrimeLoss(memories=MEMORIES[arm], warmup=sizes.plain, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / sizes.steps, 1 / sizes.steps))
    model.train()
    batches = itertools.islice(_batches(arm, documents, sizes, seed), sizes.steps)
    for step, batch in enumerate(batches):
        loss_of(model, batch, update=step, updates=sizes.steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        advance(sizes.rows * sizes.length)
    model.eval()


def _rate(done: float, step: float) -> float:
    """Return the share of the learning rate when a share of the steps is done."""
    return min(1.0, (done + step) / _WARM, (1 - done) / _FALLING)


def _batches(arm: str, documents: Sequence[np.ndarray], sizes: Sizes, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield batches, epoch after epoch: consecutive segments, and for the external memory segments that are alike."""
    for epoch in itertools.count():
        order = np.random.default_rng((seed, epoch)).permutation(len(documents))
        segments = _segments(arm, [documents[number] for number in order], sizes, seed)
        for first in range(0, len(segments), sizes.rows):
            rows: list[Any] = [segments[number] for number in range(first, first + sizes.rows)]
            yield default_data_collator(rows)


def _segments(arm: str, documents: Sequence[np.ndarray], sizes: Sizes, seed: int) -> Segments:
    if any(isinstance(memory, External) for memory in MEMORIES[arm]):
        return bm25_segments(documents, sizes.length, rows=sizes.rows, hits=_HITS, across_documents=True, seed=seed)
    return consecutive_segments(documents, sizes.length, streams=sizes.streams, consecutive=sizes.consecutive)

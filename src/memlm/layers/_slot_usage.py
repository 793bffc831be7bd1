"""Which slots of the memories a text reads, and how evenly."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..ops import slot_tf_idf, usage_divergence, usage_share
from ._product_keys import product_key_memories


class SlotUsage:
    """What one memory was asked for; documents are the rows of the batches.

    Attributes:
        weights: Sum of the softmax weights by slot, float64, shape (slots,).
        reads: How often a slot was among the k of a head, int64, shape (slots,).
        documents_reading: In how many documents a slot was read, int64, shape (slots,).
        documents: How many documents there were.
    """

    def __init__(self, slots: int) -> None:
        """Begin with nothing read."""
        self.weights = torch.zeros(slots, dtype=torch.float64)
        self.reads = torch.zeros(slots, dtype=torch.int64)
        self.documents_reading = torch.zeros(slots, dtype=torch.int64)
        self.documents = 0

    def add(self, slots: Tensor, weights: Tensor, attended: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            slots: Int64, shape (documents, …, reads).
            weights: The same shape.
            attended: Bool, shape (documents, positions): positions that count; None means all.
        """
        documents, reads = len(slots), slots.shape[-1]
        slots, weights = (item.cpu().reshape(documents, -1, reads) for item in (slots, weights))
        kept = torch.ones(slots.shape[:2], dtype=torch.bool) if attended is None else attended.cpu()
        read, size = slots[kept], len(self.reads)  # (positions, reads)
        self.weights.index_add_(0, read.flatten(), weights[kept].double().flatten())
        self.reads += torch.bincount(read.flatten(), minlength=size)
        numbers = torch.arange(documents)[:, None].expand(kept.shape)[kept]  # (positions,)
        pairs = (numbers[:, None] * size + read).unique()  # of document and slot
        self.documents_reading += torch.bincount(pairs % size, minlength=size)
        self.documents += int(kept.any(dim=1).sum())

    @property
    def share(self) -> float:
        """Share of the slots that were read, from 0 to 1."""
        return float(usage_share(self.weights))

    @property
    def divergence(self) -> float:
        """KL of the weights to even ones, in nats: 0 if all slots are read alike; NaN if nothing was read."""
        return float(usage_divergence(self.weights))


@contextmanager
def count_slot_usage(model: nn.Module) -> Iterator[dict[str, SlotUsage]]:
    """Count what every memory in a model is asked for inside the block; padded positions do not count.

    Padding is what a two-dimensional `attention_mask` of the model's forward pass leaves out. Run the model without
    gradients: gradient checkpointing would run, and count, its layers twice.

    Yields:
        By the memories' dotted paths, what was read so far.

    Raises:
        ModelError: The model has no memory of product keys.
    """
    memories = product_key_memories(model)
    if not memories:
        raise ModelError(f"{type(model).__name__} has no memory of product keys, whose slots could be counted")
    usages = {path: SlotUsage(memory.settings.slots) for path, memory in memories.items()}
    mask: list[Tensor | None] = [None]

    def note_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        mask[0] = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None

    def count(path: str, slots: Tensor, weights: Tensor) -> None:
        attended = mask[0]
        if attended is not None:  # it also covers the positions of the past
            attended = attended[:, -slots.shape[1] :]
        usages[path].add(slots, weights, attended)

    before = {path: memory.observer for path, memory in memories.items()}
    handle = model.register_forward_pre_hook(note_mask, with_kwargs=True)
    try:
        for path, memory in memories.items():
            memory.observer = lambda slots, weights, path=path: count(path, slots, weights)
        yield usages
    finally:
        handle.remove()
        for path, memory in memories.items():
            memory.observer = before[path]


def choose_slots(new: SlotUsage, background: SlotUsage, count: int) -> Tensor:
    """Return the slots that a text reads more than others do, by TF-IDF (Lin et al. 2025, arXiv:2510.15103).

    Args:
        new: Usage by the text that is to be learned.
        background: Usage by text that is to stay as it is, over documents.
        count: Slots at most.

    Returns:
        Slots, best first, int64, shape (at most count,): none that the new text does not read or all documents read.

    Raises:
        ConfigError: The count is below 1, nothing was read as background, or the two are of different memories.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; expected at least one slot")
    if len(new.reads) != len(background.reads):
        raise ConfigError(
            f"usages are of {len(new.reads):,} and {len(background.reads):,} slots; expected both of one memory"
        )
    if not background.documents:
        raise ConfigError("the background has no documents; run text that is to stay as it is through the model")
    scores = slot_tf_idf(new.reads, background.documents_reading, background.documents)
    best = scores.topk(min(count, len(scores)))
    return best.indices[best.values > 0]

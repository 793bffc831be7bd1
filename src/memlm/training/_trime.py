"""The loss of a model that is trained with its memory (TRIME, Zhong, Lei, Chen 2022, arXiv:2205.12674).

Memory and queries are of one batch and of one forward pass, so gradients reach both. The batch is that of any causal
LM, `input_ids` and `labels`, with three more fields a row: see `Segments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..errors import ConfigError
from ..models import find_key_site, forward_with_keys
from ._memories import LongTerm, Places, TrainingMemory, drops, visible

PLACES = ("segment", "document", "position")
IGNORED = -100
_CHUNK = 1 << 24  # similarities computed at once: all of up to 4,096 targets


class TargetLogProbs(NamedTuple):
    """log P of the targets of a batch, natural logs.

    Attributes:
        with_memory: Under one softmax over vocabulary and memory, float32, shape (n,).
        without_memory: Of the model alone, float32, shape (n,).
    """

    with_memory: Tensor
    without_memory: Tensor


@dataclass(frozen=True, kw_only=True)
class TrimeLoss:
    """Negative log likelihood of a batch under one softmax over vocabulary and memory (eq. 5 of the paper).

    Attributes:
        memories: What may be seen; an empty list is the plain loss.
        warmup: Share of the updates, at the start, that take the plain loss: keys must mean something first.
        temperature: Of the memory; 1 in the paper's training.
        seed: Of `External.drop_own`.
        key_site: See `memlm.models.find_key_site`.

    Raises:
        ConfigError: The share is not in [0, 1].

    Example:
        A training loop of one's own::

            loss_of = TrimeLoss(memories=[Local(), LongTerm()])
            for update, batch in enumerate(batches):
                loss_of(model, batch, update=update, updates=1000).backward()
    """

    memories: Sequence[TrainingMemory]
    warmup: float = 0.05
    temperature: float = 1.0
    seed: int = 0
    key_site: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup is {self.warmup}; expected a share of the updates, between 0 and 1")

    def __call__(
        self, model: Any, batch: Mapping[str, Tensor], *, update: int, updates: int, targets: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a batch, nats a target, a float32 scalar with gradients.

        Args:
            model: Any Hugging Face causal LM.
            batch: `input_ids` and `labels`, int64, shape (rows, length): as everywhere in transformers, a position is
                scored against the next one's label, and −100 is ignored. `segment`, `document` and `position` (of the
                row's first token in its document), int64, shape (rows,); without them a row is a segment and a document
                of its own. Anything else goes to the model.
            update: Number of this update, from 0.
            updates: How many there will be.
            targets: What to divide by, where gradients of several batches are added up; None means the targets of this
                batch.

        Returns:
            Zero, with gradients of zero, where the batch has no targets.

        Raises:
            ConfigError: `LongTerm` is asked for, but the batch does not say of which documents its rows are.
            ModelError: Keys cannot be read with gradients; see `forward_with_keys`.
        """
        if update < self.warmup * updates:
            log_probs = plain_log_probs(model, batch)
        else:
            log_probs = self._with_memory(self._forward(model, batch), (self.seed, update))
        return -log_probs.sum() / (max(1, len(log_probs)) if targets is None else targets)

    def log_probs(self, model: Any, batch: Mapping[str, Tensor], draw: tuple[int, int] | None = None) -> TargetLogProbs:
        """Return log P of the targets of a batch, with memory and without, from one forward pass.

        Args:
            model: As for the loss.
            batch: As for the loss.
            draw: Seed and number of the update; None, for evaluation, drops no memory.
        """
        found = self._forward(model, batch)
        size = _chunk_size(len(found.tokens))
        with torch.no_grad():
            parts = zip(found.logits.split(size), found.tokens.split(size), strict=True)
            without = torch.cat([_target_log_probs(logits, tokens) for logits, tokens in parts])
        return TargetLogProbs(self._with_memory(found, draw), without)

    def _forward(self, model: Any, batch: Mapping[str, Tensor]) -> _Found:
        """Run the model, and gather what belongs to the targets of the batch, in a row."""
        site = find_key_site(getattr(model, "module", model), self.key_site)
        output, keys = forward_with_keys(model, site, _inputs(batch))
        where, tokens = targets_of(batch)
        return _Found(at_targets(output.logits, where), at_targets(keys, where), tokens, self._places(batch, where))

    def _with_memory(self, found: _Found, draw: tuple[int, int] | None) -> Tensor:
        """Return log P of the targets, shape (n,), so many of them at a time as there is memory for.

        Where that makes several chunks, each is computed again for its gradients, and nothing of the size of all
        targets squared ever exists.
        """
        logits, keys, tokens, places = found
        dropped = drops(self.memories, places.segments, draw)

        def chunk(rows: slice, logits: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
            allowed = visible(
                self.memories, places.rows(rows), places, None if dropped is None else dropped[rows]
            )  # (chunk, n)
            similarities = ops.similarities(queries, keys)
            return ops.trime_log_probs(logits, similarities, allowed, tokens, tokens[rows], self.temperature)

        size = _chunk_size(len(tokens))
        if len(tokens) <= size:
            return chunk(slice(None), logits, keys, keys)
        rows = [slice(first, first + size) for first in range(0, len(tokens), size)]
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in it is random
        # split, not slices: the gradient of each slice would be a tensor of the size of all logits
        parts = zip(rows, logits.split(size), keys.split(size), strict=True)
        return torch.cat([checkpoint(chunk, some, ours, queries, keys, **options) for some, ours, queries in parts])

    def _places(self, batch: Mapping[str, Tensor], where: Tensor) -> Places:
        """Return where the targets stand that are numbered as in `targets_of`."""
        count, width = len(batch["labels"]), batch["labels"].shape[1] - 1
        if not all(name in batch for name in PLACES):
            if any(isinstance(memory, LongTerm) for memory in self.memories):
                raise ConfigError(
                    f"the batch has the fields {', '.join(batch)}; LongTerm needs {', '.join(PLACES)}, too: make the "
                    "dataset by consecutive_segments"
                )
            numbers = torch.arange(count, device=where.device)
            segment, document, position = numbers, numbers, torch.zeros_like(numbers)
        else:
            segment, document, position = (batch[name] for name in PLACES)
        row = where // width
        return Places(segment[row], document[row], position[row] + where % width)


class _Found(NamedTuple):
    """What a forward pass says about n targets: logits (n, vocabulary), keys (n, key width), tokens (n,), places."""

    logits: Tensor
    keys: Tensor
    tokens: Tensor
    places: Places


def plain_log_probs(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return log p_LM of the targets of a batch, float32, shape (n,); arguments as for `TrimeLoss`."""
    output = model(**({"use_cache": False, "return_dict": True} | _inputs(batch)))
    where, tokens = targets_of(batch)
    return _target_log_probs(at_targets(output.logits, where), tokens)


def _target_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="none")


def _chunk_size(targets: int) -> int:
    return max(1, _CHUNK // max(1, targets))


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in ("labels", *PLACES)}


def targets_of(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the positions that have a target, and the targets, both int64, shape (n,).

    Positions are counted through the rows without their last ones. A device is waited for here, and nowhere else: how
    many there are decides the shapes of all that follows.
    """
    following = batch["labels"][:, 1:].reshape(-1)
    where = (following != IGNORED).nonzero().squeeze(1)
    return where, following[where]


def at_targets(values: Tensor, where: Tensor) -> Tensor:
    """Return what stands at positions as `targets_of` counts them, shape (n, …), of values (rows, length, …)."""
    length = values.shape[1]
    return values.flatten(0, 1).index_select(0, where + where // (length - 1))

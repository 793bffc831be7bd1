"""A retrieval pass over held-out text, in the form in which every kind of mixture is fitted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..evidence import Evidence, Found
from ._mixture import Mixture

_BLOCK = 2048  # targets looked at together


@dataclass(frozen=True)
class HeldOut:
    """What is known of n targets of held-out text.

    Attributes:
        targets: Int64, shape (n,).
        lm_log_probs: log p_LM of the targets, float32, shape (n,).
        evidence: Of the targets.
        groups: What cross-validation keeps together (a document, a block), int64, shape (n,).
        statistics: Of the datastore's tokens, shape (vocabulary, 2); see `Datastore.statistics`.
    """

    targets: Tensor
    lm_log_probs: Tensor
    evidence: Evidence
    groups: npt.NDArray[np.int64]
    statistics: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> HeldOut:
        """Return some of the targets: a mask, or numbers."""
        chosen = torch.from_numpy(rows)
        evidence, groups = self.evidence.rows(chosen), self.groups[rows]
        return HeldOut(self.targets[chosen], self.lm_log_probs[chosen], evidence, groups, self.statistics)

    def memory(self, place: int) -> HeldOut:
        """Return the same targets with one of the memories alone."""
        evidence = self.evidence._replace(memories=(self.evidence.memories[place],))
        return replace(self, evidence=evidence)

    def blocks(self, ks: Sequence[int]) -> Iterator[HeldOut]:
        """Yield a few targets at a time, in order, with so many neighbors of each memory."""
        evidence = self.evidence.nearest(ks)
        for start in range(0, len(self), _BLOCK):
            rows = slice(start, start + _BLOCK)
            part = evidence.rows(rows)
            yield HeldOut(self.targets[rows], self.lm_log_probs[rows], part, self.groups[rows], self.statistics)

    def log_probs(self, mixture: Mixture) -> Tensor:
        """Return the mixture's log probability of every target, float64, shape (n,)."""
        blocks = self.blocks(mixture.ks)
        return torch.cat(
            [mixture.target_log_probs(part.lm_log_probs, part.targets, part.evidence).double() for part in blocks]
        )

    def ratio(self, memory: Tensor) -> Tensor:
        """Return p / p_LM of every target for the memory's probabilities p, float64, shape (n,); 10³⁰ at most."""
        return (memory.double() / self.lm_log_probs.double().exp().clamp_min(1e-300)).clamp_max(1e30)


def perplexity(nats: float) -> float:
    """Return e to the nats a token; +inf where that is more than a float holds."""
    return math.exp(nats) if nats < 709 else math.inf


def spread(n: int, most: int) -> npt.NDArray[np.int64]:
    """Return the numbers of at most so many of n targets, evenly spread."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.int64)


def memory_probabilities(found: Found, targets: Tensor, ks: list[int], temperature: float) -> Tensor:
    """Return p_kNN of every target for several k, rising, float64, shape (n, number of ks).

    Neighbors come nearest first.
    """
    result = []
    stretches = list(pairwise([0, *ks]))

    def up_to(each: Tensor) -> Tensor:
        return torch.stack([each[:, start:stop].sum(dim=1) for start, stop in stretches], dim=1).double().cumsum(dim=1)

    for start in range(0, len(targets), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distances = found.distances[rows]
        scores = (distances[:, :1] - distances) / temperature
        scores = scores if found.log_counts is None else scores + found.log_counts[rows]
        scores = scores.exp().masked_fill(~found.present[rows], 0.0)
        matching = scores * (found.tokens[rows] == targets[rows, None])
        result.append(up_to(matching) / up_to(scores).clamp_min(1e-300))
    return torch.cat(result)

"""Fitting a kNN-Adapter by the mixture's likelihood."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._adapter import AdapterMixture, corrections
from ._features import features
from ._fixed import KnnMixture
from ._heldout import HeldOut
from ._network import Network
from ._train import train

_WIDTHS = (32, 24, 3)
_SINGLE, _GROWTH = 16, 1.3  # neighbors that stay alone in training, and by how much groups grow after them
_BLOCK = 2048


class Condensed(NamedTuple):
    """Neighbors of n targets in g groups of about equal distance, so that an epoch takes a fraction of a second.

    Attributes:
        beyond: (d − d₁) / T, the mean of a group, shape (n, g).
        counts: log of the entries that these stand for, shape (n, g); −inf for none.
        beyond_right: The mean over those that carry the target, shape (n, g).
        counts_right: log of their number, shape (n, g); −inf for none.
    """

    beyond: Tensor
    counts: Tensor
    beyond_right: Tensor
    counts_right: Tensor

    def ratio(self, sharpness: Tensor, tail: Tensor, rows: Tensor) -> Tensor:
        """Return log p_kNN of the targets for some corrections, shape (len(rows),)."""

        def total(beyond: Tensor, counts: Tensor) -> Tensor:
            scores = counts[rows] - sharpness[:, None] * beyond[rows] - tail[:, None] * beyond[rows].log1p()
            # −1e9 in the place of −inf: a logsumexp over nothing has no gradient
            return scores.clamp_min(-1e9).logsumexp(dim=1)

        return total(self.beyond_right, self.counts_right) - total(self.beyond, self.counts)


def condense(held: HeldOut, temperature: float, k: int) -> Condensed:
    """Group neighbors, which come nearest first, by rank."""
    found = held.evidence.memories[0].nearest(k)
    width = found.tokens.shape[1]
    edges = list(range(min(_SINGLE, width) + 1))
    while edges[-1] < width:
        edges.append(min(width, max(edges[-1] + 1, int(edges[-1] * _GROWTH))))
    group = torch.zeros(width, dtype=torch.long)
    for place, edge in enumerate(edges[1:-1]):
        group[edge:] = place + 1
    one_hot = torch.nn.functional.one_hot(group, len(edges) - 1).float()  # (k, g)
    parts = []
    for start in range(0, len(held), _BLOCK):
        rows = slice(start, start + _BLOCK)
        counts = found.present[rows].float()  # (rows, k): entries that a neighbor stands for
        counts = counts if found.log_counts is None else counts * found.log_counts[rows].exp()
        distances = found.distances[rows].masked_fill(~found.present[rows], torch.inf)
        nearest = distances.amin(dim=1, keepdim=True)
        beyond = ((distances - nearest) / temperature).masked_fill(~found.present[rows], 0.0)
        right = counts * (found.tokens[rows] == held.targets[rows, None])
        columns = []
        for weights in (counts, right):
            number = weights @ one_hot
            columns += [(beyond * weights) @ one_hot / number.clamp_min(1), number.log()]
        parts.append(columns)
    return Condensed(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def fit_adapter(held: HeldOut, base: KnnMixture, seed: int = 0) -> AdapterMixture:
    """Train the network on held-out text, from the best fixed mixture on.

    Args:
        held: Evidence of one datastore, with beliefs.
        base: The best fixed mixture.
        seed: Of the network's start and of the order of targets.
    """
    found = held.evidence.memories[0]
    some = found.present.any(dim=1).numpy()
    held = held if some.all() else held.rows(some)
    weight = float(np.clip(base.interpolation_weight, 0.01, 0.99))
    shared = {"temperature": base.temperature, "k": base.k, "interpolation_weight": weight}
    parts = (part.evidence for part in held.blocks([base.k]))  # of many targets at once it takes twice as long
    inputs = torch.cat([features(part.memories[0], part.belief, base.temperature, base.k) for part in parts])
    network = Network.new(inputs, _WIDTHS, seed)
    condensed = condense(held, base.temperature, base.k)

    def losses(said: Tensor, rows: Tensor) -> Tensor:
        weights, sharpness, tail = corrections(said, weight)
        memory = condensed.ratio(sharpness, tail, rows)
        return -torch.logaddexp(memory + weights.log(), held.lm_log_probs[rows] + torch.log1p(-weights))

    return AdapterMixture(network=train(network, inputs, losses, held.groups, seed=seed), **shared)

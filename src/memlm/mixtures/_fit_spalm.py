"""Fitting a gate over the state of a frozen model to held-out text, by the likelihood of the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ._features import features
from ._fixed import KnnMixture
from ._heldout import HeldOut
from ._network import Network
from ._spalm import FIRST_GATE, SpalmMixture, SteeredMixture, first_size, state_of, steered
from ._train import train

_WIDTHS = (32, 24, 1)
STATE_NEIGHBORS = 4  # as in the paper
_UPDATES, _EPOCHS, _BATCH, _RATE = 800, 10, 512, 3e-3


def fit_steered(held: HeldOut, base: KnnMixture, seed: int = 0) -> SteeredMixture:
    """Train the network on held-out text.

    Args:
        held: Evidence of one datastore, with beliefs, hidden states and their layer.
        base: The best fixed mixture; of its k neighbors the first are taken, four at most.
        seed: Of the network's start and of the order of targets.
    """
    held, k = _with_neighbors(held, base)
    weight = float(np.clip(base.interpolation_weight, 0.01, 0.99))
    blocks = (part.evidence for part in held.blocks([k]))
    inputs = torch.cat([features(part.memories[0], part.belief, base.temperature, k) for part in blocks])

    def losses(said: Tensor, rows: Tensor) -> Tensor:
        some = held.evidence.rows(rows)
        assert some.output is not None
        state = steered(said, some, weight, base.temperature)
        return torch.nn.functional.cross_entropy(some.output.logits(state), held.targets[rows], reduction="none")

    network = train(
        Network.new(inputs, _WIDTHS, seed), inputs, losses, held.groups, updates=_UPDATES, batch=_BATCH, seed=seed
    )
    return SteeredMixture(interpolation_weight=weight, temperature=base.temperature, network=network, k=k)


def fit_spalm(held: HeldOut, base: KnnMixture, seed: int = 0, *, gates: int = 1) -> SpalmMixture:
    """Train the paper's gate and the size of m on held-out text.

    Args:
        held: Evidence of one datastore, with beliefs, hidden states and their layer.
        base: The best fixed mixture; of its k neighbors the first are taken, four at most.
        seed: Of the order of targets.
        gates: 1 for one a state, or the width of a state for one a dimension.
    """
    held, k = _with_neighbors(held, base)
    hidden, layer = state_of(held.evidence)
    found = held.evidence.memories[0]
    mean, scale = hidden.mean(dim=0), hidden.std(dim=0).mean().clamp_min(1e-6)
    gate = torch.zeros(gates, hidden.shape[1], requires_grad=True)  # of (h - mean) / scale
    bias = torch.full((gates,), FIRST_GATE, requires_grad=True)
    size = torch.tensor(math.log(first_size(layer.weight)), requires_grad=True)  # its log

    def losses(rows: Tensor) -> Tensor:
        states, present = hidden[rows], found.present[rows]
        open_to = torch.nn.functional.linear((states - mean) / scale, gate, bias).sigmoid()
        counts = None if found.log_counts is None else found.log_counts[rows]
        memory, _ = ops.spalm_memory(states, layer.weight[found.tokens[rows]], present, counts)
        state = ops.spalm_state(states, size.exp() * memory, open_to, present)
        return torch.nn.functional.cross_entropy(layer.logits(state), held.targets[rows], reduction="none")

    settings = [
        {"params": [gate], "lr": _RATE / math.sqrt(gates), "weight_decay": 1e-2},
        {"params": [bias, size], "lr": 5 * _RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(settings)
    steps = min(_UPDATES, _EPOCHS * -(-len(held) // _BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        order = order if len(order) else torch.randperm(len(held), generator=generator)
        optimizer.zero_grad()
        losses(order[:_BATCH]).mean().backward()
        optimizer.step()
        schedule.step()
        order = order[_BATCH:]
    folded = gate.detach() / scale
    return SpalmMixture(gate=folded, gate_bias=bias.detach() - folded @ mean, size=float(size.detach().exp()), k=k)


def _with_neighbors(held: HeldOut, base: KnnMixture) -> tuple[HeldOut, int]:
    """Return the targets for which something was found, with few neighbors each, and how many."""
    state_of(held.evidence)
    k = min(STATE_NEIGHBORS, base.k)
    held = HeldOut(held.targets, held.lm_log_probs, held.evidence.nearest([k]), held.groups, held.statistics)
    some = held.evidence.memories[0].present.any(dim=1).numpy()
    if not some.any():
        raise ConfigError(
            "no target has a neighbor, so there is nothing to fit a gate to; pass text that is not stored"
        )
    return (held if some.all() else held.rows(some)), k

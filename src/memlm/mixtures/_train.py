"""Training a small network by the mixture's likelihood."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._network import Network

_HELD = 8  # one group in so many, and one at least, chooses when to stop


def train(
    network: Network,
    features: Tensor,
    losses: Callable[[Tensor, Tensor], Tensor],
    groups: npt.NDArray[np.int64],
    *,
    epochs: int = 30,
    updates: int = 2000,
    batch: int = 512,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    dropout: float = 0.0,
    seed: int = 0,
) -> Network:
    """Minimize the mean of a loss by AdamW, and return the network of the epoch that was best on groups left out;
    that may be the one to start from.

    Args:
        network: To start from; it is not changed.
        features: float32, shape (n, features).
        losses: From what the network says of some targets, shape (m, outputs), and their numbers, int64, shape (m,), to
            a loss for each, shape (m,).
        groups: What is left out together, int64, shape (n,); a single group loses its last targets.
        epochs: Passes over the targets, at most.
        updates: Steps after which an epoch is the last: many targets need fewer passes.
        batch: Targets a step.
        learning_rate: At the start; it falls to zero along a half cosine.
        weight_decay: Of AdamW, on the weights.
        dropout: Share of hidden states that are left out of a step.
        seed: Of the order, and of what is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = network.standardized(features)
    parameters = [part.clone().requires_grad_() for layer in network.layers for part in layer]

    def current(values: list[Tensor]) -> Network:
        pairs = zip(values[::2], values[1::2], strict=True)
        return Network(network.mean, network.scale, [(weight.detach(), bias.detach()) for weight, bias in pairs])

    def say(rows: Tensor, dropout: float = 0.0) -> Tensor:
        state = inputs[rows]
        for place in range(0, len(parameters), 2):
            state = torch.nn.functional.linear(state, parameters[place], parameters[place + 1])
            if place + 2 < len(parameters):
                state = state.tanh()
                if dropout:
                    state = state * (torch.rand(state.shape, generator=generator) >= dropout) / (1 - dropout)
        return state

    held = _left_out(groups)
    fitted, judged = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~held, held))
    settings = [
        {"params": parameters[::2], "weight_decay": weight_decay},
        {"params": parameters[1::2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(settings, lr=learning_rate, fused=True)  # small tensors: calls cost most
    steps = max(1, -(-len(fitted) // batch))
    epochs = min(epochs, -(-updates // steps))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    best, best_loss = current(parameters), np.inf
    for epoch in range(epochs + 1):
        batches = fitted[torch.randperm(len(fitted), generator=generator)].split(batch) if epoch else ()
        for rows in batches:
            optimizer.zero_grad()
            losses(say(rows, dropout), rows).mean().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            loss = float(losses(say(judged), judged).mean()) if len(judged) else -np.inf
        if loss < best_loss or not len(judged):
            best, best_loss = current([part.clone() for part in parameters]), loss
    return best


def _left_out(groups: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which targets choose when to stop, bool, shape (n,); none of fewer than `_HELD` targets."""
    names, place = np.unique(groups, return_inverse=True)
    if len(names) > 1:
        every = min(_HELD, len(names))
        return place % every == every - 1
    return np.arange(len(groups)) >= len(groups) - len(groups) // _HELD

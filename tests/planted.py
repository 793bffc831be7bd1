"""Beliefs, networks and held-out passes for tests of mixtures; what is right in a pass is known."""

from __future__ import annotations

import numpy as np
import torch

from memlm.evidence import Belief, Evidence, Found
from memlm.mixtures import HeldOut
from memlm.mixtures._network import Network

KEY_WIDTH = 3


def belief(lm, seed=0, shift=0.0):
    """Return what a model thinks whose logits are `lm` + shift, shape (n, vocabulary)."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(len(lm), KEY_WIDTH, generator=generator)
    return Belief.from_logits(lm + shift, keys, torch.randint(lm.shape[1], (len(lm),), generator=generator))


def network(inputs, outputs, seed=0, size=0.5):
    """Return a random network of one hidden layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return size * torch.randn(*shape, generator=generator)

    layers = [(draw(8, inputs), draw(8)), (2 * draw(outputs, 8), draw(outputs))]
    return Network(draw(inputs), torch.ones(inputs) + draw(inputs).abs(), layers)


def memory(tokens, distances):
    """Return neighbors that are all present."""
    return Found(distances, tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens))


def rising(first, k, generator):
    """Return distances of k neighbors that begin at `first`, shape (n,), and rise by up to 1."""
    more = torch.rand(len(first), k - 1, generator=generator).sort(dim=1).values
    return torch.cat([first[:, None], first[:, None] + more], dim=1)


def indifferent(n, vocabulary=50):
    """Return the beliefs of a model that knows nothing, about n targets."""
    return belief(torch.zeros(n, vocabulary))


def held_out(targets, lm, memories, belief=None, statistics=None):
    """Return a pass in groups of a hundred targets."""
    return HeldOut(targets, lm, Evidence(tuple(memories), belief), np.arange(len(targets)) // 100, statistics)


def shuffled_weights(held, mixture, log_probs):
    """Return the mean log p of a mixture of one memory whose λ go to other targets; `log_probs` are the memory's."""
    weights = mixture.mix(held.evidence).weights[:, 0]
    weights = weights[torch.randperm(len(weights), generator=torch.Generator().manual_seed(0))].double()
    mixed = weights * log_probs.double().exp() + (1 - weights) * held.lm_log_probs.double().exp()
    return float(mixed.log().mean())

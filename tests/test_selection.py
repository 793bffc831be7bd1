"""What is chosen on held-out text is judged on targets that it was not fitted to: noise must not be taken for skill."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from memlm import KnnMixture
from memlm.mixtures import _families, choose, fit
from memlm.mixtures._fit_learned import fit_learned
from planted import held_out, indifferent, memory, rising

WIDTH = 300  # numbers in a key: enough to know every target by heart
BASE = KnnMixture(interpolation_weight=0.5, temperature=1.0, k=4)


@pytest.fixture(scope="module")
def noise():
    """The memory is right in half of the targets, and nothing that is known tells which; a group for each fold."""
    n, generator = 1500, torch.Generator().manual_seed(0)
    targets = torch.randint(50, (n,), generator=generator)
    right = torch.rand(n, generator=generator) < 0.5
    tokens = (targets[:, None] + torch.where(right, 0, 1)[:, None]).repeat(1, 4) % 50
    found = memory(tokens, rising(1 + torch.rand(n, generator=generator), 4, generator))
    thinks = indifferent(n)._replace(keys=torch.randn(n, WIDTH, generator=generator))
    held = held_out(targets, torch.full((n,), 0.1).log(), [found], thinks, torch.zeros(50, 2))
    return dataclasses.replace(held, groups=np.arange(n) // (n // 5))


def test_a_network_that_knows_its_targets_by_heart_is_not_chosen(noise, monkeypatch):
    monkeypatch.setattr(_families, "CURVES", {"knn": _families.CURVES["knn"]})  # the others take long, and say the same
    monkeypatch.setattr(_families, "NETWORKS", {"learned": partial(fit_learned, tolerance=0.0)})
    scores = {kind: float(noise.log_probs(fit(kind, noise, BASE)).mean()) for kind in ("knn", "learned")}
    assert scores["learned"] > scores["knn"] + 0.01, "nothing was learned by heart"
    assert choose(noise, BASE) == "knn"


def test_searches_are_not_skipped_for_what_a_network_knows_by_heart(noise):
    """A search helps as much as any other, and skipping a twentieth of them costs more than it may."""
    mixture = fit_learned(noise, BASE)
    weight, right = mixture.predicted(noise.evidence.belief), noise.evidence.memories[0].tokens[:, 0] == noise.targets
    assert weight[right].mean() > weight[~right].mean() + 0.1, "nothing was learned by heart"
    assert not mixture.skips

"""Does λ of a continuous cache gain from distance, as a datastore's does? Fitted to one text, judged on another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memlm import ops
from memlm.mixtures import CacheMixture, HeldOut, best_weight, fit_cache, memory_likelihoods
from memlm.mixtures._fit import choose_buckets, fit_buckets, fit_exponential, gain


def by_distance(valid: HeldOut, test: HeldOut) -> dict[str, float]:
    """Return the perplexity of one cache with λ set in several ways; both texts hold evidence of the cache alone.

    θ is that of the best constant λ throughout. The distance of a target is what its largest inner product lacks to the
    largest of the text that is fitted to, in nats after θ. *Age* is the drop-off exp(−age / τ), with θ and λ fitted along.
    """
    base = fit_cache(valid, forgets=False)
    aged = fit_cache(valid, forgets=True)
    farthest = float((-_nearest(valid)).max())
    sides = [(_ratio(base, held), (_nearest(held) + farthest).clamp_min(0) * base.scale) for held in (valid, test)]
    (ratio, distances), (test_ratio, test_distances) = sides
    some = distances.isfinite()
    ratio, distances = ratio[some], distances[some]
    buckets = choose_buckets(ratio, distances, valid.groups[some.numpy()])
    edges, weights = fit_buckets(ratio, distances, buckets)
    scale, length = fit_exponential(ratio, distances)
    found = test_distances.isfinite()
    near = test_distances.masked_fill(~found, 0.0).float()
    ways = {
        "one λ": torch.full_like(near, best_weight(ratio)),
        "buckets": ops.bucket_weight(near, torch.tensor(edges), torch.tensor(weights)),
        "exponential": ops.exponential_weight(near, scale, length),
    }
    shuffled = torch.randperm(len(near), generator=torch.Generator().manual_seed(0))
    rows = {"lm": _perplexity(test.lm_log_probs)}
    for name, weight in ways.items():
        rows[name] = _perplexity(test.lm_log_probs + gain(test_ratio, (weight * found).double()))
        if name != "one λ":
            other = (weight[shuffled] * found).double()
            rows[f"{name}, λ shuffled"] = _perplexity(test.lm_log_probs + gain(test_ratio, other))
    rows["age"] = _perplexity(test.log_probs(aged))
    return rows | {"number of buckets": buckets, "age τ": 1 / aged.forgetting if aged.forgetting else math.inf}


def _ratio(cache: CacheMixture, held: HeldOut) -> Tensor:
    """Return p_cache / p_LM of every target, float64, shape (n,)."""
    parts = []
    for part in held.blocks(cache.ks):
        mix = cache.mix(part.evidence)
        parts.append(memory_likelihoods(mix.log_shares, part.evidence, part.targets)[:, 0])
    return held.ratio(torch.cat(parts))


def _nearest(held: HeldOut) -> Tensor:
    """Return the negative of every target's largest inner product, float64, shape (n,); ∞ where the cache is empty."""
    found = held.evidence.memories[0]
    return found.distances.masked_fill(~found.present, torch.inf).amin(dim=1).double()


def _perplexity(log_probs: Tensor) -> float:
    return math.exp(-float(log_probs.double().mean()))

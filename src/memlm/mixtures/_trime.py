"""TRIME: one softmax over the vocabulary, a cache and a datastore (Zhong, Lei, Chen 2022, arXiv:2205.12674)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ..errors import ConfigError
from ..evidence import INNER_PRODUCT, Evidence
from ._cache import known_normalizer, log_shares, past
from ._mixture import CACHE, Mix, Mixture, check_count, check_number, check_positive, check_weight


@dataclass(frozen=True, kw_only=True)
class TrimeMixture(Mixture):
    """P(w) ∝ exp(E_w·h) + Σ exp(q·k / (√d T) − age / τ) over the entries with value w of all memories.

    The paper's local and long-term memory are one `Cache`, of any length: the earlier tokens of the document, each
    once. Its external memory is a datastore built with metric="inner_product", of which the k nearest entries count.
    With both, the datastore comes first in the list of memories.

    The memories hold at most 1 − 10⁻⁴ of the softmax, so that what they lack stays possible however similar they are;
    the paper has no such limit.

    Attributes:
        temperature: T, positive; 1 in training. It divides the similarities and leaves the vocabulary alone.
        forgetting: 1 / τ of the cache, not negative; 0, as in the paper, forgets nothing.
        length: Tokens of the past looked at; 0 for no cache.
        k: Neighbors asked of the datastore; 0 for none.
        interpolation_weight: λ' in [0, 1] of the second interpolation P_final = (1 − λ') P + λ' P', with P' the softmax
            over the datastore's neighbors alone; 0 leaves it out.
        interpolation_temperature: τ', which divides similarities in P'; positive.

    Raises:
        ConfigError: A value is out of its range, or there is no memory.
    """

    kind: ClassVar[str] = "trime"
    needs_belief: ClassVar[bool] = True
    temperature: float
    forgetting: float = 0.0
    length: int = 0
    k: int = 0
    interpolation_weight: float = 0.0
    interpolation_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_positive("interpolation_temperature", self.interpolation_temperature)
        check_weight(self.interpolation_weight)
        check_number("forgetting", self.forgetting)
        if self.forgetting < 0:
            raise ConfigError(f"forgetting is {self.forgetting}; expected a number of at least 0")
        for name in ("length", "k"):
            if getattr(self, name) is False or getattr(self, name) != 0:
                check_count(name, getattr(self, name))
        if not self.length and not self.k:
            raise ConfigError("length and k are 0; expected a cache of some length, or k neighbors of a datastore")
        if self.interpolation_weight and not self.k:
            raise ConfigError(
                f"interpolation_weight is {self.interpolation_weight}, but k is 0; the second interpolation is with a "
                "datastore"
            )

    @property
    def ks(self) -> tuple[int, ...]:
        """See `Mixture.ks`."""
        return tuple(size for size in (self.k, self.length) if size)

    @property
    def expects(self) -> tuple[str, ...]:
        """See `Mixture.expects`."""
        return tuple(kind for kind, size in ((INNER_PRODUCT, self.k), (CACHE, self.length)) if size)

    def mix(self, evidence: Evidence) -> Mix:
        """See `Mixture.mix`."""
        normalizer = known_normalizer(evidence.belief)
        assert evidence.belief is not None
        width = evidence.belief.keys.shape[1]
        masses, shares = [], []
        for kind, found in zip(self.expects, evidence.nearest(self.ks).memories, strict=True):
            if (kind == CACHE) != (found.ages is not None):
                raise ConfigError("a TRIME mixture was given memories of other kinds; pass the datastore, then a Cache")
            scores = ops.scaled_similarities(
                -found.distances,
                found.present,
                width,
                self.temperature,
                found.ages,
                self.forgetting,
                found.log_counts,
            )
            some = found.present.any(dim=1, keepdim=True)
            masses.append(scores.logsumexp(dim=1).masked_fill(~some[:, 0], -torch.inf))
            shares.append(log_shares(scores, some))
        weights = ops.shared_softmax_weights(torch.stack(masses, dim=1), normalizer)
        if self.interpolation_weight:
            found = evidence.memories[0].nearest(self.k)
            some = found.present.any(dim=1, keepdim=True)
            temperature, counts = self.interpolation_temperature, found.log_counts
            scores = ops.scaled_similarities(-found.distances, found.present, width, temperature, log_counts=counts)
            again, again_weight = log_shares(scores, some), self.interpolation_weight * some[:, 0].to(weights.dtype)
            weights, shares[0] = ops.second_interpolation(weights, shares[0], 0, again, again_weight)
        return Mix(ops.capped(weights), tuple(shares))

    def describe(self) -> str:
        """See `Mixture.describe`."""
        parts = [f"one softmax, temperature {self.temperature:.3g}"]
        if self.k:
            parts.append(f"k {self.k:,}")
        if self.length:
            parts.append(past(self.length, self.forgetting))
        if self.interpolation_weight:
            parts.append(f"again λ {self.interpolation_weight:.3f} at temperature {self.interpolation_temperature:.3g}")
        return ", ".join(parts)

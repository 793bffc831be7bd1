"""Mixtures with a cache of the recent past: linear, and by one softmax (Grave et al. 2017, arXiv:1612.04426)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..evidence import Belief, Evidence
from ._mixture import CACHE, Mix, Mixture, check_count, check_number, check_weight


@dataclass(frozen=True, kw_only=True)
class _CacheMixture(Mixture):
    """What both forms share: p_cache ∝ Σ exp(θ hᵀhᵢ − age / τ) over the last `length` tokens.

    Attributes:
        scale: θ, not negative.
        forgetting: 1 / τ, not negative; 0 forgets nothing.
        length: Tokens of the past looked at; the `Cache` must remember as many.
    """

    scale: float
    forgetting: float = 0.0
    length: int = 1024

    def __post_init__(self) -> None:
        for name in ("scale", "forgetting"):
            value = getattr(self, name)
            check_number(name, value)
            if value < 0:
                raise ConfigError(f"{name} is {value}; expected a number of at least 0; `memlm compare` finds one")
        check_count("length", self.length)

    @property
    def ks(self) -> tuple[int, ...]:
        """See `Mixture.ks`."""
        return (self.length,)

    @property
    def expects(self) -> tuple[str, ...]:
        """See `Mixture.expects`."""
        return (CACHE,)

    def _scores(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Return the score of every entry looked at, shape (n, length), and whether there is any, bool, (n, 1)."""
        found = evidence.memories[0].nearest(self.length)
        if found.ages is None:
            raise ConfigError("a cache mixture was given a datastore; pass a Cache")
        scores = ops.cache_scores(-found.distances, found.present, found.ages, self.scale, self.forgetting)
        return scores, found.present.any(dim=1, keepdim=True)

    def _past(self) -> str:
        return f"θ {self.scale:.3g}, {past(self.length, self.forgetting)}"


@dataclass(frozen=True, kw_only=True)
class CacheMixture(_CacheMixture):
    """p = λ p_cache + (1 − λ) p_LM, the linear form (eq. 4).

    Attributes:
        interpolation_weight: λ in [0, 1].

    Raises:
        ConfigError: A value is out of its range.
    """

    kind: ClassVar[str] = "cache"
    interpolation_weight: float

    def __post_init__(self) -> None:
        check_weight(self.interpolation_weight)
        _CacheMixture.__post_init__(self)

    def mix(self, evidence: Evidence) -> Mix:
        """See `Mixture.mix`."""
        scores, some = self._scores(evidence)
        return Mix(self.interpolation_weight * some, (log_shares(scores, some),))

    def describe(self) -> str:
        """See `Mixture.describe`."""
        return f"λ {self.interpolation_weight:.3f}, {self._past()}"


@dataclass(frozen=True, kw_only=True)
class SharedCacheMixture(_CacheMixture):
    """One softmax over vocabulary and cache (eq. 5): the more the past resembles the present, the heavier it weighs.

    Its λ is at most 1 − 10⁻⁴, as with every λ that is computed: what the cache lacks stays possible.

    Attributes:
        bias: α.

    Raises:
        ConfigError: A value is out of its range.
    """

    kind: ClassVar[str] = "shared-cache"
    needs_belief: ClassVar[bool] = True
    bias: float

    def __post_init__(self) -> None:
        check_number("bias", self.bias)
        _CacheMixture.__post_init__(self)

    def mix(self, evidence: Evidence) -> Mix:
        """See `Mixture.mix`."""
        normalizer = known_normalizer(evidence.belief)
        scores, some = self._scores(evidence)
        mass = scores.logsumexp(dim=1).masked_fill(~some[:, 0], -torch.inf)
        weight = ops.shared_softmax_weight(mass, normalizer, self.bias)
        return Mix(weight[:, None], (log_shares(scores, some),))

    def describe(self) -> str:
        """See `Mixture.describe`."""
        return f"one softmax, α {self.bias:.3g}, {self._past()}"


def past(length: int, forgetting: float) -> str:
    """Say which past is looked at, and how fast it is forgotten."""
    tokens = "the last token" if length == 1 else f"last {length:,} tokens"
    age = 1 / forgetting if forgetting else 0.0
    return f"{tokens}, forgetting in {f'{age:,.0f}' if age >= 10 else f'{age:.2g}'} tokens" if age else tokens


def known_normalizer(belief: Belief | None) -> Tensor:
    """Return logsumexp of the model's logits, float32, shape (n,).

    Raises:
        ConfigError: Beliefs are missing, or are those of a black box, which shows probabilities alone.
    """
    if belief is None:
        raise ConfigError("one softmax needs the normalizer of the model's logits; retrieve with beliefs=True")
    if bool(belief.normalizer.isnan().any()):
        raise ConfigError(
            "one softmax needs the normalizer of the model's logits, which a black box does not tell; use the linear "
            "form of the cache"
        )
    return belief.normalizer


def log_shares(scores: Tensor, some: Tensor) -> Tensor:
    """Return log softmax of scores (n, k); a row of −inf where there is nothing, `some` (n, 1) being False."""
    return scores.masked_fill(~some, 0.0).log_softmax(dim=-1).masked_fill(scores.isinf(), -torch.inf)

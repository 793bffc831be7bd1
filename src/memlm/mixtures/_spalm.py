"""SPALM: neighbors change the model's last state instead of its distribution (Yogatama et al. 2021, arXiv:2102.02557).

Two gates. `SpalmMixture` is the paper's: it sees the state alone. `SteeredMixture` is ours, for a model that was not
trained with it: it sees how near the neighbors are and how likely the model holds their tokens, too.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..evidence import SQUARED_L2, Evidence, OutputEmbedding
from ._features import features, names
from ._mixture import Mix, Mixture, check_count, check_positive, check_weight, knn_log_shares
from ._network import Network

_LOGITS = 1 << 25  # bytes of float32 logits alive at once
FIRST_GATE = 3.0  # logit of g where training begins: the model alone, nearly
_FIRST_STEP = 40.0  # nats by which memory alone would then raise its token: at the first gate it is 2


@dataclass(frozen=True, kw_only=True)
class StateMixture(Mixture):
    """p = softmax(W z + b) with a state z that neighbors have changed; the model's p where there are none."""

    needs_belief: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True
    k: int = 4

    @property
    def ks(self) -> tuple[int, ...]:
        """See `Mixture.ks`."""
        return (self.k,)

    @property
    def expects(self) -> tuple[str, ...]:
        """See `Mixture.expects`."""
        return (SQUARED_L2,)

    @abstractmethod
    def state(self, evidence: Evidence) -> Tensor:
        """Return z, float32, shape (n, width); h in rows without neighbors."""

    def target_log_probs(self, lm_log_probs: Tensor, targets: Tensor, evidence: Evidence) -> Tensor:
        """See `Mixture.target_log_probs`."""
        layer = state_of(evidence)[1]
        parts, block = [], max(1, _LOGITS // (4 * len(layer.weight)))
        for rows in torch.arange(len(targets)).split(block):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            some = evidence.rows(part).nearest(self.ks)
            log_probs = layer.logits(self.state(some)).log_softmax(dim=1)
            found = log_probs.gather(1, targets[part, None])[:, 0]
            # the model's own, not what is computed once more of its states, perhaps rounded another way
            parts.append(torch.where(_any(some), found, lm_log_probs[part]))
        return torch.cat(parts) if parts else lm_log_probs

    def log_probs(self, lm_log_probs: Tensor, evidence: Evidence) -> Tensor:
        """See `Mixture.log_probs`."""
        evidence = evidence.nearest(self.ks)
        changed = state_of(evidence)[1].logits(self.state(evidence)).log_softmax(dim=1)
        return torch.where(_any(evidence)[:, None], changed, lm_log_probs)


@dataclass(frozen=True, kw_only=True, eq=False)
class SpalmMixture(StateMixture):
    """z = (1 − g) ⊙ s m + g ⊙ h with g = σ(G h + c), the paper's gate; m mixes the embeddings of the next tokens.

    Attributes:
        gate: G, float32, shape (1, width) for one gate a state, (width, width) for one a dimension.
        gate_bias: c, float32, shape (1,) or (width,).
        size: s, positive; 1 where the model was trained with it.
        k: Neighbors a query; the paper takes 4.

    Raises:
        ConfigError: A value is out of its range, or the gate is damaged.
    """

    kind: ClassVar[str] = "spalm"
    gate: Tensor = field(repr=False)
    gate_bias: Tensor = field(repr=False)
    size: float = 1.0

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_positive("size", self.size)
        gate, bias = self.gate, self.gate_bias
        sound = gate.ndim == 2 and bias.shape == gate.shape[:1] and gate.shape[0] in (1, gate.shape[1])
        if not sound or not all(part.dtype == torch.float32 and bool(part.isfinite().all()) for part in (gate, bias)):
            raise ConfigError("the gate of this mixture is damaged; fit it again")

    def _gate(self, hidden: Tensor) -> Tensor:
        if hidden.shape[1] != self.gate.shape[1]:
            raise ConfigError(
                f"the gate is for states of {self.gate.shape[1]} numbers, the model's have {hidden.shape[1]}; fit it "
                "with this model"
            )
        weight, bias = self.gate.to(hidden.device), self.gate_bias.to(hidden.device)
        return torch.nn.functional.linear(hidden, weight, bias).sigmoid()  # (n, 1) or (n, width)

    def state(self, evidence: Evidence) -> Tensor:
        """See `StateMixture.state`."""
        hidden, layer = state_of(evidence)
        found = evidence.nearest(self.ks).memories[0]
        memory, _ = ops.spalm_memory(hidden, layer.weight[found.tokens], found.present, found.log_counts)
        return ops.spalm_state(hidden, self.size * memory, self._gate(hidden), found.present)

    def mix(self, evidence: Evidence) -> Mix:
        """Return 1 − g (its mean over dimensions), and every neighbor's share of m."""
        hidden, layer = state_of(evidence)
        found = evidence.nearest(self.ks).memories[0]
        log_shares = ops.spalm_memory(hidden, layer.weight[found.tokens], found.present, found.log_counts)[1]
        weight = (1 - self._gate(hidden)).mean(dim=1) * found.present.any(dim=1)
        return Mix(weight[:, None], (log_shares,))

    def describe(self) -> str:
        """See `Mixture.describe`."""
        gates = "one gate" if len(self.gate) == 1 else f"{len(self.gate):,} gates"
        return f"the state changed by {gates} of the state, memory × {self.size:.3g}, k {self.k:,}"


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeredMixture(StateMixture):
    """z = h + A Eᵀ (E A Eᵀ)⁻¹ b, b_y = log(1 + λ / (1 − λ) · q(y) / p_LM(y)), y the neighbors' distinct next tokens.

    q = softmax(−d / T) is p_kNN, and b_y the change of a logit that turns p_LM(y) into about (1 − λ) p_LM(y) + λ q(y).
    E are the embeddings of these tokens, A = `OutputEmbedding.isolating`: each of them gets its change, and all logits
    together change as little as that allows; see `ops.steering`. Nothing of it is learned. A network says u of every
    target, λ = min(σ(logit λ₀ + u), 1 − 10⁻⁴); where it says zero, this is kNN-LM as near as a change of state can be.

    Attributes:
        interpolation_weight: λ₀, in (0, 1).
        temperature: T, positive.
        network: From features to u, one row a target.
        k: Neighbors a query.

    Raises:
        ConfigError: A value is out of its range, or the network is for other features.
    """

    kind: ClassVar[str] = "steered"
    interpolation_weight: float
    temperature: float
    network: Network = field(repr=False)

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check_positive("temperature", self.temperature)
        check_weight(self.interpolation_weight)
        if self.interpolation_weight in (0, 1):
            raise ConfigError(f"interpolation weight λ₀ is {self.interpolation_weight}; expected one between 0 and 1")
        expected = len(names(self.k))
        if (self.network.inputs, self.network.outputs) != (expected, 1):
            raise ConfigError(
                f"the network takes {self.network.inputs} features and says {self.network.outputs} numbers; expected "
                f"{expected} and 1 for k {self.k}: fit it again"
            )

    def _said(self, evidence: Evidence) -> Tensor:
        found = evidence.memories[0].nearest(self.k)
        return self.network(features(found, evidence.belief, self.temperature, self.k))

    def state(self, evidence: Evidence) -> Tensor:
        """See `StateMixture.state`."""
        return steered(self._said(evidence), evidence.nearest(self.ks), self.interpolation_weight, self.temperature)

    def mix(self, evidence: Evidence) -> Mix:
        """Return λ and the shares in q."""
        found = evidence.nearest(self.ks).memories[0]
        log_shares = knn_log_shares(found, self.temperature)
        weight = _log_odds(self._said(evidence), self.interpolation_weight).sigmoid().clamp_max(ops.LARGEST)
        return Mix((weight * found.present.any(dim=1))[:, None], (log_shares,))

    def describe(self) -> str:
        """See `Mixture.describe`."""
        network = f"a network of {self.network.parameters:,} parameters"
        settings = f"λ {self.interpolation_weight:.3f}, temperature {self.temperature:.3g}, k {self.k:,}"
        return f"the state moved towards the neighbors' tokens by {network} around {settings}"


def first_size(weight: Tensor) -> float:
    """Return the size of m with which training begins, for an output embedding of shape (vocabulary, width)."""
    return _FIRST_STEP / float(weight.square().sum(dim=1).mean().clamp_min(1e-6))


def steered(said: Tensor, evidence: Evidence, interpolation_weight: float, temperature: float) -> Tensor:
    """Return z of what the network says of n targets, shape (n, 1); see `SteeredMixture`."""
    hidden, layer = state_of(evidence)
    assert evidence.belief is not None
    found = evidence.memories[0]
    embeddings = layer.weight[found.tokens]  # (n, k, width)
    log_probs = torch.einsum("nkd,nd->nk", embeddings, hidden) - evidence.belief.normalizer[:, None]
    if layer.bias is not None:
        log_probs = log_probs + layer.bias[found.tokens]
    log_shares = knn_log_shares(found, temperature)
    log_odds = _log_odds(said, interpolation_weight)
    given = log_odds, log_shares, found.tokens, found.present, log_probs, embeddings
    return hidden + ops.steering(*given, layer.isolating)


def _log_odds(said: Tensor, interpolation_weight: float) -> Tensor:
    """Return log λ / (1 − λ), shape (n,), with λ at most 1 − 10⁻⁴."""
    logit = math.log(interpolation_weight / (1 - interpolation_weight))
    return (logit + said[:, 0]).clamp_max(math.log(ops.LARGEST / (1 - ops.LARGEST)))


def state_of(evidence: Evidence) -> tuple[Tensor, OutputEmbedding]:
    """Return h, float32, shape (n, width), and the layer that reads it.

    Raises:
        ConfigError: The evidence has none.
    """
    if evidence.belief is None or evidence.belief.hidden is None or evidence.output is None:
        raise ConfigError("this mixture changes the model's last state; retrieve with beliefs=True and hidden=True")
    return evidence.belief.hidden, evidence.output


def _any(evidence: Evidence) -> Tensor:
    return evidence.memories[0].present.any(dim=1)

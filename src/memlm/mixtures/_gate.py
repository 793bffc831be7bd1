"""Several memories under one gate: p = Σ_m λ_m p_m + (1 − Σ_m λ_m) p_LM, the odds of every λ_m set by a small network.

λ = softmax(logit λ'_m + u_m; u_LM), where λ' is what a memory's own mixture would give it and u what the network says:
a gate over one memory whose network says zero is that memory's own mixture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..evidence import Belief, Evidence, Found
from ..text import count
from ._features import features
from ._mixture import DatastoreMixture, Mix, Mixture
from ._network import Network

_MOST_MEMORIES = 16  # a target looks at the entries of all of them at once


@dataclass(frozen=True, kw_only=True, eq=False)
class GateMixture(Mixture):
    """Weights of any number of datastores and caches, target by target.

    Attributes:
        members: A mixture for each memory, which shares out its neighbors and says the λ that the gate corrects.
        network: From `gate_features` to the correction u, one number a memory and one for the model.

    Raises:
        ConfigError: The network is for another number of memories, these are over 16, or a member is for several.
    """

    kind: ClassVar[str] = "gate"
    needs_belief: ClassVar[bool] = True
    members: tuple[Mixture, ...]
    network: Network = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        if len(self.members) > _MOST_MEMORIES:
            raise ConfigError(f"a gate over {len(self.members):,} memories; expected up to {_MOST_MEMORIES}")
        if any(len(member.ks) != 1 for member in self.members) or self.network.outputs != len(self.members) + 1:
            raise ConfigError(
                f"a gate over {len(self.members)} memories needs a member for each and a network with one output more, "
                f"it has {self.network.outputs}; fit it again"
            )

    @property
    def ks(self) -> tuple[int, ...]:
        """See `Mixture.ks`."""
        return tuple(member.ks[0] for member in self.members)

    @property
    def expects(self) -> tuple[str, ...]:
        """See `Mixture.expects`."""
        return tuple(member.expects[0] for member in self.members)

    def mix(self, evidence: Evidence) -> Mix:
        """See `Mixture.mix`."""
        evidence = evidence.nearest(self.ks)
        mixes = member_mixes(self.members, evidence)
        said = self.network(gate_features(self.members, mixes, evidence))
        some = torch.stack([found.present.any(dim=1) for found in evidence.memories], dim=1)
        weights = gate_weights(said, own_logits(mixes), some)
        return Mix(weights, tuple(mix.log_shares[0] for mix in mixes))

    def describe(self) -> str:
        """See `Mixture.describe`."""
        members = "; ".join(member.describe() for member in self.members)
        memories = count(len(self.members), "memory", "memories")
        return f"λ of {memories} by a network of {self.network.parameters:,} parameters ({members})"


def gate_weights(said: Tensor, own: Tensor, some: Tensor) -> Tensor:
    """Return λ of each memory, shape (n, memories).

    Args:
        said: What the network says, shape (n, memories + 1; the model last).
        own: Logit of the λ that each memory's own mixture sets, shape (n, memories).
        some: Bool, shape (n, memories): whether a memory found anything; otherwise its λ is 0.
    """
    logits = torch.cat([(own + said[:, :-1]).masked_fill(~some, -torch.inf), said[:, -1:]], dim=1)
    return logits.softmax(dim=1)[:, :-1] * ops.LARGEST


def own_logits(mixes: list[Mix]) -> Tensor:
    """Return the logit of every member's own λ, shape (n, memories)."""
    weights = torch.cat([mix.weights for mix in mixes], dim=1)
    return weights.clamp(1 - ops.LARGEST, ops.LARGEST).logit()


def member_mixes(members: tuple[Mixture, ...], evidence: Evidence) -> list[Mix]:
    """Let every member look at its own memory."""
    pairs = zip(members, evidence.memories, strict=True)
    return [member.mix(Evidence((found,), evidence.belief)) for member, found in pairs]


def gate_features(members: tuple[Mixture, ...], mixes: list[Mix], evidence: Evidence) -> Tensor:
    """Return what the network is told: of each memory its features, and the weight that its member would give it."""
    if evidence.belief is None:
        raise ConfigError("a gate looks at the model's confidence; retrieve with beliefs=True")
    columns = [own_logits(mixes)]
    for member, mix, found in zip(members, mixes, evidence.memories, strict=True):
        if isinstance(member, DatastoreMixture):
            columns.append(features(found, evidence.belief, member.temperature, member.k))
        else:
            columns.append(_cache_features(found, evidence.belief, mix.log_shares[0]))
    return torch.cat(columns, dim=1)


def _cache_features(found: Found, belief: Belief, log_shares: Tensor) -> Tensor:
    """Return how full the cache is, how peaked, and how far it agrees with the model, shape (n, 4)."""
    found = found.nearest(log_shares.shape[1])
    shares = log_shares.exp()
    of_choice = (shares * (found.tokens == belief.top[:, None])).sum(dim=1)
    entropy = -(shares * log_shares.clamp_min(-1e9)).sum(dim=1)
    columns = [(found.present.sum(dim=1) + 1.0).log(), shares.amax(dim=1), entropy, of_choice]
    return torch.stack(columns, dim=1)

"""Several memories under one gate: p = Σ_m λ_m p_m + (1 − Σ_m λ_m) p_LM, the odds of every λ_m set by a small network.

λ = softmax(logit λ'_m + u_m; u_LM), where λ' is what a memory's own mixture would give it and u what the network says:
a gate over one memory whose network says zero is that memory's own mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..evidence import LATELY, Belief, Evidence, Found
from ..text import count
from ._features import features
from ._mixture import CACHE, DatastoreMixture, Mix, Mixture
from ._network import LARGEST_NUMBER, Network

_SPANS = (16, 64)  # tokens in which what was read counts e times less
_MOST_MEMORIES = 16  # a target looks at the entries of all of them at once


@dataclass(frozen=True, kw_only=True, eq=False)
class GateMixture(Mixture):
    """Weights of any number of datastores and caches, target by target.

    Attributes:
        members: A mixture for each memory, which shares out its neighbors and says the λ that the gate corrects.
        network: From `gate_features` to the correction u, one number a memory and one for the model.
        familiarity: log of every token's share of each datastore, float32, shape (vocabulary, datastores), from which
            the gate sees which datastore the text is like; None where there is nothing to choose between.

    Raises:
        ConfigError: The network is for another number of memories, these are not 1 to 16, or a member is for several.
    """

    kind: ClassVar[str] = "gate"
    needs_belief: ClassVar[bool] = True
    members: tuple[Mixture, ...]
    network: Network = field(repr=False)
    familiarity: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        table, stored = self.familiarity, sum(expected != CACHE for expected in self.expects)
        if table is not None and (
            table.ndim != 2
            or not len(table)
            or table.shape[1] != stored
            or table.dtype != torch.float32
            or not bool((table.abs() <= LARGEST_NUMBER).all())
        ):
            raise ConfigError("the gate's table of token frequencies is damaged; fit it again")
        if not 1 <= len(self.members) <= _MOST_MEMORIES:
            raise ConfigError(f"a gate over {len(self.members):,} memories; expected 1 to {_MOST_MEMORIES}")
        if any(len(member.ks) != 1 for member in self.members) or self.network.outputs != len(self.members) + 1:
            raise ConfigError(
                f"a gate over {len(self.members)} memories needs a member for each and a network with one output more, "
                f"it has {self.network.outputs}; fit it again"
            )

    @property
    def needs_text(self) -> bool:  # type: ignore[override]
        """See `Mixture.needs_text`."""
        return self.familiarity is not None or any(member.needs_text for member in self.members)

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
        said = self.network(gate_features(self.members, mixes, evidence, self.familiarity))
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


def gate_features(
    members: tuple[Mixture, ...], mixes: list[Mix], evidence: Evidence, familiarity: Tensor | None = None
) -> Tensor:
    """Return what the network is told of each memory: the weight that its member would give it, its features, and with
    a table how familiar the last tokens are to it.
    """
    if evidence.belief is None:
        raise ConfigError("a gate looks at the model's confidence; retrieve with beliefs=True")
    columns = [own_logits(mixes)]
    for member, mix, found in zip(members, mixes, evidence.memories, strict=True):
        if isinstance(member, DatastoreMixture):
            columns.append(features(found, evidence.belief, member.temperature, member.k))
        else:
            columns.append(_cache_features(found, evidence.belief, mix.log_shares[0]))
    if familiarity is not None:
        columns.append(_familiar(familiarity, evidence.belief))
    return torch.cat(columns, dim=1)


def familiarity(statistics: Sequence[Tensor]) -> Tensor:
    """Return log of every token's share of each datastore, every token counted once more than it is there.

    Args:
        statistics: `Datastore.statistics` of each.
    """
    return torch.stack([table[:, 0].double().log_softmax(dim=0).float() for table in statistics], dim=1)


def _familiar(familiarity: Tensor, belief: Belief) -> Tensor:
    """Return the mean log share of the last tokens, the newer counting the more, shape (n, spans · datastores)."""
    if belief.read is None:
        raise ConfigError("this gate looks at the tokens before; retrieve with beliefs=True")
    ages = torch.arange(LATELY - 1, -1, -1, device=belief.read.device)
    shares = familiarity.to(belief.read.device)[belief.read.clamp(0, len(familiarity) - 1)]  # (n, LATELY, datastores)
    columns = []
    for span in _SPANS:
        weights = (-ages / span).exp() * (belief.read >= 0)  # (n, LATELY)
        columns.append((weights[..., None] * shares).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp_min(1e-9))
    return torch.cat(columns, dim=1)


def _cache_features(found: Found, belief: Belief, log_shares: Tensor) -> Tensor:
    """Return how full the cache is, how peaked, and how far it agrees with the model, shape (n, 4)."""
    found = found.nearest(log_shares.shape[1])
    shares = log_shares.exp()
    of_choice = (shares * (found.tokens == belief.top[:, None])).sum(dim=1)
    entropy = -(shares * log_shares.clamp_min(-1e9)).sum(dim=1)
    columns = [(found.present.sum(dim=1) + 1.0).log(), shares.amax(dim=1), entropy, of_choice]
    return torch.stack(columns, dim=1)

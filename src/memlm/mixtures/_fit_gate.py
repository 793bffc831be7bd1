"""Fitting one gate over several memories by the mixture's likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._gate import GateMixture, familiarity, gate_features, gate_weights, member_mixes, own_logits
from ._heldout import HeldOut
from ._mixture import Mixture, memory_likelihoods
from ._network import Network
from ._train import train

_HIDDEN = (32, 24)


def fit_gate(
    held: HeldOut, members: tuple[Mixture, ...], statistics: Sequence[Tensor] = (), seed: int = 0
) -> GateMixture:
    """Train the gate on held-out text.

    Args:
        held: Evidence of as many memories as there are members, with beliefs.
        members: A fitted mixture for each memory; they are not changed.
        statistics: `Datastore.statistics` of every datastore among the memories, in their order. With them the gate
            also looks at which datastore the text is like; neighbors alone tell that less well. Worth it from two on.
        seed: Of the network's start and of the order of targets.
    """
    table = familiarity(statistics) if statistics else None
    inputs, owns, likelihoods, present = [], [], [], []
    for part in held.blocks([member.ks[0] for member in members]):
        mixes = member_mixes(members, part.evidence)
        inputs.append(gate_features(members, mixes, part.evidence, table))
        owns.append(own_logits(mixes))
        likelihoods.append(memory_likelihoods([mix.log_shares[0] for mix in mixes], part.evidence, part.targets))
        present.append(torch.stack([found.present.any(dim=1) for found in part.evidence.memories], dim=1))
    features, own, some = torch.cat(inputs), torch.cat(owns), torch.cat(present)
    # p of every memory and of the model, shape (n, memories + 1)
    probabilities = torch.cat([torch.cat(likelihoods), held.lm_log_probs[:, None].exp()], dim=1)
    network = Network.new(features, (*_HIDDEN, len(members) + 1), seed)

    def losses(said: Tensor, rows: Tensor) -> Tensor:
        weights = gate_weights(said, own[rows], some[rows])
        weights = torch.cat([weights, 1 - weights.sum(dim=1, keepdim=True)], dim=1)
        return -(weights * probabilities[rows]).sum(dim=1).clamp_min(1e-30).log()

    network = train(network, features, losses, held.groups, seed=seed)
    return GateMixture(members=members, network=network, familiarity=table)

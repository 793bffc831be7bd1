"""kNN-Adapter: a small network sets λ and reshapes p_kNN, target by target (Huang et al. 2023, arXiv:2302.10879).

The network sees no hidden state: only how near, how many and how much in agreement the neighbors are, and how sure the
model is. So it fits a model of which nothing but probabilities is known, and a datastore that it was not fitted to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..evidence import Evidence
from ._features import features, names
from ._mixture import DatastoreMixture, Mix, check_weight
from ._network import Network


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterMixture(DatastoreMixture):
    """λ, the sharpness s and the tail b of p_kNN from a network of one to two thousand parameters.

    λ = min(σ(logit λ₀ + u₁), 1 − 10⁻⁴), s = exp(u₂), b = u₃, where u is what the network says. λ₀ and T are the best
    fixed ones: a network that says zero is kNN-LM.

    Attributes:
        interpolation_weight: λ₀, in (0, 1).
        network: From features to u, one row a target.

    Raises:
        ConfigError: A value is out of its range, or the network is for other features.
    """

    kind: ClassVar[str] = "adapter"
    needs_belief: ClassVar[bool] = True
    interpolation_weight: float
    network: Network = field(repr=False)

    def __post_init__(self) -> None:
        check_weight(self.interpolation_weight)
        if self.interpolation_weight in (0, 1):
            raise ConfigError(f"interpolation weight λ₀ is {self.interpolation_weight}; expected one between 0 and 1")
        DatastoreMixture.__post_init__(self)
        expected = len(names(self.k))
        if (self.network.inputs, self.network.outputs) != (expected, 3):
            raise ConfigError(
                f"the network takes {self.network.inputs} features and says {self.network.outputs} numbers; expected "
                f"{expected} and 3 for k {self.k}: fit it again"
            )

    def weights(self, evidence: Evidence) -> Tensor:
        """See `DatastoreMixture.weights`."""
        return self.mix(evidence).weights[:, 0]

    def mix(self, evidence: Evidence) -> Mix:
        """See `Mixture.mix`."""
        found = evidence.memories[0].nearest(self.k)
        said = self.network(features(found, evidence.belief, self.temperature, self.k))
        weight, sharpness, tail = corrections(said, self.interpolation_weight)
        near, counts = (found.distances, found.present), found.log_counts
        shares = ops.adapted_log_weights(*near, self.temperature, sharpness, tail, counts)
        return Mix((weight * found.present.any(dim=1))[:, None], (shares,))

    def curve(self) -> str:
        """See `DatastoreMixture.curve`."""
        network = f"a network of {self.network.parameters:,} parameters"
        return f"λ and p_kNN set by {network} around λ {self.interpolation_weight:.3f}"


def corrections(said: Tensor, interpolation_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return λ, sharpness and tail, each of shape (n,), of what the network says, shape (n, 3)."""
    logit = math.log(interpolation_weight / (1 - interpolation_weight))
    weight = (logit + said[:, 0]).sigmoid().clamp_max(ops.LARGEST)
    return weight, said[:, 1].clamp(-4, 4).exp(), said[:, 2].clamp(-8, 8)

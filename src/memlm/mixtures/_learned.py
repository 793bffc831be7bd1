"""Learned weight: λ from the context alone, before any search, so that searches can be skipped.

He, Neubig, Berg-Kirkpatrick 2021, "Efficient nearest neighbor language models" (arXiv:2109.04212), section 4.1. Their
features are the key, the model's confidence and entropy, and how often the context was seen and how many different
tokens followed it; the last two are taken of the last token alone, as in the pipeline that they released, because
generation sees no more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..evidence import Belief, Evidence
from ._mixture import DatastoreMixture, check_weight
from ._network import Network


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedMixture(DatastoreMixture):
    """λ of every target by a network that sees the context; where λ is below a threshold nothing is searched.

    Attributes:
        network: From `context_features` to the logit of λ.
        statistics: log(1 + frequency) and log(1 + fertility) of every token in the datastore, float32, shape
            (vocabulary, 2); see `Datastore.statistics`.
        threshold: λ below which the search is skipped, in [0, 1]; 0 always searches.

    Raises:
        ConfigError: A value is out of its range, or a table or the network is damaged.
    """

    kind: ClassVar[str] = "learned"
    needs_belief: ClassVar[bool] = True
    network: Network = field(repr=False)
    statistics: Tensor = field(repr=False)
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_weight(self.threshold)
        table = self.statistics
        sound = table.ndim == 2 and table.shape[1] == 2 and len(table) > 0 and table.dtype == torch.float32
        if not sound or not bool(table.isfinite().all()):
            raise ConfigError("the token statistics of this mixture are damaged; fit it again")
        if self.network.outputs != 1:
            raise ConfigError(f"the network says {self.network.outputs} numbers; expected 1, λ: fit it again")
        DatastoreMixture.__post_init__(self)

    @property
    def skips(self) -> bool:  # type: ignore[override]
        """Whether searches may be left out."""
        return self.threshold > 0

    def predicted(self, belief: Belief) -> Tensor:
        """Return λ as the network sets it before anything is searched, float32, shape (n,)."""
        said = self.network(context_features(belief, self.statistics))
        return said[:, 0].sigmoid().clamp_max(ops.LARGEST)

    def wanted(self, belief: Belief) -> Tensor | None:
        """See `Mixture.wanted`."""
        return self.predicted(belief) >= self.threshold if self.skips else None

    def weights(self, evidence: Evidence) -> Tensor:
        """See `DatastoreMixture.weights`."""
        if evidence.belief is None:
            raise ConfigError("this mixture looks at the model's confidence; retrieve with beliefs=True")
        weight = self.predicted(evidence.belief)
        # also when everything was searched: the same λ with a threshold means the same mixture
        weight = weight.masked_fill(weight < self.threshold, 0.0)
        return weight * evidence.memories[0].present.any(dim=1)

    def curve(self) -> str:
        """See `DatastoreMixture.curve`."""
        skipping = f", no search below λ {self.threshold:.3f}" if self.skips else ""
        return f"λ set by a network of {self.network.parameters:,} parameters{skipping}"


def context_features(belief: Belief, statistics: Tensor) -> Tensor:
    """Return what is known before a search, float32, shape (n, key width + 4)."""
    seen = statistics.to(belief.last.device)[belief.last.clamp_max(len(statistics) - 1)]
    scalars = torch.stack([belief.confidence, belief.entropy, seen[:, 0], seen[:, 1]], dim=1)
    return torch.cat([belief.keys, scalars], dim=1)

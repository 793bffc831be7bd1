"""kNN-LM: one interpolation weight for every token (Khandelwal et al. 2020, arXiv:1911.00172)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..evidence import Evidence
from ._mixture import DatastoreMixture, check_weight


@dataclass(frozen=True, kw_only=True)
class KnnMixture(DatastoreMixture):
    """The same λ everywhere.

    Attributes:
        interpolation_weight: λ, the weight of the memory, in [0, 1].
        temperature: T, which divides squared distances; positive.
        k: Neighbors a query; positive.

    Raises:
        ConfigError: A value is out of its range.

    Example:
        >>> KnnMixture(interpolation_weight=0.5, temperature=10.0, k=64).k
        64
    """

    kind: ClassVar[str] = "knn"
    interpolation_weight: float

    def __post_init__(self) -> None:
        check_weight(self.interpolation_weight)
        DatastoreMixture.__post_init__(self)

    def weights(self, evidence: Evidence) -> Tensor:
        """See `DatastoreMixture.weights`."""
        return evidence.memories[0].present.any(dim=-1).float() * self.interpolation_weight

    def curve(self) -> str:
        """See `DatastoreMixture.curve`."""
        return f"λ {self.interpolation_weight:.3f}"

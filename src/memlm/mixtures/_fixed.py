"""kNN-LM: one interpolation weight for every token (Khandelwal et al. 2020, arXiv:1911.00172)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._mixture import Mixture, check_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnMixture(Mixture):
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
        Mixture.__post_init__(self)

    def weights(self, distances: Tensor, present: Tensor) -> Tensor:
        """See `Mixture.weights`."""
        return present.any(dim=-1).float() * self.interpolation_weight

    def describe(self) -> str:
        """See `Mixture.describe`."""
        return f"λ {self.interpolation_weight:.3f}"

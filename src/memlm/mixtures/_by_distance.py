"""λ from the distance to the nearest neighbor: in steps, as an exponential, as a logistic curve."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..evidence import Evidence, Found
from ..text import count
from ._mixture import DatastoreMixture, check_number, check_positive, check_weight, nearest


@dataclass(frozen=True, kw_only=True)
class BucketMixture(DatastoreMixture):
    """One λ a bucket of the nearest distance (Drozdov et al. 2022, arXiv:2210.15859).

    Attributes:
        edges: Distances at which one bucket ends and the next begins, rising; one fewer than buckets.
        bucket_weights: λ of each bucket, nearest first, in [0, 1].

    Raises:
        ConfigError: A value is out of its range.
    """

    kind: ClassVar[str] = "buckets"
    edges: tuple[float, ...]
    bucket_weights: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", tuple(self.edges))  # JSON has lists
        object.__setattr__(self, "bucket_weights", tuple(self.bucket_weights))
        for edge in self.edges:
            check_number("edge", edge)
        for weight in self.bucket_weights:
            check_weight(weight)
        if any(low >= high for low, high in pairwise(self.edges)) or len(self.edges) + 1 != len(self.bucket_weights):
            raise ConfigError(
                f"{len(self.edges)} edges for {len(self.bucket_weights)} buckets; expected rising edges, one fewer "
                "than weights"
            )
        DatastoreMixture.__post_init__(self)

    def weights(self, evidence: Evidence) -> Tensor:
        """See `DatastoreMixture.weights`."""
        found = evidence.memories[0]
        edges, weights = (found.distances.new_tensor(part) for part in (self.edges, self.bucket_weights))
        return found.present.any(dim=-1) * ops.bucket_weight(_near(found), edges, weights)

    def curve(self) -> str:
        """See `DatastoreMixture.curve`."""
        low, high = min(self.bucket_weights), max(self.bucket_weights)
        return f"λ {low:.3f} to {high:.3f} in {count(len(self.bucket_weights), 'bucket')}"


@dataclass(frozen=True, kw_only=True)
class ExponentialMixture(DatastoreMixture):
    """λ(d) = min(λ₀ exp(−d / τ), 1 − 10⁻⁴) of the nearest distance d.

    Attributes:
        scale: λ₀, positive; above 1 where even near neighbors are at some distance.
        length: τ, in units of squared distance; positive.

    Raises:
        ConfigError: A value is out of its range.
    """

    kind: ClassVar[str] = "exponential"
    scale: float
    length: float

    def __post_init__(self) -> None:
        check_positive("scale λ₀", self.scale)
        check_positive("length τ", self.length)
        DatastoreMixture.__post_init__(self)

    def weights(self, evidence: Evidence) -> Tensor:
        """See `DatastoreMixture.weights`."""
        found = evidence.memories[0]
        return found.present.any(dim=-1) * ops.exponential_weight(_near(found), self.scale, self.length)

    def curve(self) -> str:
        """See `DatastoreMixture.curve`."""
        return f"λ = {self.scale:.3g} exp(−d / {self.length:.3g})"


@dataclass(frozen=True, kw_only=True)
class LogisticMixture(DatastoreMixture):
    """λ(d) = min(λ₀ σ((c − d) / τ), 1 − 10⁻⁴) of the nearest distance d.

    Attributes:
        scale: λ₀, which near neighbors get, in (0, 1].
        center: c, the squared distance at which λ is half of λ₀.
        length: τ, in units of squared distance; positive.

    Raises:
        ConfigError: A value is out of its range.
    """

    kind: ClassVar[str] = "logistic"
    scale: float
    center: float
    length: float

    def __post_init__(self) -> None:
        check_positive("scale λ₀", self.scale)
        check_weight(self.scale)
        check_number("center", self.center)
        check_positive("length τ", self.length)
        DatastoreMixture.__post_init__(self)

    def weights(self, evidence: Evidence) -> Tensor:
        """See `DatastoreMixture.weights`."""
        found = evidence.memories[0]
        return found.present.any(dim=-1) * ops.logistic_weight(_near(found), self.scale, self.center, self.length)

    def curve(self) -> str:
        """See `DatastoreMixture.curve`."""
        return f"λ = {self.scale:.3g} σ(({self.center:.3g} − d) / {self.length:.3g})"


def _near(found: Found) -> Tensor:
    """Return the distance to the nearest neighbor, shape (n,); where there is none, any number."""
    return nearest(found).nan_to_num(posinf=0.0)

"""What all mixtures share: p = λ p_kNN + (1 − λ) p_LM, with a λ that each kind sets in its own way."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..files import write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture(ABC):
    """p = λ p_kNN + (1 − λ) p_LM with p_kNN = softmax(−d / T) over k neighbors (Khandelwal et al. 2020).

    Attributes:
        temperature: T, which divides squared distances; positive.
        k: Neighbors a query; positive.

    Raises:
        ConfigError: A value is out of its range.
    """

    kind: ClassVar[str]
    temperature: float
    k: int = 1024

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        check_number("k", self.k)
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(
                f"temperature is {self.temperature}; expected a positive number, about the size of a "
                "typical squared distance; `memlm tune` finds one"
            )
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ConfigError(f"k is {self.k}; expected a whole number of neighbors, at least 1")

    @abstractmethod
    def weights(self, distances: Tensor, present: Tensor) -> Tensor:
        """Return λ of every row.

        Args:
            distances: Squared L2 to the neighbors, float32, shape (n, k).
            present: Bool, shape (n, k).

        Returns:
            float32, shape (n,); 0 where no neighbor is present.
        """

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words how λ is set."""

    def target_log_probs(
        self, lm_log_probs: Tensor, targets: Tensor, distances: Tensor, tokens: Tensor, present: Tensor
    ) -> Tensor:
        """Return the mixture's log probability of one token a row.

        Args:
            lm_log_probs: log p_LM of the targets, float32, shape (n,).
            targets: Int64, shape (n,).
            distances: Squared L2, float32, shape (n, k).
            tokens: The neighbors' values, int64, shape (n, k).
            present: Bool, shape (n, k).

        Returns:
            Natural logs, float32, shape (n,).
        """
        log_weights = ops.knn_log_weights(distances, present, temperature=self.temperature)
        memory = ops.knn_target_log_probs(log_weights, tokens, targets)
        return ops.interpolate(lm_log_probs, memory, self.weights(distances, present))

    def log_probs(self, lm_log_probs: Tensor, distances: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
        """Return the mixture over the whole vocabulary.

        Args:
            lm_log_probs: log p_LM, float32, shape (n, vocabulary).
            distances: Squared L2, float32, shape (n, k).
            tokens: The neighbors' values, int64, shape (n, k).
            present: Bool, shape (n, k).

        Returns:
            Natural logs, float32, shape (n, vocabulary); each row's exponentials sum to 1.
        """
        log_weights = ops.knn_log_weights(distances, present, temperature=self.temperature)
        distinct, memory = ops.aggregate_by_token(log_weights, tokens)
        return ops.interpolate_sparse(lm_log_probs, distinct, memory, self.weights(distances, present))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON."""
        write_json(Path(path), self.to_dict())


def nearest(distances: Tensor, present: Tensor) -> Tensor:
    """Return the squared L2 to the nearest neighbor, shape (n,); +inf where none is present."""
    return distances.masked_fill(~present, math.inf).amin(dim=-1)


def check_number(name: str, value: Any) -> None:
    """Raise ConfigError unless this is a number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected a number")


def check_weight(value: Any) -> None:
    """Raise ConfigError unless this can be a λ."""
    check_number("interpolation_weight", value)
    if not 0.0 <= value <= 1.0:
        raise ConfigError(
            f"interpolation weight λ is {value}; expected a number from 0 (the model alone) to 1 (the memory alone)"
        )

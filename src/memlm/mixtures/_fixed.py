"""kNN-LM: one interpolation weight for every token (Khandelwal et al. 2020, arXiv:1911.00172)."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..files import write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnMixture:
    """p = λ p_kNN + (1 − λ) p_LM with p_kNN = softmax(−d / T) over k neighbors.

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

    interpolation_weight: float
    temperature: float
    k: int = 1024

    def __post_init__(self) -> None:
        for name in ("interpolation_weight", "temperature", "k"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}; expected a number")
        if not 0.0 <= self.interpolation_weight <= 1.0:
            raise ConfigError(
                f"interpolation weight λ is {self.interpolation_weight}; expected a number from 0 (the model alone) "
                "to 1 (the memory alone)"
            )
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(
                f"temperature is {self.temperature}; expected a positive number, about the size of a "
                "typical squared distance; `memlm tune` finds one"
            )
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ConfigError(f"k is {self.k}; expected a whole number of neighbors, at least 1")

    def weights(self, present: Tensor) -> Tensor:
        """Return λ of every row, float32, shape (n,): 0 where no neighbor is present (bool, shape (n, k))."""
        return present.any(dim=-1).float() * self.interpolation_weight

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
        return ops.interpolate(lm_log_probs, memory, self.weights(present))

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
        return ops.interpolate_sparse(lm_log_probs, distinct, memory, self.weights(present))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {"kind": "knn", **dataclasses.asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the settings as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> KnnMixture:
        """Read settings that `save` has written.

        Raises:
            ConfigError: The file is missing, is no JSON, or holds other settings than these.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ConfigError(f"{path} does not exist; `memlm tune … --save {path}` makes one") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}; expected a saved mixture") from error
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or values.pop("kind", None) != "knn" or set(values) != names:
            raise ConfigError(f"{path} is not a saved kNN mixture; expected kind 'knn' and {', '.join(sorted(names))}")
        return cls(**values)

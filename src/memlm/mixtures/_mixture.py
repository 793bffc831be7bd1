"""What all mixtures share: p = Σ_m λ_m p_m + (1 − Σ_m λ_m) p_LM, with weights that each kind sets in its own way."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError, DatastoreMismatch
from ..evidence import INNER_PRODUCT, MOST_ENTRIES, SQUARED_L2, Belief, Evidence, Found
from . import _storage
from ._network import LARGEST_NUMBER, Network

CACHE = "cache"  # a memory that is none of the datastores
_MEMORIES = {
    SQUARED_L2: "a datastore searched by squared L2 (`memlm build`)",
    INNER_PRODUCT: "a datastore searched by inner product (`memlm build --metric inner-product`)",
    CACHE: "a Cache",
}


class Mix(NamedTuple):
    """How n targets are mixed.

    Attributes:
        weights: λ of each memory, float32, shape (n, memories); 0 where a memory has no neighbor.
        log_shares: One tensor a memory: log of every neighbor's share in it, float32, shape (n, k).
    """

    weights: Tensor
    log_shares: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Mixture(ABC):
    """How what memories found and what the model says become one distribution."""

    kind: ClassVar[str]
    needs_belief: ClassVar[bool] = False  # whether `mix` looks at more of the model than its log probabilities
    needs_text: ClassVar[bool] = False  # whether it looks at `Belief.read`, too
    needs_hidden: ClassVar[bool] = False  # whether it looks at `Belief.hidden` and at the layer that reads it
    skips: ClassVar[bool] = False  # whether `wanted` may leave searches out

    @property
    @abstractmethod
    def ks(self) -> tuple[int, ...]:
        """Neighbors asked of each memory."""

    @property
    @abstractmethod
    def expects(self) -> tuple[str, ...]:
        """What each memory must be: a datastore, by its metric, or `CACHE`."""

    @abstractmethod
    def mix(self, evidence: Evidence) -> Mix:
        """Set the weight of every memory and the share of each of its `ks` nearest neighbors; others are left out."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words how it mixes."""

    def check_memories(self, memories: Sequence[Any]) -> None:
        """Refuse memories that this mixture is not for.

        Raises:
            DatastoreMismatch: A memory is of another kind.
            ConfigError: A cache remembers less than the mixture looks at; of one that remembers more, the rest is left.
        """
        for expected, k, memory in zip(self.expects, self.ks, memories, strict=False):
            check_memory(self.kind, expected, memory)
            if expected == CACHE and len(memory) < k:
                raise ConfigError(
                    f"the mixture {self.kind!r} looks at the last {k:,} tokens, but the cache remembers "
                    f"{len(memory):,}; pass Cache({k}), or fit the mixture with the shorter cache"
                )

    def wanted(self, belief: Belief) -> Tensor | None:
        """Say for which targets memories are to be searched, bool, shape (n,); None means all."""
        return None

    def target_log_probs(self, lm_log_probs: Tensor, targets: Tensor, evidence: Evidence) -> Tensor:
        """Return the mixture's log probability of one token a row.

        Args:
            lm_log_probs: log p_LM of the targets, float32, shape (n,).
            targets: Int64, shape (n,).
            evidence: Of the same n targets.

        Returns:
            Natural logs, float32, shape (n,).
        """
        tokens, log_shares, weight = self._as_one(evidence)
        return ops.interpolate(lm_log_probs, ops.knn_target_log_probs(log_shares, tokens, targets), weight)

    def log_probs(self, lm_log_probs: Tensor, evidence: Evidence) -> Tensor:
        """Return the mixture over the whole vocabulary.

        Args:
            lm_log_probs: log p_LM, float32, shape (n, vocabulary).
            evidence: Of the same n targets.

        Returns:
            Natural logs, float32, shape (n, vocabulary); each row's exponentials sum to 1.
        """
        tokens, log_shares, weight = self._as_one(evidence)
        distinct, memory = ops.aggregate_by_token(log_shares, tokens)
        return ops.interpolate_sparse(lm_log_probs, distinct, memory, weight)

    def _as_one(self, evidence: Evidence) -> tuple[Tensor, Tensor, Tensor]:
        """Return all memories as if they were one: tokens and log shares (n, Σk), and its weight (n,)."""
        evidence = evidence.nearest(self.ks)  # a cache returns all that it remembers
        weights, log_shares = self.mix(evidence)
        total = weights.sum(dim=1)
        if len(log_shares) == 1:
            return evidence.memories[0].tokens, log_shares[0], total
        part = (weights / total.clamp_min(1e-30)[:, None]).log()  # (n, memories)
        shares = torch.cat([share + part[:, place : place + 1] for place, share in enumerate(log_shares)], dim=1)
        return torch.cat([found.tokens for found in evidence.memories], dim=1), shares, total

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values; of networks and tables only the size."""
        return self.parts()[0]

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the settings as plain values, and the tensors of networks and tables by name."""
        tensors: dict[str, Tensor] = {}
        return _plain(self, tensors, ""), tensors

    def save(self, path: str | Path, datastores: Sequence[str] = ()) -> None:
        """Write the settings to `path` as JSON, and networks and tables, if any, beside it as .safetensors.

        The JSON names the other file; the two can be moved together, and the JSON may get another name. What stood at
        `path` stays whole until it is replaced.

        Args:
            path: Of the JSON file.
            datastores: `Manifest.content_sha256` of the datastores that it was fitted with, for the record.

        Raises:
            ConfigError: The path ends in .safetensors.
        """
        values, tensors = self.parts()
        _storage.write(Path(path), {**values, "fitted_with": list(datastores)}, tensors)


@dataclass(frozen=True, kw_only=True)
class DatastoreMixture(Mixture):
    """One datastore: p = λ p_kNN + (1 − λ) p_LM with p_kNN = softmax(−d / T) over k neighbors (Khandelwal et al. 2020).

    Attributes:
        temperature: T, which divides squared distances; positive.
        k: Neighbors a query; positive.

    Raises:
        ConfigError: A value is out of its range.
    """

    temperature: float
    k: int = 1024

    def __post_init__(self) -> None:
        check_positive(
            "temperature", self.temperature, "about the size of a typical squared distance; `memlm tune` finds one"
        )
        check_count("k", self.k)

    @property
    def ks(self) -> tuple[int, ...]:
        """See `Mixture.ks`."""
        return (self.k,)

    @property
    def expects(self) -> tuple[str, ...]:
        """See `Mixture.expects`."""
        return (SQUARED_L2,)

    @abstractmethod
    def weights(self, evidence: Evidence) -> Tensor:
        """Return λ of every target, float32, shape (n,); 0 where no neighbor is present."""

    @abstractmethod
    def curve(self) -> str:
        """Say in a few words how λ is set."""

    def describe(self) -> str:
        """See `Mixture.describe`."""
        return f"{self.curve()}, temperature {self.temperature:.3g}, k {self.k:,}"

    def mix(self, evidence: Evidence) -> Mix:
        """See `Mixture.mix`."""
        evidence = evidence.nearest(self.ks)
        found = evidence.memories[0]
        return Mix(self.weights(evidence)[:, None], (knn_log_shares(found, self.temperature),))


def _plain(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Turn a value into JSON, and put its tensors into `tensors`, by their path."""
    if isinstance(value, Mixture):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"kind": value.kind} | {key: _plain(item, tensors, f"{name}{key}.") for key, item in fields.items()}
    if isinstance(value, Network):
        tensors |= {name + key: tensor for key, tensor in value.tensors().items()}
        return {"tensors": name, "parameters": value.parameters}
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name, "shape": list(value.shape)}
    if isinstance(value, tuple):
        return [_plain(item, tensors, f"{name}{place}.") for place, item in enumerate(value)]
    return value


def check_memory(kind: str, expected: str, memory: Any) -> None:
    """Raise DatastoreMismatch unless a memory is what mixtures of a kind expect; see `Mixture.expects`."""
    given = getattr(memory, "metric", CACHE)
    if given != expected:
        raise DatastoreMismatch(
            f"the mixture {kind!r} is for {_MEMORIES[expected]}, but the memory given is {_MEMORIES[given]}: "
            f"{memory!r}; use a memory or a mixture that goes with the other"
        )


def memory_likelihoods(log_shares: Sequence[Tensor], evidence: Evidence, targets: Tensor) -> Tensor:
    """Return p of each memory at the targets, float32, shape (n, memories); the shares are those of a `Mix`."""
    memories = evidence.nearest([shares.shape[1] for shares in log_shares]).memories
    pairs = zip(log_shares, memories, strict=True)
    columns = [ops.knn_target_log_probs(shares, found.tokens, targets) for shares, found in pairs]
    return torch.stack(columns, dim=1).exp()


def knn_log_shares(found: Found, temperature: float) -> Tensor:
    """Return the log of every neighbor's share in p_kNN, shape (n, k); see `ops.knn_log_weights`."""
    counts = found.log_counts
    return ops.knn_log_weights(found.distances, found.present, temperature=temperature, log_counts=counts)


def nearest(found: Found) -> Tensor:
    """Return the squared L2 to the nearest neighbor, shape (n,); +inf where none is present."""
    return found.distances.masked_fill(~found.present, math.inf).amin(dim=-1)


def check_number(name: str, value: Any) -> None:
    """Raise ConfigError unless this is a number that a float32 can hold with room to spare."""
    if not abs(_as_float(name, value)) <= LARGEST_NUMBER:
        raise ConfigError(f"{name} is {_as_float(name, value)}; expected a number of size up to {LARGEST_NUMBER:.0e}")


def check_weight(value: Any) -> None:
    """Raise ConfigError unless this can be a λ."""
    number = _as_float("interpolation_weight", value)
    if not 0.0 <= number <= 1.0:
        raise ConfigError(
            f"interpolation weight λ is {number}; expected a number from 0 (the model alone) to 1 (the memory alone)"
        )


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError unless this is a number of neighbors."""
    if not isinstance(value, Integral) or not 1 <= _as_float(name, value) <= MOST_ENTRIES:
        raise ConfigError(
            f"{name} is {_as_float(name, value):g}; expected a whole number of neighbors, 1 to {MOST_ENTRIES:,}"
        )


def check_positive(name: str, value: Any, hint: str = "`memlm tune` finds one") -> None:
    """Raise ConfigError unless this is a positive number."""
    number = _as_float(name, value)
    if not 1 / LARGEST_NUMBER <= number <= LARGEST_NUMBER:
        raise ConfigError(f"{name} is {number}; expected a positive number; {hint}")


def _as_float(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ConfigError(f"{name} is {reprlib.repr(value)}; expected a number")
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf

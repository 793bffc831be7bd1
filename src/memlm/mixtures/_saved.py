"""Reading saved mixtures of any kind: settings from JSON, networks and tables from safetensors beside it."""

from __future__ import annotations

import dataclasses
import reprlib
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from . import _storage
from ._adapter import AdapterMixture
from ._by_distance import BucketMixture, ExponentialMixture, LogisticMixture
from ._cache import CacheMixture, SharedCacheMixture
from ._fixed import KnnMixture
from ._gate import GateMixture
from ._learned import LearnedMixture
from ._mixture import Mixture
from ._network import Network
from ._spalm import SpalmMixture, SteeredMixture
from ._trime import TrimeMixture

KINDS: dict[str, type[Mixture]] = {
    kind.kind: kind
    for kind in (
        KnnMixture,
        BucketMixture,
        ExponentialMixture,
        LogisticMixture,
        LearnedMixture,
        AdapterMixture,
        CacheMixture,
        SharedCacheMixture,
        GateMixture,
        TrimeMixture,
        SpalmMixture,
        SteeredMixture,
    )
}


def load_mixture(path: str | Path) -> Mixture:
    """Read a mixture that `save` has written.

    Raises:
        ConfigError: A file is missing or damaged, or holds other settings than those of its kind.
    """
    path = Path(path)
    values, tensors = _storage.read(path)
    values.pop("fitted_with", None)
    try:
        mixture = _filled(values, tensors, path)
    except ConfigError:
        raise
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} holds a value of the wrong type: {error}; save the mixture again") from error
    surplus = sorted(set(tensors) - set(mixture.parts()[1]))
    if surplus:
        raise ConfigError(f"{path} does not name all of its tensors: {reprlib.repr(surplus)}; save the mixture again")
    return mixture


def fitted_with(path: str | Path) -> tuple[str, ...]:
    """Return the fingerprints of the datastores that a saved mixture was fitted with, as far as they are recorded.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    recorded = _storage.read(Path(path))[0].get("fitted_with")
    return tuple(item for item in recorded if isinstance(item, str)) if isinstance(recorded, list) else ()


def _filled(values: Any, tensors: dict[str, Tensor], path: Path) -> Mixture:
    """Make a mixture of JSON and tensors."""
    kind = KINDS.get(str(values.get("kind"))) if isinstance(values, dict) else None
    if kind is None:
        raise ConfigError(f"{path} is not a saved mixture; expected a kind among {', '.join(KINDS)}")
    names = {field.name for field in dataclasses.fields(kind)}
    if set(values) - {"kind"} != names:
        raise ConfigError(f"{path} is not a saved mixture of kind {kind.kind!r}; expected {', '.join(sorted(names))}")
    return kind(**{name: _value(values[name], tensors, path) for name in names})


def _value(value: Any, tensors: dict[str, Tensor], path: Path) -> Any:
    if isinstance(value, list):
        return tuple(_value(item, tensors, path) for item in value)
    if not isinstance(value, dict):
        return value
    if "kind" in value:
        return _filled(value, tensors, path)
    if "tensor" in value:
        name = value["tensor"]
        if name not in tensors:
            raise ConfigError(f"{path} names a tensor {reprlib.repr(name)} that is not there; save the mixture again")
        return tensors[name]
    prefix = value.get("tensors")
    if not isinstance(prefix, str):
        raise ConfigError(f"{path} holds {reprlib.repr(value)}, which is no part of a mixture; save the mixture again")
    return Network.from_tensors({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})

"""Reading saved mixtures of any kind: settings from JSON, networks and tables from safetensors beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import ConfigError
from ._adapter import AdapterMixture
from ._by_distance import BucketMixture, ExponentialMixture, LogisticMixture
from ._cache import CacheMixture, SharedCacheMixture
from ._fixed import KnnMixture
from ._gate import GateMixture
from ._learned import LearnedMixture
from ._mixture import TENSORS_SUFFIX, Mixture
from ._network import Network
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
    )
}


def load_mixture(path: str | Path) -> Mixture:
    """Read a mixture that `save` has written.

    Raises:
        ConfigError: A file is missing or damaged, or holds other settings than those of its kind.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; `memlm tune … --save {path}` makes one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}; expected a saved mixture") from error
    digest = None
    if isinstance(values, dict):
        values.pop("fitted_with", None)
        digest = values.pop("tensors_sha256", None)
    tensors = _tensors_of(path, digest) if digest is not None else {}
    try:
        mixture = _filled(values, tensors, path)
    except (TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{path} holds a value of the wrong type: {error}; save the mixture again") from error
    surplus = set(tensors) - set(mixture.parts()[1])
    if surplus:
        beside = path.with_suffix(TENSORS_SUFFIX)
        raise ConfigError(f"{beside} holds more than {path} names: {sorted(surplus)}; save the mixture again")
    return mixture


def _tensors_of(path: Path, digest: Any) -> dict[str, Tensor]:
    """Read the tensors beside a mixture's JSON, if they are those that were saved with it."""
    beside = path.with_suffix(TENSORS_SUFFIX)
    try:
        content = beside.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ConfigError(f"{beside} is damaged, or was not saved together with {path}; save the mixture again")
        return load(content)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{beside} cannot be read: {error}; save the mixture again") from error


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
        try:
            return tensors[value["tensor"]]
        except KeyError as error:
            raise ConfigError(f"{path.with_suffix(TENSORS_SUFFIX)} lacks {error}; save the mixture again") from error
    prefix = value.get("tensors")
    if not isinstance(prefix, str):
        raise ConfigError(f"{path} holds {value}, which is no part of a mixture; save the mixture again")
    return Network.from_tensors({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})

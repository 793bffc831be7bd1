"""Reading saved mixtures of any kind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ..errors import ConfigError
from ._by_distance import BucketMixture, ExponentialMixture, LogisticMixture
from ._fixed import KnnMixture
from ._mixture import Mixture

KINDS: dict[str, type[Mixture]] = {
    kind.kind: kind for kind in (KnnMixture, BucketMixture, ExponentialMixture, LogisticMixture)
}


def load_mixture(path: str | Path) -> Mixture:
    """Read a mixture that `save` has written.

    Raises:
        ConfigError: The file is missing, is no JSON, or holds other settings than those of its kind.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; `memlm tune … --save {path}` makes one") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}; expected a saved mixture") from error
    kind = KINDS.get(str(values.pop("kind", None))) if isinstance(values, dict) else None
    if kind is None:
        raise ConfigError(f"{path} is not a saved mixture; expected a kind among {', '.join(KINDS)}")
    names = {field.name for field in dataclasses.fields(kind)}
    if set(values) != names:
        raise ConfigError(f"{path} is not a saved mixture of kind {kind.kind!r}; expected {', '.join(sorted(names))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{path} holds a value of the wrong type: {error}; save the mixture again") from error

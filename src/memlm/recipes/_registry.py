"""All recipes by name. Another one is a module with an `EXPERIMENT`, and a line here."""

from __future__ import annotations

import difflib

from ..errors import ConfigError
from ._experiment import Experiment
from .external_weights import EXPERIMENT as EXTERNAL_WEIGHTS
from .memorizing_small import EXPERIMENT as MEMORIZING_SMALL
from .product_keys_small import EXPERIMENT as PRODUCT_KEYS_SMALL
from .squat import EXPERIMENT as SQUAT
from .trime_small import EXPERIMENT as TRIME_SMALL

_EXPERIMENTS = (EXTERNAL_WEIGHTS, MEMORIZING_SMALL, PRODUCT_KEYS_SMALL, SQUAT, TRIME_SMALL)
_ALL = {experiment.name: experiment for experiment in _EXPERIMENTS}


def experiments() -> tuple[Experiment, ...]:
    """Return all experiments, in the order of their names."""
    return tuple(_ALL[name] for name in sorted(_ALL))


def find_experiment(name: str) -> Experiment:
    """Return an experiment.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in _ALL:
        close = difflib.get_close_matches(name, _ALL, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(_ALL))}"
        raise ConfigError(f"there is no recipe {name!r}; {hint}")
    return _ALL[name]

"""memlm gives language models a memory outside their weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use, so that `memlm --help` does not wait for torch.
_LAZY = {
    "BlackBox": "models",
    "Corpus": "documents",
    "Datastore": "datastore",
    "Document": "documents",
    "Cache": "cache",
    "KnnMixture": "mixtures",
    "LanguageModel": "models",
    "attach": "models",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "explain": "evaluation",
    "load": "models",
    "overlap": "evaluation",
    "reference_lm": "models",
    "tune": "evaluation",
}

if TYPE_CHECKING:
    from .cache import Cache as Cache
    from .datastore import Datastore as Datastore
    from .documents import Corpus as Corpus
    from .documents import Document as Document
    from .evaluation import compare as compare
    from .evaluation import evaluate as evaluate
    from .evaluation import explain as explain
    from .evaluation import overlap as overlap
    from .evaluation import tune as tune
    from .mixtures import KnnMixture as KnnMixture
    from .models import BlackBox as BlackBox
    from .models import LanguageModel as LanguageModel
    from .models import attach as attach
    from .models import load as load
    from .models import reference_lm as reference_lm

__all__ = [
    "BlackBox",
    "Corpus",
    "Datastore",
    "Document",
    "KnnMixture",
    "LanguageModel",
    "attach",
    "evaluate",
    "explain",
    "load",
    "overlap",
    "reference_lm",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'memlm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

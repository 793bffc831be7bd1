"""What is chosen on held-out text is judged on targets that it was not fitted to: to know them by heart is no skill."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from memlm import KnnMixture
from memlm.evaluation._judge import judge, rows_of
from memlm.evaluation._methods import Fitted, Methods
from memlm.evaluation._retrieval import Retrieved
from memlm.evaluation._tune import tune_cached
from memlm.mixtures import DatastoreMixture, _families, choose, fit
from planted import held_out, indifferent, memory, rising

BASE = KnnMixture(interpolation_weight=0.5, temperature=1.0, k=4)
N = 1000
DOCUMENTS = np.arange(N) // 25


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ByHeart(DatastoreMixture):
    """λ of every target that it was fitted to is the best there is; of all others it is a half."""

    kind: ClassVar[str] = "by heart"
    known: dict

    def weights(self, evidence):
        found = [self.known.get(tuple(key), 0.5) for key in evidence.belief.keys.tolist()]
        return torch.tensor(found) * evidence.memories[0].present.any(dim=1)

    def curve(self):
        return f"{len(self.known)} λ known by heart"


def fit_by_heart(held, base):
    right = held.evidence.memories[0].tokens[:, 0] == held.targets
    known = zip(map(tuple, held.evidence.belief.keys.tolist()), torch.where(right, 0.99, 0.0).tolist(), strict=True)
    return ByHeart(temperature=base.temperature, k=base.k, known=dict(known))


@pytest.fixture(autouse=True)
def _kinds(monkeypatch):
    """One λ for all, which is what there is to learn here, or one for each target."""
    monkeypatch.setattr(_families, "CURVES", {"knn": _families.CURVES["knn"]})
    monkeypatch.setattr(_families, "NETWORKS", {"adapter": fit_by_heart})


def noise(share, seed=0):
    """The memory is right in a share of the targets, and nothing that is known tells in which."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(50, (N,), generator=generator)
    right = torch.rand(N, generator=generator) < share
    tokens = (targets[:, None] + torch.where(right, 0, 1)[:, None]).repeat(1, 4) % 50
    found = memory(tokens, rising(1 + torch.rand(N, generator=generator), 4, generator))
    thinks = indifferent(N)._replace(keys=torch.randn(N, 3, generator=generator))
    return held_out(targets, torch.full((N,), 0.1).log(), [found], thinks, torch.zeros(50, 2))


def passed(held):
    """The same as a retrieval pass."""
    times = {"searched": 1.0, "model_seconds": 0.0, "search_seconds": (0.0,)}
    found = {name: getattr(held, name) for name in ("targets", "lm_log_probs", "evidence")}
    return Retrieved(rows=torch.arange(N), **found, **times)


@pytest.mark.parametrize("groups", [10, 1])
def test_what_is_known_by_heart_is_not_chosen(groups):
    held = dataclasses.replace(noise(0.3), groups=np.arange(N) * groups // N)
    scores = {kind: float(held.log_probs(fit(kind, held, BASE)).mean()) for kind in ("knn", "adapter")}
    assert scores["adapter"] > scores["knn"] + 0.5, "on the text that all is fitted to it would win by far"
    assert choose(held, BASE) == "knn"


def test_nor_by_tuning():
    held = noise(0.3)
    report = tune_cached(passed(held), DOCUMENTS, "auto", held.statistics)
    assert report.helps
    assert isinstance(report.mixture, KnnMixture)
    assert 0.1 < report.mixture.interpolation_weight < 0.4


def test_what_is_known_by_heart_is_no_gain():
    """Where it is the only kind that is asked for, it is judged on targets that it does not know."""
    held = noise(0.1)
    report = tune_cached(passed(held), DOCUMENTS, "adapter", held.statistics)
    assert isinstance(report.best, ByHeart)
    assert float(held.log_probs(report.best).mean()) > float(held.lm_log_probs.mean()) + 0.1
    assert not report.helps
    assert report.gain.high < 0
    assert report.mixture.interpolation_weight == 0
    assert report.perplexity > 1.2 * report.lm_perplexity


def test_a_comparison_reports_it_on_text_that_it_does_not_know():
    valid, test = noise(0.3), noise(0.3, seed=1)
    fitted = {"cache": BASE, "knn-lm": fit("knn", valid, BASE), "adapter": fit("adapter", valid, BASE)}
    methods = Methods({name: Fitted(mixture, (0,), 0.0) for name, mixture in fitted.items()}, "cache")
    passes = {}
    for name, held in (("valid", valid), ("test", test)):
        results = {method: judge(item, held) for method, item in methods.fitted.items()}
        text = SimpleNamespace(document_of_target=held.groups)
        table = rows_of(methods, results, held, SimpleNamespace(model_seconds=1.0, search_seconds=(1.0,)), text)
        passes[name] = {row.method: row.perplexity for row in table}
    assert passes["valid"]["adapter"] < passes["valid"]["knn-lm"] / 1.5
    assert passes["test"]["adapter"] > passes["test"]["knn-lm"] * 1.1
    assert math.isfinite(passes["test"]["adapter"])

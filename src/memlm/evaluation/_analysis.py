"""Where the gain comes from: λ against distance, gain by frequency and by overlap, reliability of λ."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..datastore import Datastore
from ..evidence import Evidence, Found
from ..mixtures import BucketMixture, ExponentialMixture, HeldOut, LogisticMixture, best_weight, nearest
from ._retrieval import Text

if TYPE_CHECKING:
    from ._judge import Judged
    from ._methods import Fitted

_POINTS = 60
_BINS = 10
_LONGEST = 8  # tokens of overlap that are told apart
_SHOWN = ("knn-lm", "exponential", "adapter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Figures behind the plots, as plain lists.

    Attributes:
        curves: Distances, and λ there by the buckets, the exponential and the logistic curve, and the best λ of
            twentieths of the test text by distance.
        by_frequency: Nats gained over the model, by how often the target is stored (powers of ten).
        by_overlap: The same, by how many tokens before the target agree with those before the nearest neighbor.
        reliability: Of each method with a λ of its own for every token: mean λ of tenths of the text, and their best λ.
    """

    curves: dict[str, list[float]]
    by_frequency: list[dict[str, Any]]
    by_overlap: list[dict[str, Any]]
    reliability: dict[str, list[dict[str, float]]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


def analyze(
    memory: Datastore, text: Text, held: HeldOut, fitted: dict[str, Fitted], results: dict[str, Judged]
) -> Analysis:
    """Look at the test text by distance, frequency and overlap."""
    lm = held.lm_log_probs.double()
    gains = {name: (results[name].log_probs - lm).numpy() for name in _SHOWN}
    live = slice(None) if memory.live is None else memory.live
    counts = None if memory.counts is None else memory.counts[live]
    stored = np.bincount(memory.values[live], counts, memory.manifest.tokenizer["vocab_size"])[held.targets.numpy()]
    decades = np.where(stored > 0, np.floor(np.log10(np.maximum(stored, 1))).astype(int), -1)
    shared = overlaps(memory, text, held.evidence.memories[0].entries[:, 0].numpy())
    return Analysis(
        curves=_curves(held, fitted, results),
        by_frequency=_by(decades, gains, lambda value: "never" if value < 0 else f"{10**value:,}+"),
        by_overlap=_by(shared, gains, lambda value: f"{value}" if value < _LONGEST else f"{_LONGEST}+"),
        reliability={name: _reliability(held, item) for name, item in results.items() if item.weights.shape[1] == 1},
    )


def overlaps(memory: Datastore, text: Text, entries: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count the tokens right before each target that agree with those before its nearest neighbor.

    After Drozdov et al. 2022 (arXiv:2210.15859), who find that gains come from such overlaps.

    Args:
        memory: The datastore.
        text: The text.
        entries: The nearest entry of each target, int64, shape (n,).

    Returns:
        Int64, shape (n,), at most 8; a document's beginning ends the count on either side, and so
        does what was merged into another entry.
    """
    first = np.append(True, ~memory.followed[:-1])
    ids = np.concatenate(text.ids)
    lengths = np.array([len(document) for document in text.ids])
    starts = np.cumsum(lengths) - lengths
    place = np.concatenate([start + np.arange(length - 1) for start, length in zip(starts, lengths, strict=True)])
    begin = np.repeat(starts, lengths - 1)
    agree, count = np.ones(len(entries), bool), np.zeros(len(entries), np.int64)
    entry = entries.copy()  # the entry whose value is compared is the one before
    for _ in range(_LONGEST):
        agree &= ~first[entry] & (place >= begin)
        entry = np.maximum(entry - 1, 0)
        agree &= memory.values[entry] == ids[np.maximum(place, 0)]
        count += agree
        place = place - 1
    return count


def _by(groups: npt.NDArray[np.int64], gains: dict[str, npt.NDArray[np.float64]], name: Any) -> list[dict[str, Any]]:
    return [
        {"group": name(int(value)), "tokens": int((groups == value).sum())}
        | {method: float(gain[groups == value].mean()) for method, gain in gains.items()}
        for value in np.unique(groups)
    ]


def _curves(held: HeldOut, fitted: dict[str, Fitted], results: dict[str, Judged]) -> dict[str, list[float]]:
    found = held.evidence.memories[0]
    some = found.present.any(dim=1)
    distances = nearest(found)[some].double()
    if not len(distances):
        return {}
    grid = torch.linspace(float(distances.min()), float(distances.quantile(0.995)), _POINTS)
    blank = torch.zeros((_POINTS, 1), dtype=torch.long)
    one = Evidence((Found(grid[:, None], blank, torch.ones_like(blank, dtype=torch.bool), blank),))
    curves = {"distance": grid.tolist()}
    for name in ("buckets", "exponential", "logistic"):
        mixture = fitted[name].mixture
        if isinstance(mixture, BucketMixture | ExponentialMixture | LogisticMixture):
            curves[name] = mixture.weights(one).tolist()
    result = results["knn-lm"]
    ratio = held.ratio(result.likelihoods[:, 0])[some]
    tenths = distances.argsort().tensor_split(2 * _BINS)
    curves["middle"] = [float(distances[rows].median()) for rows in tenths if len(rows)]
    curves["best λ"] = [best_weight(ratio[rows]) for rows in tenths if len(rows)]
    return curves


def _reliability(held: HeldOut, result: Judged) -> list[dict[str, float]]:
    weights = result.weights[:, 0]
    if len(weights[weights > 0].unique()) < 2:
        return []
    ratio = held.ratio(result.likelihoods[:, 0])
    return [
        {"mean": float(weights[rows].mean()), "best": best_weight(ratio[rows]), "tokens": len(rows)}
        for rows in weights.argsort().tensor_split(_BINS)
        if len(rows)
    ]

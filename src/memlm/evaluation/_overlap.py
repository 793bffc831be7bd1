"""Overlap: how much of a text is in the datastore word for word (contamination)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..datastore import Datastore
from ..documents import Document
from ..errors import ConfigError
from ..models import LanguageModel
from ._retrieval import Text

_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Shares of a text's token n-grams that occur in the datastore.

    Attributes:
        n: Tokens an n-gram.
        share: Of all n-grams of the text that occur in some document of the datastore.
        ngrams: N-grams in the text.
        documents: Share by document, highest first.
        stored: Documents of the text that are stored whole.
    """

    n: int
    share: float
    ngrams: int
    documents: dict[str, float]
    stored: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def overlap(lm: LanguageModel, source: Any, memory: Datastore, *, n: int = 8) -> Overlap:
    """Measure how many of a text's n-grams are stored in the datastore.

    N-grams are compared by 64-bit hashes of their token ids, so a share can be too high by about 10⁻¹² at most.

    Args:
        lm: Gives the tokenizer; it must be the datastore's.
        source: The text; anything that `Corpus` takes.
        memory: The datastore.
        n: Tokens an n-gram; at least 1.

    Raises:
        ConfigError: n is below 1.
        CorpusError: No text.
    """
    if n < 1:
        raise ConfigError(f"n is {n}; expected n-grams of at least 1 token")
    memory.manifest.check_bound(lm.identity)
    text = Text(lm, source)
    hashes = {name: _hashes(ids[1:].astype(np.uint64), n) for name, ids in zip(text.names, text.ids, strict=True)}
    wanted = np.unique(np.concatenate(list(hashes.values())))
    present = np.zeros(len(wanted), bool)
    for stored in _stored_hashes(lm, memory, n):
        present |= np.isin(wanted, stored)
    known = wanted[present]
    hits = {name: np.isin(mine, known) for name, mine in hashes.items()}
    total = sum(len(hit) for hit in hits.values())
    shares = {name: float(hit.mean()) for name, hit in hits.items() if len(hit)}
    return Overlap(
        n=n,
        share=float(sum(hit.sum() for hit in hits.values()) / max(1, total)),
        ngrams=total,
        documents=dict(sorted(shares.items(), key=lambda item: -item[1])),
        stored=[name for name, item in zip(text.names, text.texts, strict=True) if any(memory.document_range(item))],
    )


def _hashes(ids: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.uint64]:
    """Return one polynomial hash for each n consecutive ids, modulo 2⁶⁴, its bits mixed."""
    if len(ids) < n:
        return np.zeros(0, np.uint64)
    result = np.zeros(len(ids) - n + 1, np.uint64)
    for offset in range(n):
        result = result * _BASE + ids[offset : len(ids) - n + 1 + offset] + np.uint64(1)
        result ^= result >> np.uint64(29)
    return result


def _stored_ids(lm: LanguageModel, memory: Datastore) -> Iterator[npt.NDArray[np.integer]]:
    """Yield the token ids of every document; pruned ones lack some, so that their text is tokenized again."""
    if memory.counts is None:
        for first, stop in memory.entry_ranges():
            yield memory.values[first:stop]
    else:
        for stored in memory.documents():
            yield lm.tokenize(Document(stored["id"], stored["text"])).ids[1:]


def _stored_hashes(lm: LanguageModel, memory: Datastore, n: int) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield the hashes of many documents at a time; no n-gram crosses a document's end."""
    gathered: list[npt.NDArray[np.uint64]] = []
    size = 0
    for ids in _stored_ids(lm, memory):
        gathered.append(_hashes(ids.astype(np.uint64), n))
        size += len(gathered[-1])
        if size > 1 << 22:
            yield np.concatenate(gathered)
            gathered, size = [], 0
    if gathered:
        yield np.concatenate(gathered)

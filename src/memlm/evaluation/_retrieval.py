"""One pass over text: what the model and the memory each say of every target."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datastore import Datastore
from ..documents import Corpus, describe
from ..errors import ConfigError, CorpusError
from ..models import LanguageModel, ScoredBatch
from ..progress import progress

_GROUP = 1 << 15  # tokens of documents that are cut and batched together
_SEARCHED_TOGETHER = 1 << 13  # queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieved:
    """Some targets with what both sides know of them.

    Attributes:
        rows: Int64, shape (n,): number of each target in the corpus.
        targets: Int64, shape (n,).
        lm_log_probs: log p_LM of the targets, float32, shape (n,).
        distances: Squared L2 to the neighbors, float32, shape (n, k).
        tokens: Values of the neighbors, int64, shape (n, k).
        present: Bool, shape (n, k).
        model_seconds: Time of the model's forward pass.
        search_seconds: Time of the search.
    """

    rows: Tensor
    targets: Tensor
    lm_log_probs: Tensor
    distances: Tensor
    tokens: Tensor
    present: Tensor
    model_seconds: float
    search_seconds: float


class Text:
    """Held-out text, tokenized, and cut off after a number of targets.

    Args:
        lm: Whose tokenizer to use.
        source: Documents; anything that `Corpus` takes.
        max_tokens: Take documents in an order that depends on nothing but their number until there are so many
            targets, and cut the last one; None takes everything, in order.

    Raises:
        ConfigError: `max_tokens` is below 1.
        CorpusError: No text, or no token of it is a target.
    """

    def __init__(self, lm: LanguageModel, source: Any, max_tokens: int | None = None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; expected at least 1, or None for the whole text")
        documents = list(Corpus(source))
        if max_tokens is not None:
            documents = [documents[number] for number in np.random.default_rng(0).permutation(len(documents))]
        self.ids: list[np.ndarray] = []
        self.texts: list[str] = []
        self.names: list[str] = []
        self.words = self.bytes = self.tokens = 0
        for document in documents:
            tokenized = lm.tokenize(document)
            room = len(tokenized.ids) if max_tokens is None else min(len(tokenized.ids), max_tokens - self.tokens + 1)
            if room < 2:
                continue
            self.ids.append(tokenized.ids[:room])
            self.texts.append(document.text)
            self.names.append(document.id)
            scored = document.text if room == len(tokenized.ids) else document.text[: int(tokenized.spans[room - 1, 1])]
            self.words += len(scored.split())
            self.bytes += len(scored.encode())
            self.tokens += room - 1
            if max_tokens is not None and self.tokens >= max_tokens:
                break
        if not self.tokens:
            raise CorpusError(
                f"no token of {describe(source)} can be scored: every document has one token, and without a start "
                "token the first is not scored; pass longer text"
            )

    @property
    def document_of_target(self) -> np.ndarray:
        """Number of each target's document, int64, shape (tokens,)."""
        return np.repeat(np.arange(len(self.ids)), [len(ids) - 1 for ids in self.ids])


def check_same(lm: LanguageModel, memory: Datastore) -> None:
    """Refuse a model that did not make the datastore; warn where it is fed in other windows."""
    memory.manifest.check_bound(lm.identity)
    if lm.identity["windows"] != memory.manifest.windows:
        warnings.warn(
            f"the datastore was built with windows {memory.manifest.windows}, the model now runs with "
            f"{lm.identity['windows']}: keys of the same text differ a little; load the model with the same context "
            "and stride",
            stacklevel=3,
        )


def retrieve(
    lm: LanguageModel,
    text: Text,
    memory: Datastore,
    k: int,
    *,
    leave_out_own: bool = True,
    show_progress: bool = True,
    description: str = "scoring",
) -> Iterator[Retrieved]:
    """Score every target by the model and find its neighbors, batch by batch.

    Args:
        lm: The model that made the datastore's keys.
        text: What to score.
        memory: Where to search.
        k: Neighbors a target.
        leave_out_own: Where a document of the text is stored in the datastore, leave its entries out of its neighbors.
        show_progress: Show rate and time left on stderr.
        description: What to call the work there.
    """
    check_same(lm, memory)
    own = np.array([memory.document_range(item) if leave_out_own else (0, 0) for item in text.texts]).reshape(-1, 2)
    owners = text.document_of_target
    with progress(description, text.tokens, show=show_progress) as advance:
        first_row = first_document = 0
        while first_document < len(text.ids):
            stop, size = first_document, 0
            while stop < len(text.ids) and (size == 0 or size + len(text.ids[stop]) <= _GROUP):
                size += len(text.ids[stop])
                stop += 1
            started = time.perf_counter()
            for batch in _joined(lm.score(text.ids[first_document:stop])):
                scored = time.perf_counter()
                rows = batch.rows + first_row
                exclude = own[owners[rows.numpy()]]
                found = memory.lookup(batch.keys.numpy(), k, exclude if exclude.any() else None)
                searched = time.perf_counter()
                yield Retrieved(
                    rows=rows,
                    targets=batch.targets,
                    lm_log_probs=batch.log_probs,
                    distances=found[0],
                    tokens=found[1],
                    present=found[2],
                    model_seconds=scored - started,
                    search_seconds=searched - scored,
                )
                advance(len(rows))
                started = time.perf_counter()
            first_row += sum(len(ids) - 1 for ids in text.ids[first_document:stop])
            first_document = stop


def _joined(batches: Iterator[ScoredBatch]) -> Iterator[ScoredBatch]:
    """Put small batches together, keys as float32 on the CPU: many queries at once are searched faster."""
    waiting: list[ScoredBatch] = []
    for batch in batches:
        waiting.append(batch._replace(keys=batch.keys.float().cpu()))
        if sum(len(part.rows) for part in waiting) >= _SEARCHED_TOGETHER:
            yield ScoredBatch(*(torch.cat(parts) for parts in zip(*waiting, strict=True)))
            waiting = []
    if waiting:
        yield ScoredBatch(*(torch.cat(parts) for parts in zip(*waiting, strict=True)))


def gather(parts: list[Retrieved]) -> Retrieved:
    """Put batches together, in the order of the text."""
    order = torch.cat([part.rows for part in parts]).argsort()

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[order]

    tensors = ("rows", "targets", "lm_log_probs", "distances", "tokens", "present")
    return Retrieved(
        **{name: joined(name) for name in tensors},
        model_seconds=sum(part.model_seconds for part in parts),
        search_seconds=sum(part.search_seconds for part in parts),
    )

"""Explain a text: what the memory changed at every token, and which stored tokens did it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .. import ops
from ..datastore import Datastore
from ..documents import Document
from ..mixtures import Mixture
from ..models import LanguageModel
from ._explanation import ExplainedToken, Explanation, Source
from ._retrieval import check_same


def explain(
    lm: LanguageModel,
    text: str,
    memory: Datastore,
    mixture: Mixture,
    *,
    sources: int = 5,
    title: str = "",
    generated_from: int | None = None,
    leave_out_own: bool = True,
) -> Explanation:
    """Explain every token of a text.

    Args:
        lm: The model that made the datastore's keys.
        text: What to explain; it is scored as one document, as `evaluate` would.
        memory: The datastore.
        mixture: How to mix.
        sources: Neighbors shown a token, the heaviest first; as many again that agree with the text.
        title: Shown above the text.
        generated_from: Character offset at which text written by the model begins; None if none was.
        leave_out_own: Where this very text is stored, leave its entries out of the neighbors. False for text that was
            generated: it was written with every document at hand.

    Raises:
        DatastoreMismatch: The datastore was built with another model, tokenizer or key site.
    """
    check_same(lm, memory)
    tokenized = lm.tokenize(Document(id="text", text=text))
    length = len(tokenized.ids)
    explained: list[ExplainedToken | None] = [None] * max(0, length - 1)
    own = np.array([memory.document_range(text) if leave_out_own else (0, 0)])
    for batch in lm.score([tokenized.ids]):
        queries = batch.keys.float().cpu().numpy()
        found = memory.search(queries, mixture.k, own.repeat(len(queries), axis=0) if own.any() else None)
        tokens = torch.from_numpy(memory.values[found.entries].astype(np.int64))
        distances, present = torch.from_numpy(found.distances), torch.from_numpy(found.present)
        log_weights = ops.knn_log_weights(distances, present, temperature=mixture.temperature)
        memory_log_probs = ops.knn_target_log_probs(log_weights, tokens, batch.targets)
        weights = mixture.weights(distances, present)
        mixed = mixture.target_log_probs(batch.log_probs, batch.targets, distances, tokens, present)
        for line, row in enumerate(batch.rows.tolist()):
            explained[row] = ExplainedToken(
                text=_token_text(tokenized, row + 1),
                lm=math.exp(batch.log_probs[line]),
                memory=math.exp(memory_log_probs[line]),
                mixture=math.exp(mixed[line]),
                weight=float(weights[line]),
                sources=_sources(
                    memory,
                    found.entries[line],
                    log_weights[line],
                    distances[line],
                    tokens[line] == batch.targets[line],
                    sources,
                ),
            )
    tokens_out = [token for token in explained if token is not None]
    first_scored = 1
    if lm.tokenizer.bos_token_id is None and length:  # the first token was not scored: show it all the same
        unscored = ExplainedToken(text=_token_text(tokenized, 0), lm=math.nan, memory=0.0, mixture=math.nan, weight=0.0)
        tokens_out.insert(0, unscored)
        first_scored = 0
    if lm.tokenizer.eos_token_id is not None and tokens_out:
        tokens_out.pop()  # the end of the text is scored, but there is nothing to show
    start = None
    if generated_from is not None:
        stops = tokenized.spans[first_scored : first_scored + len(tokens_out), 1]
        start = int(np.searchsorted(stops, generated_from, side="right"))
    settings: dict[str, Any] = {
        "model": lm.name,
        "mixture": mixture.describe(),
        "temperature": float(f"{mixture.temperature:.4g}"),
        "k": mixture.k,
        "memory": f"{len(memory):,} entries, {memory.manifest.documents:,} documents",
    }
    return Explanation(tuple(tokens_out), title or "Explained text", start, settings)


def _token_text(tokenized: Any, place: int) -> str:
    """Text of a token with the white space before it that the tokenizer left out."""
    start = tokenized.spans[place - 1, 1] if place else 0
    return tokenized.document.text[start : tokenized.spans[place, 1]]


def _sources(
    memory: Datastore,
    entries: np.ndarray,
    log_weights: torch.Tensor,
    distances: torch.Tensor,
    agrees: torch.Tensor,
    count: int,
) -> tuple[Source, ...]:
    """Return the heaviest neighbors, and the heaviest of those that agree with the text, which make its support."""
    shares = log_weights.exp()
    heaviest = shares.argsort(descending=True)
    chosen = {*heaviest[:count].tolist(), *heaviest[agrees[heaviest]][:count].tolist()}
    result = []
    for place in sorted(chosen, key=lambda place: -shares[place]):
        if shares[place] > 0:
            origin = memory.provenance(int(entries[place]))
            texts = {"document": origin.document, "before": origin.before, "token": origin.token, "after": origin.after}
            result.append(Source(**texts, share=float(shares[place]), distance=float(distances[place])))
    return tuple(result)

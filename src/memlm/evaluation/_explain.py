"""Explain a text: what the memory changed at every token, and which stored tokens did it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ..documents import Document
from ..evidence import Evidence
from ..mixtures import Mixture, memory_likelihoods
from ..models import Scorer
from ..text import count as number_of
from ._explanation import ExplainedToken, Explanation, Source
from ._retrieval import Memory, Retrieved, Text, as_memories, datastore_of, retrieve


def explain(
    lm: Scorer,
    text: str,
    memory: Any,
    mixture: Mixture,
    *,
    sources: int = 5,
    title: str = "",
    generated_from: int | None = None,
    leave_out_own: bool = True,
) -> Explanation:
    """Explain every token of a text.

    Args:
        lm: The model that made the datastore's keys, or a `BlackBox` whose encoder made them.
        text: What to explain; it is scored as one document, as `evaluate` would.
        memory: A datastore, a cache, or a list of those, as the mixture expects.
        mixture: How to mix.
        sources: Neighbors shown a token, the heaviest first; as many again that agree with the text.
        title: Shown above the text.
        generated_from: Character offset at which text written by the model begins; None if none was.
        leave_out_own: Where this very text is stored, leave its entries out of the neighbors. False for text that was
            generated: it was written with every document at hand.

    Raises:
        ConfigError: A cache remembers less than the mixture looks at.
        DatastoreMismatch: The datastore was built with another model, tokenizer or key site, or a memory is not of the
            kind that the mixture is for.
    """
    memories = as_memories(memory)
    mixture.check_memories(memories)
    document = Document(id="text", text=text)
    tokenized = lm.tokenize(document)
    length = len(tokenized.ids)
    explained: list[ExplainedToken | None] = [None] * max(0, length - 1)
    settings: dict[str, Any] = {"leave_out_own": leave_out_own, "show_progress": False}
    settings |= {"beliefs": mixture.needs_belief, "hidden": mixture.needs_hidden}
    wanted = mixture.wanted if mixture.skips else None
    batches: Iterable[Retrieved] = ()
    if length > 1:
        batches = retrieve(lm, Text(lm, document), memories, mixture.ks, wanted=wanted, **settings)
    for batch in batches:
        evidence = batch.evidence.nearest(mixture.ks)
        mix = mixture.mix(evidence)
        # each memory's p, (n, memories), and what all of them say together
        likelihoods = memory_likelihoods(mix.log_shares, evidence, batch.targets)
        total = mix.weights.sum(dim=1)
        parts = mix.weights / total.clamp_min(1e-30)[:, None] if len(memories) > 1 else torch.ones_like(mix.weights)
        mixed = mixture.target_log_probs(batch.lm_log_probs, batch.targets, evidence)
        shares = torch.cat([share.exp() * parts[:, [place]] for place, share in enumerate(mix.log_shares)], dim=1)
        for line, row in enumerate(batch.rows.tolist()):
            explained[row] = ExplainedToken(
                text=_token_text(tokenized, row + 1),
                lm=math.exp(batch.lm_log_probs[line]),
                memory=float((likelihoods[line] * parts[line]).sum()),
                mixture=math.exp(mixed[line]),
                weight=float(total[line]),
                weights=tuple(mix.weights[line].tolist()),
                sources=_sources(memories, evidence, line, shares[line], int(batch.targets[line]), sources, tokenized),
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
    described = tuple(_describe(item) for item in memories)
    shown: dict[str, Any] = {"model": lm.name, "mixture": mixture.describe(), "memory": " + ".join(described)}
    return Explanation(tuple(tokens_out), title or "Explained text", start, shown, described)


def _token_text(tokenized: Any, place: int) -> str:
    """Text of a token with the white space before it that the tokenizer left out."""
    start = tokenized.spans[place - 1, 1] if place else 0
    return tokenized.document.text[start : tokenized.spans[place, 1]]


def _describe(memory: Memory) -> str:
    datastore = datastore_of(memory)
    if datastore is not None:
        documents = number_of(datastore.manifest.documents, "document")
        return f"{number_of(len(datastore), 'entry', 'entries')}, {documents}"
    return "the last token" if len(memory) == 1 else f"the last {len(memory):,} tokens"


def _sources(
    memories: list[Memory],
    evidence: Evidence,
    line: int,
    shares: torch.Tensor,
    target: int,
    count: int,
    tokenized: Any,
) -> tuple[Source, ...]:
    """Return the heaviest neighbors, and the heaviest of those that agree with the text, which make its support."""
    memory_of = torch.cat([torch.full((f.tokens.shape[1],), place) for place, f in enumerate(evidence.memories)])
    entries, tokens, distances = (
        torch.cat([getattr(found, name)[line] for found in evidence.memories])
        for name in ("entries", "tokens", "distances")
    )
    heaviest = shares.argsort(descending=True)
    agrees = tokens == target
    chosen = {*heaviest[:count].tolist(), *heaviest[agrees[heaviest]][:count].tolist()}
    result = []
    for place in sorted(chosen, key=lambda place: -shares[place]):
        if shares[place] > 0:
            texts = _origin(memories[int(memory_of[place])], int(entries[place]), tokenized)
            result.append(Source(**texts, share=float(shares[place]), distance=float(distances[place])))
    return tuple(result)


def _origin(memory: Memory, entry: int, tokenized: Any, context: int = 60) -> dict[str, str]:
    """Tell where an entry comes from, with the text around it."""
    datastore = datastore_of(memory)
    if datastore is not None:
        origin = datastore.provenance(entry)
        return {name: getattr(origin, name) for name in ("document", "before", "token", "after")}
    text, (start, stop) = tokenized.document.text, (int(place) for place in tokenized.spans[entry + 1])
    start = min(start, int(tokenized.spans[entry, 1]))
    return {
        "document": "this text",
        "before": text[max(0, start - context) : start],
        "token": text[start:stop],
        "after": text[stop : stop + context],
    }

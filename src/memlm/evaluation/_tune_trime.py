"""Tuning one softmax over vocabulary and memories on held-out text, from one retrieval pass."""

from __future__ import annotations

import math
from typing import Any

from ..cache import Cache
from ..errors import ConfigError
from ..evidence import INNER_PRODUCT
from ..mixtures import CACHE, HeldOut, TrimeMixture, check_memory, fit_trime, perplexity
from ..models import Scorer
from ._bootstrap import paired_bootstrap, units
from ._retrieval import Memory, Text, as_memories, gather, retrieve, thinned, warn_if_nothing_is_found
from ._tune import Tuning

_KEPT = 1 << 25  # neighbors of all targets that are held in memory together


def tune_trime(
    lm: Scorer,
    memory: Any,
    source: Any,
    *,
    max_k: int = 1024,
    max_tokens: int | None = 20_000,
    show_progress: bool = True,
) -> Tuning:
    """Choose T, the cache's drop-off by age and the second interpolation by the likelihood of held-out text.

    Where there is more than memory holds, as with a long cache, every second, third, … target is used. Documents of the
    held-out text that are stored in the datastore do not see their own entries.

    Args:
        lm: The model, trained to use such memories; its logits must be known.
        memory: A datastore built with metric="inner_product", a `Cache`, or a list of both in this order.
        source: Held-out text: neither stored nor reported on.
        max_k: Neighbors asked of the datastore.
        max_tokens: Targets read; None reads all.
        show_progress: Show rate and time left on stderr.

    Returns:
        What was found. `mixture` is the best settings even where they do not help: one softmax has no λ to set to 0.

    Raises:
        ConfigError: The memories are others, or the model is a black box.
        CorpusError: No text.
        DatastoreMismatch: The datastore was built with another model, tokenizer or key site, or is not searched by
            inner product.
    """
    memories = _checked(as_memories(memory))
    text = Text(lm, source, max_tokens)
    ks = [len(item) if isinstance(item, Cache) else min(max_k, len(item)) for item in memories]
    every = -(-text.tokens * sum(ks) // _KEPT)
    options = {"beliefs": True, "show_progress": show_progress, "description": "tuning"}
    documents = text.document_of_target[::every]
    cached = gather(thinned(retrieve(lm, text, memories, ks, **options), every), len(documents))
    if not isinstance(memories[0], Cache):
        warn_if_nothing_is_found(cached.found, 3)
    held = HeldOut(cached.targets, cached.lm_log_probs, cached.evidence, units(documents)[0])
    best = fit_trime(held)
    mixed, alone = held.log_probs(best), cached.lm_log_probs.double()
    gain = paired_bootstrap((mixed - alone).numpy(), documents)
    return Tuning(
        mixture=best,
        helps=gain.low > 0 if math.isfinite(gain.low) else gain.mean > 0,
        best=best,
        lm_perplexity=perplexity(-float(alone.mean())),
        perplexity=perplexity(-float(mixed.mean())),
        gain=gain,
        tokens=len(held),
        grid=[],
    )


def _checked(memories: list[Memory]) -> list[Memory]:
    """Refuse memories that one softmax has no place for."""
    for item in memories:
        check_memory(TrimeMixture.kind, CACHE if isinstance(item, Cache) else INNER_PRODUCT, item)
    if [isinstance(item, Cache) for item in memories] not in ([False], [True], [False, True]):
        raise ConfigError(f"the memories are {memories}; expected a datastore, a Cache, or both in this order")
    return memories

"""Every way to choose λ side by side, fitted to one pass over `valid` and judged on one pass over `test`."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

from ..cache import Cache
from ..datastore import Datastore
from ..evidence import SQUARED_L2
from ..mixtures import HeldOut, KnnMixture, LearnedMixture, check_memory, skipping_curve
from ..models import LanguageModel
from ._analysis import analyze
from ._bootstrap import units
from ._comparison import Comparison, Saving
from ._evaluate import evaluate
from ._judge import judge, rows_of
from ._methods import fit_all
from ._retrieval import Retrieved, Text, gather, retrieve, warn_if_nothing_is_found


def compare(
    lm: LanguageModel,
    memory: Datastore,
    valid: Any,
    test: Any,
    *,
    max_k: int = 1024,
    cache: int = 1024,
    max_tokens: int | None = 20_000,
    show_progress: bool = True,
) -> Comparison:
    """Fit every mixture to `valid` and report each once on `test`.

    Warns where a document is in both, and where nothing can be fitted because nothing in `valid` finds a neighbor.

    Args:
        lm: The model that made the datastore's keys.
        memory: The datastore.
        valid: Held-out text to fit to: neither stored nor reported on.
        test: Text to report on.
        max_k: Most neighbors a target.
        cache: Tokens that the continuous cache remembers.
        max_tokens: Targets used of each text; None uses all.
        show_progress: Show rate and time left on stderr.

    Raises:
        CorpusError: No text.
        DatastoreMismatch: The datastore was built with another model, tokenizer or key site, or is not searched by
            squared L2.
    """
    check_memory(KnnMixture.kind, SQUARED_L2, memory)
    settings = {"max_k": max_k, "cache": cache, "max_tokens": max_tokens, "show_progress": show_progress}
    sides = [
        read(lm, memory, source, description=f"reading {name}", **settings)
        for name, source in (("valid", valid), ("test", test))
    ]
    return compare_read(lm, memory, *sides, show_progress=show_progress)


class Read(NamedTuple):
    """A text with what a datastore and a cache found for it."""

    text: Text
    found: Retrieved
    held: HeldOut


def read(
    lm: LanguageModel,
    memory: Datastore,
    source: Any,
    *,
    max_k: int,
    cache: int,
    max_tokens: int | None,
    show_progress: bool,
    description: str,
) -> Read:
    """Pass over a text once; see `compare`."""
    text, memories, ks = Text(lm, source, max_tokens), [memory, Cache(cache)], (min(max_k, len(memory)), cache)
    batches = retrieve(lm, text, memories, ks, beliefs=True, show_progress=show_progress, description=description)
    found = gather(batches, text.tokens)
    groups = units(text.document_of_target)[0]
    held = HeldOut(found.targets, found.lm_log_probs, found.evidence, groups, memory.statistics())
    return Read(text, found, held)


def compare_read(
    lm: LanguageModel, memory: Datastore, valid: Read, test: Read, *, show_progress: bool = False
) -> Comparison:
    """Fit to one text and judge by the other; see `compare`."""
    _warn(valid, test)
    judged = test.held
    methods = fit_all(valid.held, valid.found, valid.text)
    results = {name: judge(item, judged) for name, item in methods.fitted.items()}
    learned = methods.fitted["learned"].mixture
    network = learned if isinstance(learned, LearnedMixture) else None  # none is fitted where nothing finds a neighbor
    return Comparison(
        rows=rows_of(methods, results, judged, test.found, test.text),
        tokens=test.text.tokens,
        valid_tokens=valid.text.tokens,
        unit=units(test.text.document_of_target)[1],
        skipping=[] if network is None else skipping_curve(judged.memory(0), network),
        saving=_saving(lm, memory, test.text, network, show_progress) if network and network.skips else None,
        analysis=analyze(memory, test.text, judged, methods.fitted, results),
        settings={
            "model": lm.name,
            "memory": {"entries": len(memory), "index": memory.index.details},
            "windows": {"context": lm.windows.context, "stride": lm.windows.stride},
            "cache": judged.evidence.memories[1].tokens.shape[1],
        },
        mixtures={name: item.mixture for name, item in methods.fitted.items()},
    )


def _saving(lm: LanguageModel, memory: Datastore, text: Text, learned: LearnedMixture, show_progress: bool) -> Saving:
    """Time the learned weight with and without its threshold; what it saves shows only in a pass that skips."""
    always, skipping = (
        evaluate(lm, text, memory, mixture, show_progress=show_progress)
        for mixture in (dataclasses.replace(learned, threshold=0.0), learned)
    )
    return Saving(
        skipped=1 - skipping.settings["searched"],
        perplexity_always=always.results[-1].perplexity,
        perplexity=skipping.results[-1].perplexity,
        tokens_per_second_always=always.results[-1].tokens_per_second,
        tokens_per_second=skipping.results[-1].tokens_per_second,
    )


def _warn(valid: Read, test: Read) -> None:
    """Warn where the numbers would mislead: text on both sides, or nothing to fit to."""
    seen = set(valid.text.texts)
    both = [name for name, text in zip(test.text.names, test.text.texts, strict=True) if text in seen]
    if both:
        warnings.warn(
            f"{len(both)} of {len(test.text.names)} documents of the test text, such as {both[0]!r}, are in the text "
            "to fit to as well: what is fitted has seen them; keep the two apart",
            stacklevel=4,
        )
    warn_if_nothing_is_found(valid.found.found, 4)

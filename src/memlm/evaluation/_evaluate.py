"""Perplexity with and without the memory, on the same tokens."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cache import Cache
from ..datastore import Pointers
from ..mixtures import Mixture, perplexity
from ..models import Scorer
from ..text import count
from ._bootstrap import Interval, paired_bootstrap
from ._retrieval import Memory, Text, as_memories, retrieve


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One method on a text.

    Attributes:
        method: "lm" or the kind of the mixture.
        nats: Total negative log likelihood.
        tokens: Targets scored, the end of every document included.
        words: White-space separated words in the text.
        bytes: UTF-8 bytes in the text.
        seconds: Time that scoring took.
    """

    method: str
    nats: float
    tokens: int
    words: int
    bytes: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """Per token."""
        return perplexity(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Per word: the same total, divided among fewer units."""
        return perplexity(self.nats / max(1, self.words))

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text."""
        return self.nats / math.log(2) / max(1, self.bytes)

    @property
    def tokens_per_second(self) -> float:
        """Targets scored in a second."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None for what is infinite (where λ = 1 made a token impossible)."""
        return finite(
            {
                "method": self.method,
                "perplexity": self.perplexity,
                "word_perplexity": self.word_perplexity,
                "bits_per_byte": self.bits_per_byte,
                "byte_perplexity": perplexity(self.bits_per_byte * math.log(2)),
                "nats": self.nats,
                "tokens": self.tokens,
                "words": self.words,
                "bytes": self.bytes,
                "tokens_per_second": self.tokens_per_second,
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The model alone and the mixture, token by token.

    Attributes:
        results: One a method; the model alone comes first.
        gain: Nats a token that the mixture gains, with its interval.
        helped: Share of tokens that the mixture makes more likely by more than 1 %.
        hurt: Share that it makes less likely by more than 1 %.
        settings: Mixture, windows and memory.
        targets: Int64, shape (tokens,).
        lm_log_probs: Natural logs, float64, shape (tokens,).
        log_probs: Of the mixture, same shape.
        documents: Number of each token's document, int64, same shape.
    """

    results: tuple[Result, ...]
    gain: Interval
    helped: float
    hurt: float
    settings: dict[str, Any]
    targets: npt.NDArray[np.int64]
    lm_log_probs: npt.NDArray[np.float64]
    log_probs: npt.NDArray[np.float64]
    documents: npt.NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        """Return the table, the gain and the settings as plain values."""
        return {
            "results": [result.to_dict() for result in self.results],
            "gain": self.gain.to_dict(),
            "helped": self.helped,
            "hurt": self.hurt,
            "settings": self.settings,
        }

    def __str__(self) -> str:
        header = f"{'method':<10}{'perplexity/token':>18}{'/word':>12}{'bits/byte':>11}{'tokens/s':>11}"
        lines = [header]
        for item in self.results:
            word = f"{item.word_perplexity:,.1f}" if item.word_perplexity < 1e7 else f"{item.word_perplexity:.2e}"
            lines.append(
                f"{item.method:<10}{item.perplexity:>18,.2f}{word:>12}{item.bits_per_byte:>11.3f}"
                f"{item.tokens_per_second:>11,.0f}"
            )
        first, last = self.results[0], self.results[-1]
        lines.append(
            f"{count(first.tokens, 'token')}; perplexity {100 * (last.perplexity / first.perplexity - 1):+.1f} %; gain "
            f"{self.gain}; {100 * self.helped:.0f} % of tokens helped, {100 * self.hurt:.0f} % hurt"
        )
        return "\n".join(lines)


def evaluate(
    lm: Scorer,
    source: Any,
    memory: Any,
    mixture: Mixture,
    *,
    max_tokens: int | None = None,
    leave_out_own: bool = True,
    show_progress: bool = True,
) -> Evaluation:
    """Score text by the model alone and by the mixture, in one pass.

    Times are of the same pass: the model's forward alone, and forward, search and mixing together.

    Args:
        lm: The model that made the datastore's keys, or a `BlackBox` whose encoder made them.
        source: Text neither stored in the datastore nor tuned on; documents that are stored do not see their own
            entries.
        memory: A datastore, alone or with `Pointers`, a cache, or a list of those, as the mixture expects.
        mixture: How to mix.
        max_tokens: Targets scored; None scores all.
        leave_out_own: False lets a stored document find itself, which measures nothing but that storing works.
        show_progress: Show rate and time left on stderr.

    Raises:
        ConfigError: A cache remembers less than the mixture looks at.
        CorpusError: No text.
        DatastoreMismatch: The datastore was built with another model, tokenizer or key site, or a memory is not of the
            kind that the mixture is for.
    """
    mixture.check_memories(as_memories(memory))
    text = source if isinstance(source, Text) else Text(lm, source, max_tokens)
    targets = np.zeros(text.tokens, np.int64)
    lm_log_probs, log_probs = np.zeros(text.tokens), np.zeros(text.tokens)
    model_seconds = memory_seconds = searched = 0.0
    batches = retrieve(
        lm,
        text,
        memory,
        mixture.ks,
        beliefs=mixture.needs_belief,
        hidden=mixture.needs_hidden,
        wanted=mixture.wanted if mixture.skips else None,
        leave_out_own=leave_out_own,
        show_progress=show_progress,
    )
    for batch in batches:
        started = time.perf_counter()
        mixed = mixture.target_log_probs(batch.lm_log_probs, batch.targets, batch.evidence)
        searched += batch.searched * len(batch.rows)
        memory_seconds += sum(batch.search_seconds) + time.perf_counter() - started
        model_seconds += batch.model_seconds
        rows = batch.rows.numpy()
        targets[rows], lm_log_probs[rows], log_probs[rows] = batch.targets, batch.lm_log_probs, mixed
    difference = log_probs - lm_log_probs
    documents = text.document_of_target
    sizes = {"tokens": text.tokens, "words": text.words, "bytes": text.bytes}
    return Evaluation(
        results=(
            Result(method="lm", nats=-float(lm_log_probs.sum()), seconds=model_seconds, **sizes),
            Result(
                method="knn-lm" if mixture.kind == "knn" else mixture.kind,
                nats=-float(log_probs.sum()),
                seconds=model_seconds + memory_seconds,
                **sizes,
            ),
        ),
        gain=paired_bootstrap(difference, documents),
        helped=float((difference > 0.01).mean()),
        hurt=float((difference < -0.01).mean()),
        settings={
            "mixture": mixture.to_dict(),
            "windows": {"context": lm.windows.context, "stride": lm.windows.stride},
            "memories": [_describe(item) for item in as_memories(memory)],
            "searched": searched / text.tokens,
        },
        targets=targets,
        lm_log_probs=lm_log_probs,
        log_probs=log_probs,
        documents=documents,
    )


def _describe(memory: Memory) -> dict[str, Any]:
    if isinstance(memory, Cache):
        return {"cache": memory.length}
    if isinstance(memory, Pointers):
        least = memory.least if math.isfinite(memory.least) else None
        return {**_describe(memory.memory), "pointers": least, "stream": memory.stream}
    return {
        "path": str(memory.path),
        "entries": len(memory),
        "windows": memory.manifest.windows,
        "index": memory.index.details,
    }


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Put None, which JSON has, in the place of numbers that are not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }

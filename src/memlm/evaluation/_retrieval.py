"""One pass over text: what the model and the memory each say of every target."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import Cache
from ..datastore import Datastore, Pointers
from ..documents import Corpus, Document, describe
from ..errors import ConfigError, CorpusError
from ..evidence import Belief, Evidence, Found, join_beliefs, read_lately
from ..models import ScoredBatch, Scorer
from ..neighbors import Neighbors
from ..progress import progress
from ..text import count

_GROUP = 1 << 15  # tokens of documents that are cut and batched together
_SEARCHED_TOGETHER = 1 << 13  # queries
_FOUND_TOGETHER = 1 << 23  # entries, for all queries of a batch

Memory = Datastore | Cache | Pointers


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieved:
    """Some targets with what both sides know of them.

    Attributes:
        rows: Int64, shape (n,): number of each target in the corpus.
        targets: Int64, shape (n,).
        lm_log_probs: log p_LM of the targets, float32, shape (n,).
        evidence: What the memories found and, if asked for, what the model believes.
        searched: Share of the targets for which a datastore was searched, the mean of all datastores; 0 without one.
        model_seconds: Time of the model's forward pass.
        search_seconds: Time of the search, memory by memory.
    """

    rows: Tensor
    targets: Tensor
    lm_log_probs: Tensor
    evidence: Evidence
    searched: float
    model_seconds: float
    search_seconds: tuple[float, ...]

    @property
    def found(self) -> Found:
        """What the first memory found."""
        return self.evidence.memories[0]


class Text:
    """Held-out text, tokenized, and cut off after a number of targets.

    Args:
        lm: Whose tokenizer to use.
        source: Documents; anything that `Corpus` takes, or one `Document` as it is.
        max_tokens: Take documents in an order that depends on nothing but their number until there are so many
            targets, and cut the last one; None takes everything, in order.

    Raises:
        ConfigError: `max_tokens` is below 1.
        CorpusError: No text, or no token of it is a target.
    """

    def __init__(self, lm: Scorer, source: Any, max_tokens: int | None = None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; expected at least 1, or None for the whole text")
        documents = [source] if isinstance(source, Document) else list(Corpus(source))
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


def as_memories(memory: Any) -> list[Memory]:
    """Return one memory or several as a list.

    Raises:
        ConfigError: It is neither a datastore, alone or with pointers, nor a cache, nor a list of those.
    """
    memories = list(memory) if isinstance(memory, list | tuple) else [memory]
    for item in memories:
        if not isinstance(item, Memory):
            raise ConfigError(f"a memory is {item!r}; expected a Datastore, a Cache, or a list of those")
    if not memories:
        raise ConfigError("there is no memory in the list; expected at least one Datastore or Cache")
    return memories


def datastore_of(memory: Memory) -> Datastore | None:
    """Return what a memory searches; None for a cache."""
    if isinstance(memory, Pointers):
        return memory.memory
    return memory if isinstance(memory, Datastore) else None


def check_same(lm: Scorer, memory: Datastore) -> None:
    """Refuse a model that did not make the datastore; warn where it is fed in other windows."""
    memory.manifest.check_bound(lm.identity)
    if lm.identity["windows"] != memory.manifest.windows:
        warnings.warn(
            f"the datastore was built with windows {memory.manifest.windows}, the model now runs with "
            f"{lm.identity['windows']}: keys of the same text differ a little; load the model with the same context "
            "and stride",
            stacklevel=3,
        )


def warn_if_nothing_is_found(found: Found, stacklevel: int) -> None:
    """Warn where a datastore found nothing for a whole text to fit to; `stacklevel` as in `warnings.warn`."""
    if not bool(found.present.any()):
        warnings.warn(
            "no token of the text to fit to finds a neighbor, since a stored document does not see its own entries: "
            "λ of the datastore is 0; fit to text that is not stored",
            stacklevel=stacklevel + 1,
        )


def retrieve(
    lm: Scorer,
    text: Text,
    memory: Any,
    ks: Sequence[int],
    *,
    beliefs: bool = False,
    hidden: bool = False,
    wanted: Callable[[Belief], Tensor | None] | None = None,
    leave_out_own: bool = True,
    show_progress: bool = True,
    description: str = "scoring",
) -> Iterator[Retrieved]:
    """Score every target by the model and find its neighbors, batch by batch.

    Args:
        lm: The model that made the keys, or a `BlackBox` whose encoder made them.
        text: What to score.
        memory: Where to search: a datastore, alone or with pointers, a cache, or a list of those.
        ks: Neighbors a target, one number a memory; a cache returns all that it remembers.
        beliefs: Keep what the model believes in the evidence.
        hidden: With it, keep what the output embedding reads, and that layer.
        wanted: Says from beliefs for which targets to search; the others find nothing. None searches for all.
        leave_out_own: Where a document of the text is stored in a datastore, leave its entries out of its neighbors.
        show_progress: Show rate and time left on stderr.
        description: What to call the work there.

    Raises:
        ConfigError: There are not as many ks as memories.
        DatastoreMismatch: A datastore was built with another model, tokenizer or key site.
        ModelError: `hidden` is asked of a black box, or of a model whose logits are more than its last layer's.
    """
    memories = as_memories(memory)
    output = lm.output.to("cpu") if hidden else None  # mixing is done where the evidence is
    if len(ks) != len(memories):
        asked = count(len(ks), "memory", "memories")
        raise ConfigError(f"the mixture is for {asked}, {len(memories)} are given; pass one for each")
    own: dict[int, np.ndarray] = {}
    for place, datastore in enumerate(map(datastore_of, memories)):
        if datastore is not None:
            check_same(lm, datastore)
            if leave_out_own:
                own[place] = np.array([datastore.document_range(item) for item in text.texts]).reshape(-1, 2)
    owners = text.document_of_target
    whole = any(not isinstance(item, Datastore) for item in memories)
    streams = any(isinstance(item, Pointers) for item in memories)  # the more together, the better
    sizes = [len(item) if isinstance(item, Cache) else k for item, k in zip(memories, ks, strict=True)]
    together = max(1, min(_SEARCHED_TOGETHER, _FOUND_TOGETHER // max(1, sum(sizes))))
    with progress(description, text.tokens, show=show_progress) as advance:
        first_row = first_document = 0
        while first_document < len(text.ids):
            stop, size = first_document, 0
            while stop < len(text.ids) and (size == 0 or size + len(text.ids[stop]) <= _GROUP):
                size += len(text.ids[stop])
                stop += 1
            group = text.ids[first_document:stop]
            read = torch.from_numpy(np.concatenate([ids[:-1] for ids in group]))  # a token for each target of the group
            lengths = np.array([len(ids) - 1 for ids in group])
            starts = torch.from_numpy(np.repeat(lengths.cumsum() - lengths, lengths))
            started = time.perf_counter()
            batches = _joined(lm.score(group, beliefs=beliefs or wanted is not None, hidden=hidden))
            past = torch.empty(0)  # with a cache or pointers, the keys of the group's targets in order
            if whole:
                everything = _put_together(list(batches))
                everything = _some_of(everything, everything.rows.argsort())
                past, batches = everything.keys, iter([everything])
            for batch in batches if streams else _cut(batches, together):
                scored = time.perf_counter()
                rows = batch.rows + first_row
                asked = None if wanted is None or batch.belief is None else wanted(batch.belief)
                belief = batch.belief if beliefs else None
                if belief is not None:
                    belief = belief._replace(read=read_lately(read, batch.rows, starts[batch.rows]))
                found, times, shares = [], [scored], []
                wanted_share = 1.0 if asked is None else float(asked.float().mean())
                for place, (item, k) in enumerate(zip(memories, ks, strict=True)):
                    exclude = own[place][owners[rows.numpy()]] if place in own else None
                    if exclude is not None and not exclude.any():
                        exclude = None
                    if isinstance(item, Cache):
                        found.append(_recall(item, past, group, batch.rows))
                    elif isinstance(item, Pointers):
                        documents, some = owners[rows.numpy()], None if asked is None else asked.numpy()
                        part = item.lookup(batch.keys.numpy(), batch.targets.numpy(), documents, k, exclude, some)
                        found.append(part.found)
                        shares.append(float(part.searched.mean()))
                    else:
                        found.append(_lookup(item, batch.keys, k, exclude, asked))
                        shares.append(wanted_share)
                    times.append(time.perf_counter())
                yield Retrieved(
                    rows=rows,
                    targets=batch.targets,
                    lm_log_probs=batch.log_probs,
                    evidence=Evidence(tuple(found), belief, output),
                    searched=sum(shares) / max(1, len(shares)),
                    model_seconds=scored - started,
                    search_seconds=tuple(after - before for before, after in pairwise(times)),
                )
                advance(len(rows))
                started = time.perf_counter()
            first_row += sum(len(ids) - 1 for ids in group)
            first_document = stop


def _lookup(memory: Datastore, keys: Tensor, k: int, exclude: np.ndarray | None, asked: Tensor | None) -> Found:
    """Search a datastore for those targets that ask for it."""
    if asked is None:
        return memory.lookup(keys.numpy(), k, exclude)
    exclude = None if exclude is None else exclude[asked.numpy()]
    if not asked.any():
        return memory.with_values(Neighbors.empty(len(keys), k))
    return memory.lookup(keys[asked].numpy(), k, exclude).among(asked)


def _recall(cache: Cache, keys: Tensor, documents: list[np.ndarray], rows: Tensor) -> Found:
    """Let some targets (consecutive rows) look back, each within its own document; `keys` are those of all rows."""
    parts, start = [], 0
    first, stop = int(rows[0]), int(rows[-1]) + 1
    for ids in documents:
        end = start + len(ids) - 1
        if start < stop and first < end:
            tokens = torch.from_numpy(ids[:-1])
            parts.append(cache.recall(keys[start:end], tokens, max(first, start) - start, min(stop, end) - start))
        start = end
    return Found.joined(parts)


def _cut(batches: Iterable[ScoredBatch], together: int) -> Iterator[ScoredBatch]:
    """Cut batches into equal parts of at most so many targets."""
    for batch in batches:
        parts = -(-len(batch.rows) // together)
        for rows in torch.arange(len(batch.rows)).tensor_split(max(1, parts)):
            yield _some_of(batch, rows) if parts > 1 else batch


def _some_of(batch: ScoredBatch, rows: Tensor) -> ScoredBatch:
    belief = None if batch.belief is None else batch.belief.rows(rows)
    return ScoredBatch(batch.rows[rows], batch.targets[rows], batch.log_probs[rows], batch.keys[rows], belief)


def _joined(batches: Iterator[ScoredBatch]) -> Iterator[ScoredBatch]:
    """Put small batches together, keys as float32 on the CPU: many queries at once are searched faster."""
    waiting: list[ScoredBatch] = []
    for batch in batches:
        waiting.append(batch._replace(keys=batch.keys.float().cpu()))
        if sum(len(part.rows) for part in waiting) >= _SEARCHED_TOGETHER:
            yield _put_together(waiting)
            waiting = []
    if waiting:
        yield _put_together(waiting)


def _put_together(batches: list[ScoredBatch]) -> ScoredBatch:
    beliefs = [batch.belief for batch in batches if batch.belief is not None]
    return ScoredBatch(
        rows=torch.cat([batch.rows for batch in batches]),
        targets=torch.cat([batch.targets for batch in batches]),
        log_probs=torch.cat([batch.log_probs for batch in batches]),
        keys=torch.cat([batch.keys for batch in batches]),
        belief=join_beliefs(beliefs) if beliefs else None,
    )


def thinned(batches: Iterable[Retrieved], every: int) -> Iterator[Retrieved]:
    """Keep every so many-th target, numbered anew."""
    for batch in batches:
        kept = batch.rows % every == 0
        yield dataclasses.replace(
            batch,
            rows=batch.rows[kept] // every,
            targets=batch.targets[kept],
            lm_log_probs=batch.lm_log_probs[kept],
            evidence=batch.evidence.rows(kept),
        )


def gather(parts: Iterable[Retrieved], tokens: int | None = None) -> Retrieved:
    """Put batches together, in the order of the text; of the entries, only the nearest is kept.

    A target with its neighbors takes up tens of kilobytes. Batches that come one by one, their number of targets being
    known, go straight to their place, so that there is never more than one beside the whole.

    Args:
        parts: From `retrieve`; at least one.
        tokens: Targets in all of them: of `retrieve(lm, text, …)` it is text.tokens, because every target comes once,
            under its number in the text. None counts them, and holds all batches at once.
    """
    if tokens is None:
        parts = list(parts)
        tokens = sum(len(part.rows) for part in parts)
    targets, lm_log_probs = torch.empty(tokens, dtype=torch.long), torch.empty(tokens)
    evidence: Evidence | None = None
    placed, searched, model_seconds = 0, 0.0, 0.0
    search_seconds: list[tuple[float, ...]] = []
    for part in parts:
        memories = tuple(found._replace(entries=found.entries[:, :1]) for found in part.evidence.memories)
        kept = part.evidence._replace(memories=memories)
        evidence = kept.room(tokens) if evidence is None else evidence
        evidence.put(part.rows, kept)
        targets[part.rows], lm_log_probs[part.rows] = part.targets, part.lm_log_probs
        placed += len(part.rows)
        searched += part.searched * len(part.rows)
        model_seconds += part.model_seconds
        search_seconds.append(part.search_seconds)
        del part, memories, kept  # before the next batch is made
    assert evidence is not None
    assert placed == tokens, f"{placed} targets for {tokens} places: the others would hold anything"
    return Retrieved(
        rows=torch.arange(tokens),
        targets=targets,
        lm_log_probs=lm_log_probs,
        evidence=evidence,
        searched=searched / tokens,
        model_seconds=model_seconds,
        search_seconds=tuple(sum(times) for times in zip(*search_seconds, strict=True)),
    )

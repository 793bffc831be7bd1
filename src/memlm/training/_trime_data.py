"""The documents of a recipe as token ids, kept in the folder of the run, and as segments in batches."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..documents import Corpus
from ..files import atomic_writer
from ..models import LanguageModel
from ..progress import progress
from ._run import file_names
from ._segments import Ids, Segments, bm25_segments, consecutive_segments
from ._trime_recipe import BM25, TrimeRecipe


def train_segments(recipe: TrimeRecipe, lm: LanguageModel, output: Path, show: bool) -> Segments:
    """Return the segments of the training text in the order of an epoch."""
    documents = documents_of(recipe.train, lm, output / "train.safetensors", None, show)
    if recipe.batches.order != BM25:
        return _segments(recipe, lm, documents)
    path = output / "chain.npy"  # of the search by BM25, which takes minutes
    chain = np.load(path) if path.exists() else None
    segments = _segments(recipe, lm, documents, chain=chain, show_progress=show)
    if chain is None:
        with atomic_writer(path) as file:
            np.save(file, segments.chain)
    return segments


def valid_segments(recipe: TrimeRecipe, lm: LanguageModel, output: Path, show: bool) -> dict[str, Segments]:
    """Return the segments of each validation text, which shows a batch as much memory as in training."""
    limit = recipe.schedule.valid_tokens
    files = [output / f"valid-{number}.safetensors" for number in range(len(recipe.valid))]
    return {
        name: _segments(recipe, lm, documents_of([path], lm, file, limit, show))
        for name, path, file in zip(file_names(recipe.valid), recipe.valid, files, strict=True)
    }


def _segments(recipe: TrimeRecipe, lm: LanguageModel, documents: list[Ids], **options: Any) -> Segments:
    batches, (streams, rows) = recipe.batches, recipe.batches.layout
    padding = lm.tokenizer.eos_token_id or 0
    if batches.order == BM25:
        options |= {"rows": rows, "seed": recipe.schedule.seed, "across_documents": not recipe.memory.own_document}
        return bm25_segments(documents, batches.length, padding=padding, **options)
    return consecutive_segments(documents, batches.length, streams=streams, consecutive=rows, padding=padding)


def documents_of(paths: list[str], lm: LanguageModel, cache: Path, limit: int | None, show: bool) -> list[Ids]:
    """Return the token ids of documents, of the first `limit` tokens; they are kept in a file."""
    if not cache.exists():
        pieces: list[Ids] = []
        left = math.inf if limit is None else limit
        with progress(f"tokenizing {cache.stem}", None, show=show) as advance:
            for document in Corpus(paths):
                ids = lm.tokenize(document).ids.astype(np.int32)
                pieces.append(ids if len(ids) <= left else ids[: int(left)])
                left -= len(pieces[-1])
                advance(len(pieces[-1]))
                if left <= 0:
                    break
        starts = np.cumsum([0, *(len(piece) for piece in pieces)])
        with atomic_writer(cache) as file:
            file.write(safetensors.numpy.save({"ids": np.concatenate(pieces), "starts": starts}))
    stored = safetensors.numpy.load_file(cache)
    return [stored["ids"][first:stop] for first, stop in pairwise(stored["starts"].tolist())]


class Clock:
    """Counts the targets that were seen after so many updates; an epoch ends with an update."""

    def __init__(self, segments: Segments, accumulate: int) -> None:
        per_update = segments.rows_per_batch * accumulate
        counts = np.add.reduceat(segments.targets, np.arange(0, len(segments), per_update))
        self.updates = len(counts)  # of an epoch
        self._totals = np.cumsum([0, *counts.tolist()])

    def tokens(self, updates: int) -> int:
        """Return how many targets so many updates see."""
        epochs, rest = divmod(updates, self.updates)
        return int(epochs * self._totals[-1] + self._totals[rest])

"""What changes to a large datastore cost: a document added, found and removed, beside the model's pass over it.

    python -m benchmarks.living FOLDER [--entries 1000000]

Makes a datastore of random keys of the reference model's width in FOLDER, unless it is there, behind an IVF index. The
document has about 1,000 tokens. Medians of seven rounds; add and remove include everything until they return: writing,
fsync, and showing the new version.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import memlm

RESULTS = Path(__file__).parent / "results"


class RandomKeys:
    """The reference model's identity, with keys that cost nothing."""

    def __init__(self, lm: Any) -> None:
        self.identity, self.key_width, self.tokenize = lm.identity, lm.key_width, lm.tokenize
        self._draw = torch.Generator().manual_seed(0)

    def keys(self, sequences: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for ids in sequences:
            rows = torch.arange(start, start + len(ids) - 1)
            yield rows, torch.randn(len(rows), self.key_width, generator=self._draw)
            start += len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--entries", type=int, default=1_000_000)
    options = parser.parse_args()
    lm = memlm.reference_lm()
    words = [
        "the",
        "of",
        "a",
        "house",
        "rain",
        "bird",
        "letter",
        "morning",
        "box",
        "roof",
        "sold",
        "bought",
        "was",
        "in",
        "on",
        "over",
        "said",
        "that",
        "it",
    ]
    dice = np.random.default_rng(0)
    path = options.folder / f"{options.entries}"
    if not path.exists():
        texts = (" ".join(dice.choice(words, 900)) for _ in range(options.entries // 900))
        source = [memlm.Document(f"d{number}", text) for number, text in enumerate(texts)]
        memlm.Datastore.build(RandomKeys(lm), source, path)
    memory = memlm.Datastore(path)
    document = memlm.Document("new", " ".join(dice.choice(words, 960)))
    tokens = len(lm.tokenize(document).ids)
    rounds: dict[str, list[float]] = {}
    for _ in range(7):
        timed(rounds, "forward pass", lambda: [0 for _ in lm.keys([lm.tokenize(document).ids])])
        timed(rounds, "add", lambda: memory.add(lm, [document]))
        first, stop = memory.document_range(document.text)
        queries = memory.keys.gather_keys(np.arange(first, stop)).float().numpy()
        found = memory.search(queries, 8)
        assert np.isin(found.entries[:, 0], np.arange(first, stop)).mean() > 0.99
        timed(rounds, "remove", lambda: memory.remove("new"))
        assert not np.isin(memory.search(queries, 8).entries, np.arange(first, stop)).any()
    medians = {name: 1000 * statistics.median(values) for name, values in rounds.items()}
    result = {"entries": len(memory), "documents": memory.manifest.documents, "tokens": tokens, "ms": medians}
    (RESULTS / "living.json").write_text(json.dumps(result, indent=1) + "\n")
    limit = 2 * medians["forward pass"] + 100
    lines = [
        "# What changes to a datastore cost",
        "",
        f"{result['entries']:,} entries of {result['documents']:,} documents, an IVF index; a document of {tokens:,} tokens",
        "is added, found and removed. Milliseconds on two cores, medians of seven rounds.",
        "",
        "    python -m benchmarks.living FOLDER",
        "",
        "| | ms |",
        "|---|---|",
        *(f"| {name} | {value:,.0f} |" for name, value in medians.items()),
        "",
        f"Adding: {medians['add']:,.0f} ms against {limit:,.0f} ms, twice the model's pass and 100 ms. Each time the document's",
        "keys were then their own nearest neighbors, and were found no more after it was removed.",
    ]
    (RESULTS / "living.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def timed(rounds: dict[str, list[float]], name: str, work: Callable[[], Any]) -> None:
    started = time.perf_counter()
    work()
    rounds.setdefault(name, []).append(time.perf_counter() - started)


if __name__ == "__main__":
    main()

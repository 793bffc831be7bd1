"""What carried keys and values are worth: segments alone, with what is carried, and overlapping windows.

    python -m benchmarks.carry DATA_FOLDER [--tokens 8000]

The reference model on `valid` of WikiText-2 and of the novels, whole documents up to so many tokens. Segments of 128
tokens, targets all but a document's first; windows overlap so that every token has 384 to 512 tokens of context, where
there are so many. It was trained on texts of 512 tokens. Tokens a second are ratios in one run, on cores that other
work shared; of the novels one row has text, the others are padding.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memlm
from memlm.models import CarriedCache
from memlm.training import document_streams

RESULTS = Path(__file__).parent / "results"
SEGMENT, ROWS = 128, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=int, default=8_000)
    options = parser.parse_args()
    lm = memlm.reference_lm()
    results: dict[str, Any] = {}
    for corpus in ("wikitext2", "novels"):
        documents, size = [], 0
        for document in memlm.Corpus(options.data / f"{corpus}.valid.jsonl.xz"):
            ids = lm.tokenize(document).ids[: options.tokens - size]
            documents.append(ids)
            size += len(ids)
            if size >= options.tokens:
                break
        rows = {"segments alone": carried(lm.model, documents, 0)}
        for length in (128, 384, 1024):
            rows[f"{length:,} carried"] = carried(lm.model, documents, length)
        rows["overlapping windows"] = overlapping(lm.model, documents)
        results[corpus] = rows
    (RESULTS / "carry.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        "# Carried keys and values",
        "",
        __doc__.split("\n\n", 2)[2].strip(),
        "",
        "    python -m benchmarks.carry DATA",
        "",
    ]
    lines += ["| | " + " | ".join(f"{name}, perplexity | tokens/s" for name in results) + " |"]
    lines += ["|---" * (2 * len(results) + 1) + "|"]
    for name in results["novels"]:
        cells = [
            f"{rows[name]['perplexity']:.2f} | {rows[name]['rate'] / rows['segments alone']['rate']:.2f} ×"
            for rows in results.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (RESULTS / "carry.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


@torch.no_grad()
def carried(model: Any, documents: list[np.ndarray], length: int) -> dict[str, float]:
    """Score segment by segment; 0 carries nothing."""
    cache = CarriedCache(model, length) if length else None
    total, count, started = 0.0, 0, time.perf_counter()
    for batch in document_streams(documents, ROWS, SEGMENT):
        if cache is None:
            logits = model(batch.input_ids, attention_mask=batch.known).logits
        else:
            logits = cache(batch.input_ids, batch.begins, batch.known).logits
        total += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
        )
        count += int((batch.targets >= 0).sum())
    return {"perplexity": math.exp(total / count), "rate": count / (time.perf_counter() - started)}


@torch.no_grad()
def overlapping(model: Any, documents: list[np.ndarray]) -> dict[str, float]:
    """Score every segment behind 384 tokens of context, computed anew each time."""
    total, count, started = 0.0, 0, time.perf_counter()
    for ids in documents:
        for start in range(0, len(ids) - 1, SEGMENT):
            first, stop = max(0, start - 3 * SEGMENT), min(len(ids) - 1, start + SEGMENT)
            piece = torch.from_numpy(ids[first : stop + 1])[None]
            logits = model(piece[:, :-1]).logits[0, start - first :]
            total += float(torch.nn.functional.cross_entropy(logits, piece[0, start - first + 1 :], reduction="sum"))
            count += stop - start
    return {"perplexity": math.exp(total / count), "rate": count / (time.perf_counter() - started)}


if __name__ == "__main__":
    main()

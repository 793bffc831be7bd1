"""Pointers in the place of searches: how many they save, at what perplexity, and whether they save time.

    python -m benchmarks.pointers DATA_FOLDER --corpora law
    python -m benchmarks.pointers DATA_FOLDER --memory FOLDER --tokens 8000

DATA_FOLDER holds `<corpus>.{train,test,valid}.jsonl.xz`. The datastore comes from `train`, at most 500 k entries behind
FAISS, or from `--memory FOLDER`, which holds `<corpus>-all/memory`, only read. k ≤ 1024, T and λ of kNN-LM are tuned on
`valid` with every target searched for, and serve all rows; `test` is then scored in the same run by each of them, from
the same keys, in a seeded order, twice; the quicker time counts. Results are added to benchmarks/results/pointers.json
and tabulated in pointers.md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memlm
from memlm.datastore import Pointers
from memlm.evaluation._retrieval import Text, gather, retrieve
from memlm.evaluation._tune import tune_cached
from memlm.evidence import Evidence, Found

from .knn_lm import TOKENS, cut_documents, pieces

RESULTS = Path(__file__).parent / "results"
K = 1024
ROWS = [(least, 16) for least in (1, 16, 64, 256)] + [(64, 4), (64, 64)]  # least, stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--corpora", default="law,code")
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    options = parser.parse_args()
    lm = memlm.reference_lm()
    for corpus in options.corpora.split(","):
        with tempfile.TemporaryDirectory() as folder:
            if options.memory:
                memory = memlm.Datastore(options.memory / f"{corpus}-all" / "memory", verify=False)
            else:
                train = cut_documents(lm, list(memlm.Corpus(options.data / f"{corpus}.train.jsonl.xz")))
                memory = memlm.Datastore.build(lm, train, Path(folder) / "memory", index="IVF1024,SQfp16")
            result = measure(lm, memory, options.data, corpus, options.tokens)
        path = RESULTS / "pointers.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        results[f"{corpus}, {result['entries']:,} entries"] = result
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(results))


def measure(lm: Any, memory: memlm.Datastore, data: Path, corpus: str, tokens: int) -> dict[str, Any]:
    """Tune on valid, then time every way of finding the neighbors of test, from the same keys."""
    valid, test = (Text(lm, pieces(data / f"{corpus}.{split}.jsonl.xz"), tokens) for split in ("valid", "test"))
    mixture = tune_cached(gather(retrieve(lm, valid, memory, [K]), valid.tokens), valid.document_of_target).best
    parts = list(lm.score(test.ids))
    order = torch.cat([part.rows for part in parts]).argsort()
    keys, targets, lm_log_probs = (
        torch.cat([getattr(part, name) for part in parts])[order] for name in ("keys", "targets", "log_probs")
    )
    queries, documents = keys.float().numpy(), test.document_of_target
    memory.search(queries, K)  # the machine code of the search, and pages of the index
    result: dict[str, Any] = {
        "entries": len(memory),
        "targets": test.tokens,
        "threads": torch.get_num_threads(),
        "index": memory.index.details,
        "mixture": mixture.to_dict(),
        "lm": math.exp(-float(lm_log_probs.double().mean())),
    }
    seconds: dict[Any, float] = {}
    rows: dict[Any, dict[str, Any]] = {}
    generator = np.random.default_rng(0)
    for way in [way for _ in range(2) for way in generator.permutation([(0, 0), *ROWS]).tolist()]:
        least, stream = way
        started = time.perf_counter()
        if least:
            found, searched = Pointers(memory, least, stream).lookup(queries, targets.numpy(), documents, K)
        else:
            found, searched = everything(memory, queries), np.ones(len(queries), bool)
        taken = time.perf_counter() - started
        seconds[least, stream] = min(taken, seconds.get((least, stream), math.inf))
        mixed = mixture.target_log_probs(lm_log_probs, targets, Evidence((found,)).nearest(mixture.ks))
        rows[least, stream] = {
            "least": least or None,
            "stream": stream or None,
            "skipped": 1 - float(searched.mean()),
            "perplexity": math.exp(-float(mixed.double().mean())),
        }
        print(corpus, rows[least, stream], f"{1e6 * taken / len(queries):.0f} µs a target", flush=True)
    for way, row in rows.items():
        row["targets_per_second"] = len(queries) / seconds[way]
        row["against_search"] = seconds[0, 0] / seconds[way]
    return result | {"rows": [rows[way] for way in [(0, 0), *ROWS]]}


def everything(memory: memlm.Datastore, queries: np.ndarray) -> Found:
    """Search for every target, in the batches of `evaluate`."""
    parts = [memory.lookup(queries[start : start + (1 << 13)], K) for start in range(0, len(queries), 1 << 13)]
    return Found.joined(parts)


def table(results: dict[str, Any]) -> str:
    """Return the Markdown page."""
    lines = [
        "# Pointers in the place of searches",
        "",
        "kNN-LM on `test`, reference model, 1,024 neighbors found; k, T and λ tuned on `valid` with every target searched for.",
        "Targets a second are those of finding neighbors alone (search, pointers, their distances), without the model; all rows of a",
        "table come from one run. *least* is the number of pointers that saves a search, *stream* the number of targets after",
        "which a search is made again.",
        "The machine had other work, too, when these were made: differences of a few tenths in time mean little. Made by",
        "",
        "    python -m benchmarks.pointers DATA --corpora law",
        "    python -m benchmarks.pointers DATA --memory STORES --tokens 8000",
    ]
    for name, result in results.items():
        index = result["index"]
        lines += [
            "",
            f"## {name}",
            "",
            f"{result['targets']:,} targets, threads: {result['threads']}, {index['factory']}, nprobe {index['nprobe']}, recall "
            f"{index['recall']:.3f}; the model alone {result['lm']:.2f}.",
            "",
            "| least | stream | searches saved | perplexity | targets/s | against searching always |",
            "|---|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            lines.append(
                f"| {row['least'] or 'always search'} | {row['stream'] or ''} | {100 * row['skipped']:.0f} % | "
                f"{row['perplexity']:.2f} | {row['targets_per_second']:,.0f} | {row['against_search']:.2f} × |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

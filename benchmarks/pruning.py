"""Fewer entries: how many are left by merging those that are alike, against perplexity, on two domains.

    python -m benchmarks.pruning DATA_FOLDER WORK_FOLDER [--corpora law,code] [--entries 100000]

DATA_FOLDER holds `<corpus>.{train,valid,test}.jsonl.xz`. A corpus' datastore comes from `train` (kept in WORK_FOLDER) and
is pruned in one way after another, each time from what was built. k, temperature and λ are tuned on 20 k tokens of
`valid` for each way by itself, and 20 k tokens of `test` are scored once. Results are added to
benchmarks/results/pruning.json row by row, and tabulated in pruning.md.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import memlm
from benchmarks.compression import RESULTS, arguments, prepare
from benchmarks.knn_lm import report
from memlm.datastore._compact import rewrite
from memlm.datastore._datastore import _indexing
from memlm.datastore._stored import Directory
from memlm.datastore._writing import writing
from memlm.evaluation._retrieval import Retrieved, Text, gather, retrieve

INDEX = "IVF512,SQfp16"
BUILT = "as built"
# Neighbors that each entry looks at, and the largest squared distance of what it takes in
MERGED = [(0, None), (8, None), (32, None), (2, None), (32, 1.0), (32, 4.0), (32, 16.0)]
AT_RANDOM = (8, 32)  # rows beside which as many entries are left out at random
COMPRESSED = 8  # a row whose keys are then compressed, too


def main() -> None:
    options = arguments(__doc__, entries=100_000)
    lm = memlm.load(options.model, dtype="float32")
    texts = prepare(lm, options, INDEX)
    for corpus, (valid, test) in texts.items():
        add(corpus, BUILT, measure(lm, options.work / corpus, valid, test, lambda memory: None))
    for neighbors, distance in MERGED:
        for corpus, (valid, test) in texts.items():
            built = options.work / corpus
            row = measure(lm, built, valid, test, lambda memory: memory.prune(neighbors, distance=distance))  # noqa: B023
            name = f"k {neighbors}" if neighbors else "equal keys"
            add(corpus, name if distance is None else f"{name}, d ≤ {distance:g}", row)
            if distance is None and neighbors in AT_RANDOM:
                left = row["entries"]
                row = measure(lm, built, valid, test, lambda memory: leave_at_random(memory, left))  # noqa: B023
                add(corpus, f"at random, as many as k {neighbors}", row)
            if distance is None and neighbors == COMPRESSED:
                row = measure(lm, built, valid, test, prune_and_compress)
                add(corpus, f"k {neighbors}, then int8 × {row['width']}", row)


def prune_and_compress(memory: memlm.Datastore) -> None:
    """Merge entries, and halve the numbers of their keys."""
    memory.prune(COMPRESSED)
    memory.compress(memory.width // 2, index="IVF512,SQ8")


def leave_at_random(memory: memlm.Datastore, left: int) -> None:
    """The baseline: leave so many entries, each of which counts once."""
    with writing(memory.path, "leave out") as manifest:
        old, draft = Directory.open(memory.path, manifest), manifest.following("leave out")
        counts = np.zeros(len(memory), np.uint32)
        counts[np.random.default_rng(0).choice(len(memory), left, replace=False)] = 1
        parts = np.split(counts, memory.keys.starts[1:-1])
        rewrite(
            memory.path, old, draft, _indexing(memory.path, INDEX, False), counts=parts, segment_entries=1 << 18,
            show_progress=False,
        )  # fmt: skip
    memory.refresh()


def measure(lm: Any, built: Path, valid: Text, test: Text, change: Any) -> dict[str, Any]:
    """Change a copy of the datastore, tune on valid, report on test."""
    folder = Path(tempfile.mkdtemp(dir=built.parent))
    try:
        memory = memlm.Datastore(shutil.copytree(built, folder / "memory"), verify=False)
        change(memory)
        cached = [gather(retrieve(lm, text, memory, [1024]), text.tokens) for text in (valid, test)]
        part = memory.manifest.index
        index_bytes = 0 if part is None else sum(file["bytes"] for file in part.files.values())
        counted = report(cached, valid, test)
        once = counted if memory.counts is None else report([without_counts(item) for item in cached], valid, test)
        return {
            "entries": len(memory),
            "documents": memory.manifest.documents,
            "width": memory.keys.width,
            "key_bytes": memory.keys.width * (1 if memory.keys.key_dtype == "int8" else 2),
            "bytes": memory.info()["bytes"] - index_bytes,
            "index_bytes": index_bytes,
            "largest_count": 1 if memory.counts is None else int(memory.counts.max()),
            "recall": memory.index.details["recall"],
            "valid_tokens": valid.tokens,
            "test_tokens": test.tokens,
            "perplexity without counts": once["perplexity"],
            **counted,
        }
    finally:
        shutil.rmtree(folder)


def without_counts(item: Retrieved) -> Retrieved:
    """Return the same neighbors, each of which counts once: the negative control."""
    memories = tuple(found._replace(log_counts=None) for found in item.evidence.memories)
    return replace(item, evidence=item.evidence._replace(memories=memories))


def add(corpus: str, kind: str, row: dict[str, Any]) -> None:
    """Put a row in the place of an earlier one of the same kind, and write both files."""
    path = RESULTS / "pruning.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault(corpus, {})[kind] = row
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / "pruning.md").write_text(table(results))


def table(results: dict[str, Any]) -> str:
    """Return the Markdown page."""
    lines = [
        "# Fewer entries: what merging leaves, against perplexity",
        "",
        "Perplexity per token on 20 k tokens of `test`, with the reference language model, whose training text holds neither",
        "corpus. k ≤ 1024, temperature and λ are tuned on 20 k tokens of `valid`, for each row by itself. Entries of a document",
        "that are alike are merged greedily (He et al. 2021): each takes in those of its k nearest neighbors, at a squared",
        "distance of d at most, that have its value and lie in its document. *Counted once*: the same neighbors, each with",
        "weight 1 in the place of the number of entries that it stands for, tuned by itself, too. Bytes are those of all files",
        "but the index. 512 inverted lists are visited until recall@1024 is above .985.",
        "",
        "    python -m benchmarks.pruning DATA WORK",
        "",
    ]
    for corpus, rows in results.items():
        built = rows[BUILT]
        documents = "one document" if built["documents"] == 1 else f"{built['documents']:,} documents"
        lines += [
            f"## {corpus}: {built['entries']:,} entries of {documents}; the model alone: {built['lm']:.2f}",
            "",
            "| merged | entries | | all but the index, MB | perplexity | change | counted once | largest count | λ | T | k |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for kind, row in sorted(rows.items(), key=lambda item: (-item[1]["entries"], -item[1]["bytes"])):
            share, ratio = row["entries"] / built["entries"], row["perplexity"] / built["perplexity"]
            once = "" if row["largest_count"] == 1 else f"{row['perplexity without counts']:.3f}"
            lines.append(
                f"| {kind} | {row['entries']:,} | {100 * share:.1f} % | {row['bytes'] / 1e6:.0f} | {row['perplexity']:.3f} | "
                f"{100 * (ratio - 1):+.2f} % | {once} | {row['largest_count']:,} | {row['interpolation_weight']:.2f} | "
                f"{row['temperature']:.3g} | {row['k']} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Compressed keys: bytes an entry against perplexity, on two domains.

    python -m benchmarks.compression DATA_FOLDER WORK_FOLDER [--corpora law,code] [--entries 300000]

DATA_FOLDER holds `<corpus>.{train,valid,test}.jsonl.xz`. A corpus' datastore comes from `train` (kept in WORK_FOLDER) and is
compressed in one way after another, each time from the keys as built. k, temperature and λ are tuned on 20 k tokens of
`valid` for each way by itself, and 20 k tokens of `test` are scored once. All are searched by inverted lists that hold the
stored keys themselves. Results are added to benchmarks/results/compression.json row by row, and tabulated in compression.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import memlm
from benchmarks.knn_lm import TOKENS, cut_documents, pieces, report
from memlm.evaluation._retrieval import Text, gather, retrieve

HELD_OUT = ("valid", "test")
RESULTS = Path(__file__).parent / "results"
BUILT = ("float16", 256)  # as the reference model's keys are
BYTES = {"int8": 1, "float16": 2}
INDEXES = {"float16": "IVF1024,SQfp16", "int8": "IVF1024,SQ8"}  # as chosen for large datastores; they hold stored keys
ROWS = [
    BUILT,
    *[("int8", width) for width in (128, 256, 96, 64, 32)],
    *[("float16", width) for width in (128, 96, 64, 32)],
]


def main() -> None:
    options = arguments(__doc__, entries=300_000)
    lm = memlm.load(options.model, dtype="float32")
    texts = prepare(lm, options, index="exact")
    for key_dtype, width in ROWS:
        for corpus, (valid, test) in texts.items():
            add(corpus, measure(lm, options.work / corpus, valid, test, key_dtype, width))


def arguments(description: str, entries: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--corpora", default="law,code")
    parser.add_argument("--entries", type=int, default=entries)
    parser.add_argument("--model", default="reference")
    return parser.parse_args()


def prepare(lm: Any, options: argparse.Namespace, index: str) -> dict[str, list[Text]]:
    """Build the datastore of every corpus, unless it is there; return its texts of `HELD_OUT`."""
    texts = {}
    for corpus in options.corpora.split(","):
        texts[corpus] = [Text(lm, pieces(options.data / f"{corpus}.{name}.jsonl.xz"), TOKENS) for name in HELD_OUT]
        if not (options.work / corpus).exists():
            train = list(memlm.Corpus(options.data / f"{corpus}.train.jsonl.xz"))
            train = cut_documents(lm, train, options.entries)
            memlm.Datastore.build(lm, train, options.work / corpus, index=index)
    return texts


def measure(lm: Any, built: Path, valid: Text, test: Text, key_dtype: str, width: int) -> dict[str, Any]:
    """Store the keys in one way, tune on valid, report on test."""
    folder = Path(tempfile.mkdtemp(dir=built.parent))
    try:
        memory = memlm.Datastore(shutil.copytree(built, folder / "memory"), verify=False)
        if (key_dtype, width) == BUILT:
            memory.build_index(INDEXES[key_dtype])
        else:
            memory.compress(width, key_dtype, index=INDEXES[key_dtype])
        cached = [gather(retrieve(lm, text, memory, [1024]), text.tokens) for text in (valid, test)]
        part = memory.manifest.index
        index_bytes = 0 if part is None else sum(file["bytes"] for file in part.files.values())
        return {
            "keys": key_dtype,
            "width": width,
            "index": memory.index.details,
            "entries": len(memory),
            "key_bytes": BYTES[key_dtype] * width,
            "bytes": memory.info()["bytes"] - index_bytes,
            "index_bytes": index_bytes,
            "duplicates": duplicates(memory),
            "valid_tokens": valid.tokens,
            "test_tokens": test.tokens,
            **report(cached, valid, test),
        }
    finally:
        shutil.rmtree(folder)


def duplicates(memory: memlm.Datastore) -> float:
    """Return the share of entries whose stored key and value another entry has, too, so that one would do for both."""
    seen: set[bytes] = set()
    for start, keys in memory.keys.key_blocks():
        values = memory.values[start : start + len(keys)]
        seen.update(key.tobytes() + value.tobytes() for key, value in zip(keys, values, strict=True))
    return 1 - len(seen) / len(memory)


def add(corpus: str, row: dict[str, Any]) -> None:
    """Put a row in the place of an earlier one of the same kind, and write both files."""
    path = RESULTS / "compression.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault(corpus, {})[kind(row)] = row
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "compression.md").write_text(table(results))


def kind(row: dict[str, Any]) -> str:
    """Name how a row's keys are stored."""
    return f"{row['keys']} × {row['width']}"


def table(results: dict[str, Any]) -> str:
    """Return the Markdown page."""
    lines = [
        "# Compressed keys: bytes an entry against perplexity",
        "",
        "Perplexity per token on 20 k tokens of `test`, with the reference language model, whose training text holds neither",
        "corpus. k, temperature and λ are tuned on 20 k tokens of `valid`, for each row by itself. Keys are projected on their",
        "principal components, fitted to 65,536 of them; int8 rounds each number to a grid of 256 places. The first row has",
        "the keys as built. Bytes are those of an entry: of its key, of all files but the index (keys, values, offsets, text),",
        "and of the index: 1,024 inverted lists that hold the stored keys themselves, visited until recall@1024 is above .985.",
        "",
        "    python -m benchmarks.compression DATA WORK",
        "",
    ]
    for corpus, rows in results.items():
        built = rows[f"{BUILT[0]} × {BUILT[1]}"]
        lines += [
            f"## {corpus}: {built['entries']:,} entries; the model alone: {built['lm']:.2f}",
            "",
            f"{100 * built['duplicates']:.2f} % of the entries have the key (as built) and the value of another one: so much would",
            "be saved by storing such entries once.",
            "",
            "| keys | bytes of keys | | all but the index | index | recall | perplexity | change | λ | T | k |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in sorted(rows.values(), key=lambda row: (row is not built, row["keys"], -row["width"])):
            share = row["key_bytes"] / built["key_bytes"]
            lines.append(
                f"| {row['keys']} × {row['width']} | {row['key_bytes']} | "
                f"{100 * share:.0f} % | {row['bytes'] / row['entries']:.0f} | {row['index_bytes'] / row['entries']:.0f} | "
                f"{row['index']['recall']:.3f} | {row['perplexity']:.3f} | "
                f"{100 * (row['perplexity'] / built['perplexity'] - 1):+.2f} % | {row['interpolation_weight']:.2f} | "
                f"{row['temperature']:.3g} | {row['k']} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

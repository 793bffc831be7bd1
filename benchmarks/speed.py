"""Speed, as ratios in one run on the same windows; peak memory beside each.

    python -m benchmarks.speed            # everything, on Python's own library; about a quarter of an hour on two cores
    python -m benchmarks.speed extraction # one part

extraction: keys alone against the plain forward pass with logits, same precision, same batches.
gpt2: scoring through 1 M entries, k = 1024, against scoring by the model alone; 124 M parameters in GPT-2's shape.
reference: building and scoring with the reference model and 300 k entries, against benchmarks/straightforward.py.

The 124 M model has random weights (its speed does not depend on them); in the place of its keys stand the reference
model's, rotated into its width, so that the index meets distances of real text. Every part runs in a process of its own, whose
peak resident memory is reported. Results go to benchmarks/results/speed.json and speed.md.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memlm
from memlm.cli._demo import standard_library
from memlm.evaluation import evaluate
from memlm.models import LanguageModel
from memlm.models._windows import batch_windows

from . import straightforward

import faiss  # isort: skip

RESULTS = Path(__file__).parent / "results"
K = 1024
MIXTURE = memlm.KnnMixture(interpolation_weight=0.5, temperature=20.0, k=K)


def main() -> None:
    """Run the parts that are named, or all, each in a process of its own; add their results to those there."""
    if sys.argv[1:2] == ["--here"]:
        row = PARTS[sys.argv[2]]()
        row["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("RESULT " + json.dumps(row))
        return
    path = RESULTS / "speed.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in sys.argv[1:] or PARTS:
        print(f"== {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.speed", "--here", name]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[name] = json.loads(output.split("RESULT ")[-1])
        path.write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.joinpath("speed.md").write_text(table(results))


def gpt2_shaped(lm: LanguageModel) -> LanguageModel:
    """A model of GPT-2's shape (124 M parameters, vocabulary 50,257) with random weights, over the reference tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    token = lm.tokenizer.bos_token_id
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=token, eos_token_id=token)).eval()
    return LanguageModel(model, lm.tokenizer, "gpt2-shaped", context=256, stride=768)


def sequences(lm: LanguageModel, split: str, tokens: int) -> list[np.ndarray]:
    """Token ids of real documents, cut off after so many targets."""
    taken: list[np.ndarray] = []
    room = tokens
    for document in standard_library_text(split):
        ids = lm.tokenize(document).ids[: room + 1]
        taken.append(ids)
        room -= len(ids) - 1
        if room <= 0:
            break
    return taken


def standard_library_text(split: str) -> list[memlm.Document]:
    """Documents of one split of the demo, whole."""
    return list(standard_library(scale=6)[split])


def timed(work: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of some runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def extraction() -> dict[str, Any]:
    """Keys alone against the plain forward pass with logits, same batches."""
    rows: dict[str, Any] = {}
    reference = memlm.reference_lm()
    for lm, tokens in ((reference, 40_000), (gpt2_shaped(reference), 4_000)):
        ids = sequences(lm, "valid", tokens)
        batches = list(batch_windows(ids, lm.windows, lm.batch_tokens))

        def plain(lm: LanguageModel = lm, batches: Any = batches) -> None:
            with torch.no_grad():
                for batch in batches:
                    lm.model(input_ids=batch.input_ids, use_cache=False)

        def keys(lm: LanguageModel = lm, ids: Any = ids) -> None:
            for _ in lm.keys(ids):
                pass

        count = sum(len(item) - 1 for item in ids)
        seconds = timed(plain), timed(keys)
        rows[lm.name] = {"plain": count / seconds[0], "keys": count / seconds[1], "ratio": seconds[0] / seconds[1]}
    return rows


class Widened(LanguageModel):
    """The GPT-2-shaped model, with the reference model's keys mapped into its width by a rotation.

    Random weights make keys without clusters, which no index can search. A rotation keeps every distance, so that the
    index meets the geometry of real keys at the cost of GPT-2's width. `remember` computes the keys of a text before the
    clock runs.
    """

    def __init__(self, lm: LanguageModel, reference: LanguageModel) -> None:
        self.__dict__ |= lm.__dict__
        self.reference = reference
        generator = torch.Generator().manual_seed(0)
        self.rotation = torch.linalg.qr(torch.randn(lm.key_width, reference.key_width, generator=generator)).Q.T

    def keys(self, sequences: Any) -> Any:
        for rows, keys in self.reference.keys(sequences):
            yield rows, keys @ self.rotation

    def remember(self, ids: list[np.ndarray]) -> None:
        parts = list(self.keys(ids))
        self.known = torch.cat([keys for _, keys in parts])[torch.cat([rows for rows, _ in parts]).argsort()]

    def score(self, sequences: Any, *, beliefs: bool = False) -> Any:
        for batch in super().score(sequences, beliefs=beliefs):
            yield batch._replace(keys=self.known[batch.rows])


def gpt2() -> dict[str, Any]:
    """Scoring through a million entries against scoring by the model alone."""
    reference = memlm.reference_lm()
    lm = Widened(gpt2_shaped(reference), reference)
    documents = texts(lm, "train", 1_000_000)
    test = texts(lm, "test", 8_000)
    with tempfile.TemporaryDirectory() as folder:
        memory = memlm.Datastore.build(lm, documents, Path(folder) / "memory")
        lm.remember([lm.tokenize(document).ids for document in test])
        result = evaluate(lm, test, memory, MIXTURE)
        alone, mixed = (row.tokens_per_second for row in result.results)
        return {
            "entries": len(memory),
            "alone": alone,
            "memory": mixed,
            "ratio": mixed / alone,
            "recall": query_recall(lm, memory, test),
            "index": memory.index.details,
        }


def texts(lm: LanguageModel, split: str, tokens: int) -> list[memlm.Document]:
    """Real documents of so many tokens in all."""
    return [
        memlm.Document(id=str(number), text=lm.tokenizer.decode(ids, skip_special_tokens=True))
        for number, ids in enumerate(sequences(lm, split, tokens))
    ]


def reference_memlm() -> dict[str, Any]:
    """memlm with 300 k entries: build, tune nothing, score."""
    lm = memlm.reference_lm()
    documents = texts(lm, "train", 300_000)
    test = texts(lm, "test", 20_000)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        memory = memlm.Datastore.build(lm, documents, Path(folder) / "memory")
        seconds = time.perf_counter() - started
        result = evaluate(lm, test, memory, MIXTURE)
        return {
            "entries": len(memory),
            "build": len(memory) / seconds,
            "score": result.results[1].tokens_per_second,
            "score_model_alone": result.results[0].tokens_per_second,
            "recall": query_recall(lm, memory, test),
            "index": memory.index.details,
        }


def query_recall(lm: LanguageModel, memory: Any, test: list[memlm.Document]) -> float:
    """Recall@1024 on held-out queries spread over the documents, against exact search."""
    from memlm.index import ExactIndex
    from memlm.index._faiss import recall

    keys = torch.cat([keys for _, keys in lm.keys(lm.tokenize(document).ids for document in test)])
    queries = keys[:: max(1, len(keys) // 500)].float().numpy()
    return recall(memory.search(queries, K), ExactIndex(memory.keys).search(queries, K, (0, 0)))


def reference_straightforward() -> dict[str, Any]:
    """The baseline on the same windows, one at a time."""
    lm = memlm.reference_lm()
    site = straightforward.last_feed_forward(lm.model)

    def windows(split: str, tokens: int) -> list[straightforward.Window]:
        return [
            straightforward.Window(torch.from_numpy(ids[start:stop]), first - start - 1)
            for ids in sequences(lm, split, tokens)
            for start, first, stop in lm.windows.windows(len(ids))
        ]

    with tempfile.TemporaryDirectory() as folder:
        timing = straightforward.build(lm.model, site, windows("train", 300_000), folder)
        store = straightforward.load(folder)
        scores = straightforward.score(
            lm.model, site, windows("test", 20_000), store, k=K, interpolation_weight=0.5, temperature=20.0
        )
        keys = np.memmap(Path(folder) / "keys.bin", np.float16, "r").reshape(-1, lm.key_width).astype(np.float32)
        queries = torch.cat([keys for _, keys in lm.keys(sequences(lm, "test", 20_000))])[::40].float().numpy()
        truth, proposed = faiss.knn(queries, keys, K)[1], store.index.search(queries, K)[1]
        build_seconds = timing["extraction_seconds"] + timing["index_seconds"]
        return {
            "entries": int(timing["tokens"]),
            "build": timing["tokens"] / build_seconds,
            "extraction": timing["tokens"] / timing["extraction_seconds"],
            "recall": float(
                np.mean([len(np.intersect1d(a[a >= 0], b)) / K for a, b in zip(proposed, truth, strict=True)])
            ),
            "score": scores.tokens / scores.seconds,
            "score_model_alone": scores.tokens / scores.model_seconds,
            "search_seconds": scores.search_seconds,
            "mixture_seconds": scores.mixture_seconds,
        }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "extraction": extraction,
    "gpt2": gpt2,
    "reference_memlm": reference_memlm,
    "reference_straightforward": reference_straightforward,
}


def table(results: dict[str, Any]) -> str:
    """Return the Markdown page of the parts measured so far."""
    lines = [
        "# Speed",
        "",
        f"{results['threads']} threads, torch {results['torch']}, float32; tokens a second, each ratio within one run. Made by",
        "`make bench` (`python -m benchmarks.speed`), which says what each part is.",
        "",
        "| what | tokens/s | against | tokens/s | ratio | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.get("extraction", {}).items():
        if isinstance(row, dict):
            lines.append(
                f"| keys, {name} | {row['keys']:,.0f} | plain forward with logits | {row['plain']:,.0f} | "
                f"{row['ratio']:.2f} | {results['extraction']['peak_memory_mb']:,.0f} |"
            )
    if "gpt2" in results:
        row = results["gpt2"]
        lines.append(
            f"| scoring through {row['entries']:,} entries, k = {K}, GPT-2 shape, recall {row['recall']:.3f} | "
            f"{row['memory']:,.0f} | model alone | {row['alone']:,.0f} | {row['ratio']:.2f} | {row['peak_memory_mb']:,.0f} |"
        )
    if "reference_memlm" in results and "reference_straightforward" in results:
        ours, base = results["reference_memlm"], results["reference_straightforward"]
        for what in ("build", "score"):
            lines.append(
                f"| {what}, reference model, {ours['entries']:,} entries | {ours[what]:,.0f} | straightforward | "
                f"{base[what]:,.0f} | {ours[what] / base[what]:.2f} | {ours['peak_memory_mb']:,.0f}, "
                f"{base['peak_memory_mb']:,.0f} |"
            )
        index = ours["index"]
        lines += [
            "",
            f"Index of the reference model's store: {index['factory']}, nprobe {index['nprobe']}, recall@1024 on held-out",
            f"queries {ours['recall']:.3f}, distances of the stored keys; the straightforward one: IVF-PQ of 64 bytes, distances",
            f"as they come, recall@1024 {base['recall']:.3f}. Scoring by the model alone, within the same passes:",
            f"{ours['score_model_alone']:,.0f} tokens/s in batches, {base['score_model_alone']:,.0f} one window at a time.",
        ]
    if "gpt2" in results:
        lines += [
            "",
            "The GPT-2 shape has random weights, whose keys have no clusters to search; so its store and its queries are the",
            "reference model's keys of real text, rotated into its width. Both sides run the forward pass of the GPT-2 shape.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

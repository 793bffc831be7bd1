"""kNN-LM on six corpora: exact and with FAISS, beside the model alone and two controls.

    python -m benchmarks.knn_lm DATA_FOLDER [--scope sample|all] [--corpora law,latex]

DATA_FOLDER holds `<corpus>.{train,valid,test}.jsonl.xz`. A corpus' datastore comes from `train`, everything is tuned on
`valid`, and `test` is reported once. Results are added to benchmarks/results/knn_lm.json and tabulated in knn_lm.md.

scope "sample": at most 500 k entries of `train` (whole documents in a seeded order, the last one cut), and 20 k tokens each
of `valid` and `test` (seeded contiguous pieces). scope "all": the whole of `train` behind FAISS, same valid and test.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memlm
from memlm.evaluation._retrieval import Retrieved, Text, gather, retrieve
from memlm.evaluation._tune import tune_cached
from memlm.index import auto_factory
from memlm.mixtures import HeldOut, best_weight

RESULTS = Path(__file__).parent / "results"
CORPORA = ("law", "latex", "code", "isabelle", "peps", "wikitext2")
ENTRIES, TOKENS, PIECE = 500_000, 20_000, 8_000  # entries, held-out tokens, characters of a held-out piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--scope", choices=("sample", "all"), default="sample")
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--model", default="reference")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    lm = memlm.load(options.model, dtype=options.dtype)
    for corpus in options.corpora.split(","):
        rows = measure(lm, options.data, corpus, options.scope)
        path = RESULTS / "knn_lm.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        results.setdefault(corpus, {})[options.scope] = rows
        path.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "knn_lm.md").write_text(table(results))


def measure(lm: Any, data: Path, corpus: str, scope: str) -> dict[str, Any]:
    """Build, tune on valid, report on test; the order of the held-out text is fixed."""
    train = list(memlm.Corpus(data / f"{corpus}.train.jsonl.xz"))
    if scope == "sample":
        train = cut_documents(lm, train)
    valid, test = (Text(lm, pieces(data / f"{corpus}.{split}.jsonl.xz"), TOKENS) for split in ("valid", "test"))
    folder = Path(tempfile.mkdtemp())
    try:
        memory = memlm.Datastore.build(lm, train, folder / "memory", index="exact")
        result: dict[str, Any] = {"entries": len(memory), "documents": len(train), "valid": valid.tokens}
        result |= {"test": test.tokens}
        result["width"], result["dtype"] = memory.width, memory.manifest.encoder["dtype"]
        if scope == "sample":
            result["exact"], result["controls"] = exact_and_controls(lm, memory, valid, test)
        factory = auto_factory(len(memory), memory.width, memory.keys.key_dtype)
        memory.build_index(factory if factory != "exact" else "IVF1024,SQfp16")
        index = memory.index.details
        cached = [gather(retrieve(lm, text, memory, [1024]), text.tokens) for text in (valid, test)]
        result["faiss"] = {**report(cached, valid, test), "index": index}
        return result
    finally:
        shutil.rmtree(folder)


def exact_and_controls(lm: Any, memory: Any, valid: Text, test: Text) -> tuple[dict[str, Any], dict[str, Any]]:
    """One exact search serves kNN-LM and the one with shuffled values: it returns entry numbers in place of tokens."""
    values = memory.values.astype(np.int64)
    memory.values = np.arange(len(memory))
    found = [gather(retrieve(lm, text, memory, [1024]), text.tokens) for text in (valid, test)]
    memory.values = values
    shuffled = np.random.default_rng(0).permutation(values)
    with_tokens, with_shuffled = ([_renamed(item, names) for item in found] for names in (values, shuffled))
    controls = {
        "unigram": unigram(values, lm.identity["tokenizer"]["vocab_size"], *found),
        "shuffled values": report(with_shuffled, valid, test)["perplexity"],
    }
    return report(with_tokens, valid, test), controls


def _renamed(cached: Retrieved, values: np.ndarray) -> Retrieved:
    """Put values in the place of entry numbers."""
    found = cached.found._replace(tokens=torch.from_numpy(values[cached.found.tokens]))
    return replace(cached, evidence=cached.evidence._replace(memories=(found,)))


def report(cached: list[Retrieved], valid: Text, test: Text) -> dict[str, Any]:
    """Tune on valid, report on test."""
    tuning = tune_cached(cached[0], valid.document_of_target)
    best = tuning.best
    part = cached[1]
    held = HeldOut(part.targets, part.lm_log_probs, part.evidence, test.document_of_target)
    mixed = held.log_probs(best)
    papers = held.log_probs(memlm.KnnMixture(interpolation_weight=0.25, temperature=1.0, k=1024))
    return {
        "lm": math.exp(-float(part.lm_log_probs.double().mean())),
        "perplexity": math.exp(-float(mixed.mean())),
        "perplexity with T = 1, λ = .25": math.exp(-float(papers.mean())),
        "valid": {"lm": tuning.lm_perplexity, "perplexity": tuning.perplexity},
        **{name: value for name, value in best.to_dict().items() if name != "kind"},
    }


def unigram(values: np.ndarray, vocab_size: int, valid: Retrieved, test: Retrieved) -> float:
    """Perplexity of the model mixed with the datastore's token frequencies, λ tuned on valid."""
    frequency = torch.from_numpy(np.bincount(values, minlength=vocab_size) / len(values))
    ratios = [frequency[part.targets] / part.lm_log_probs.double().exp() for part in (valid, test)]
    weight = best_weight(ratios[0])
    return math.exp(-float((test.lm_log_probs.double() + torch.log1p(weight * (ratios[1] - 1))).mean()))


def cut_documents(lm: Any, documents: list[memlm.Document], entries: int = ENTRIES) -> list[memlm.Document]:
    """Take documents in a seeded order until there are enough tokens; cut the last one."""
    chosen: list[memlm.Document] = []
    room = entries
    for number in np.random.default_rng(0).permutation(len(documents)):
        tokenized = lm.tokenize(documents[number])
        if len(tokenized.ids) > room:
            text = documents[number].text[: int(tokenized.spans[max(0, room - 2), 1])]
            return [*chosen, memlm.Document(id=documents[number].id, text=text)] if room > 100 else chosen
        chosen.append(documents[number])
        room -= len(tokenized.ids)
    return chosen


def pieces(path: Path, size: int = PIECE) -> list[memlm.Document]:
    """Cut held-out text at line ends into contiguous pieces, one a document in turn, starting at seeded places."""
    generator = np.random.default_rng(0)
    documents = list(memlm.Corpus(path))
    chosen: list[memlm.Document] = []
    taken: set[tuple[int, int]] = set()
    for turn in range(64):
        for number in generator.permutation(len(documents)):
            text = documents[number].text
            place = int(generator.integers(max(1, -(-len(text) // size))))
            if (number, place) in taken:
                continue
            taken.add((number, place))
            start = text.rfind("\n", 0, place * size) + 1
            stop = text.rfind("\n", start, start + size) + 1 or start + size
            if text[start:stop].strip():
                chosen.append(memlm.Document(id=f"{documents[number].id}@{start}", text=text[start:stop]))
        if len(chosen) > 60 or turn == 63:
            break
    return chosen


def table(results: dict[str, Any]) -> str:
    """Return the Markdown page."""
    lines = [
        "# kNN-LM on six corpora",
        "",
        "Perplexity per token on `test`, with the reference language model, whose training text holds WikiText-2 and none of",
        "the others. The datastore is made from `train`; k ≤ 1024, temperature and λ are tuned on `valid`; each row's test",
        "text was scored once. *Sample*: at most 500 k entries, 20 k valid and 20 k test tokens in seeded contiguous pieces.",
        "*All*: the whole of `train` behind FAISS, the same valid and test tokens. Controls on the sample: the model mixed",
        "with the datastore's token frequencies (λ tuned), and kNN-LM whose stored values were shuffled (all tuned).",
        "",
        "    python -m benchmarks.knn_lm DATA --scope sample",
        "    python -m benchmarks.knn_lm DATA --scope all",
        "",
        "| corpus | entries | LM | + unigram | + shuffled | kNN-LM exact | change | kNN-LM FAISS | T = 1, λ = .25 | λ | T | k |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for corpus, scopes in results.items():
        if "sample" in scopes:
            row = scopes["sample"]
            exact, faiss, controls = row["exact"], row["faiss"], row["controls"]
            lines.append(
                f"| {corpus} | {row['entries']:,} | {exact['lm']:.1f} | {controls['unigram']:.1f} | "
                f"{controls['shuffled values']:.1f} | **{exact['perplexity']:.2f}** | "
                f"{100 * (exact['perplexity'] / exact['lm'] - 1):+.1f} % | {faiss['perplexity']:.2f} "
                f"({100 * (faiss['perplexity'] / exact['perplexity'] - 1):+.2f} %) | "
                f"{exact['perplexity with T = 1, λ = .25']:.1f} | {exact['interpolation_weight']:.2f} | "
                f"{exact['temperature']:.3g} | {exact['k']} |"
            )
        if "all" in scopes:
            row = scopes["all"]
            faiss = row["faiss"]
            lines.append(
                f"| {corpus}, all | {row['entries']:,} | {faiss['lm']:.1f} | | | | "
                f"{100 * (faiss['perplexity'] / faiss['lm'] - 1):+.1f} % | **{faiss['perplexity']:.2f}** | "
                f"{faiss['perplexity with T = 1, λ = .25']:.1f} | {faiss['interpolation_weight']:.2f} | "
                f"{faiss['temperature']:.3g} | {faiss['k']} |"
            )
    lines += ["", "| index | factory | nprobe | recall@1024 |", "|---|---|---|---|"]
    for corpus, scopes in results.items():
        for scope, row in scopes.items():
            index = row["faiss"]["index"]
            lines.append(f"| {corpus}, {scope} | {index['factory']} | {index['nprobe']} | {index['recall']:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

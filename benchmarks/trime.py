"""The rows of TRIME's tables, at the size of the reference model, on WikiText-2 and novels.

    python -m benchmarks.trime DATA --models FOLDER --stores FOLDER [--corpora wikitext2,novels]

FOLDER/{none,local,long,external} are the models of benchmarks/trime_models.py, saved by `save_pretrained`. DATA holds
`<corpus>.{train,valid,test}.jsonl.xz`. A million tokens of `train` are stored for the models none and external; all
settings are fitted to 16 k tokens of `valid`, and 40 k tokens of `test` are scored once a row: whole documents in a seeded
order, of novels their beginnings. Results: benchmarks/results/trime.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import memlm
from benchmarks.knn_lm import cut_documents
from memlm.cache import Cache
from memlm.evaluation._bootstrap import paired_bootstrap, units
from memlm.evaluation._retrieval import Text, gather, retrieve
from memlm.evaluation._tune import tune_cached
from memlm.mixtures import HeldOut, Mixture, TrimeMixture, fit_cache, fit_gate, fit_shared_cache, fit_trime

RESULTS = Path(__file__).parent / "results"
CORPORA = ("wikitext2", "novels")
ENTRIES, VALID, TEST = 1_000_000, 16_000, 40_000
BEGINNING = 40_000  # characters of a novel
LOCAL, LONG, NEIGHBORS = 512, 4096, 1024
BASELINE = "Transformer + cache, by age"
# WikiText-103 dev, the paper's 7 M parameter model (as reported there)
PAPER = {
    "Transformer": 82.68,
    "Transformer + cache": 67.45,
    "kNN-LM": 51.88,
    "kNN-LM + cache": 45.15,
    "TRIME local": 54.78,
    "TRIME long": 60.71,
    "TRIME external": 41.50,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--corpora", default=",".join(CORPORA))
    options = parser.parse_args()
    path = RESULTS / "trime.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for corpus in options.corpora.split(","):
        results[corpus] = measure(options, corpus)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "trime.md").write_text(table(results))


def measure(options: argparse.Namespace, corpus: str) -> dict[str, Any]:
    lms = {arm: memlm.load(str(options.models / arm)) for arm in ("none", "local", "long", "external")}
    valid, test = (
        Text(lms["none"], beginnings(options.data / f"{corpus}.{split}.jsonl.xz"), tokens)
        for split, tokens in (("valid", VALID), ("test", TEST))
    )
    rows: dict[str, dict[str, Any]] = {}
    log_probs: dict[str, np.ndarray] = {}

    def report(name: str, arm: str, memory: Any, mixture: Mixture) -> None:
        result = memlm.evaluate(lms[arm], test, memory, mixture, show_progress=False)
        log_probs[name], log_probs[f"model {arm}"] = result.log_probs, result.lm_log_probs
        rows[name] = {"model": arm, "perplexity": perplexity(result.log_probs), "settings": mixture.describe()}
        print(corpus, name, rows[name], flush=True)

    stored = stored_text(lms["none"], options.data, corpus)
    plain = store(lms["none"], stored, options.stores / f"{corpus}-none", "squared_l2")
    held = held_out(lms["none"], valid, [plain, Cache(LONG)])
    past = held.memory(1)
    cache = best(past, fit_cache(past, forgets=False), fit_shared_cache(past, forgets=False))
    aged = best(past, fit_cache(past, forgets=True), fit_shared_cache(past, forgets=True))
    report("Transformer + cache", "none", Cache(LONG), cache)
    report(BASELINE, "none", Cache(LONG), aged)
    found = gather(retrieve(lms["none"], valid, plain, [NEIGHBORS], show_progress=False), valid.tokens)
    knn = tune_cached(found, valid.document_of_target).best
    report("kNN-LM", "none", plain, knn)
    report("kNN-LM + cache", "none", [plain, Cache(LONG)], fit_gate(held, (knn, aged)))
    untrained = TrimeMixture(temperature=1.0, length=LOCAL)
    report(f"control: Transformer, {LOCAL} tokens in its softmax at T = 1", "none", Cache(LOCAL), untrained)
    del held, past, found

    for arm, name, length in (
        ("local", "TRIME local", LOCAL),
        ("local", "TRIME local, long memory", LONG),
        ("long", "TRIME long", LONG),
    ):
        held = held_out(lms[arm], valid, [Cache(length)])
        report(name, arm, Cache(length), fit_trime(held, forgets=False))
        report(f"{name}, by age", arm, Cache(length), fit_trime(held))
    external = store(lms["external"], stored, options.stores / f"{corpus}-external", "inner_product")
    memories = [external, Cache(LONG)]
    held = held_out(lms["external"], valid, memories)
    report("TRIME external", "external", memories, fit_trime(held, forgets=False))
    report("TRIME external, by age", "external", memories, fit_trime(held))

    rows = {"Transformer": {"model": "none", "perplexity": perplexity(log_probs["model none"]), "settings": ""}} | rows
    log_probs["Transformer"] = log_probs["model none"]
    for name, row in rows.items():
        row["without memory"] = perplexity(log_probs[f"model {row['model']}"])
        change = paired_bootstrap(log_probs[name] - log_probs[BASELINE], test.document_of_target)
        row["over the cache"] = change.to_dict()
    return {"rows": rows, "test": test.tokens, "valid": valid.tokens, "entries": len(plain), "unit": change.unit}


def beginnings(path: Path) -> list[memlm.Document]:
    return [replace(document, text=document.text[:BEGINNING]) for document in memlm.Corpus(path)]


def stored_text(lm: Any, data: Path, corpus: str) -> list[memlm.Document]:
    return cut_documents(lm, list(memlm.Corpus(data / f"{corpus}.train.jsonl.xz")), ENTRIES)


def store(lm: Any, documents: list[memlm.Document], path: Path, metric: str) -> memlm.Datastore:
    if not path.exists():
        memlm.Datastore.build(lm, documents, path, metric=metric)
    return memlm.Datastore(path)


def held_out(lm: Any, text: Text, memories: list[Any]) -> HeldOut:
    ks = [len(item) if isinstance(item, Cache) else NEIGHBORS for item in memories]
    found = gather(retrieve(lm, text, memories, ks, beliefs=True, show_progress=False), text.tokens)
    return HeldOut(found.targets, found.lm_log_probs, found.evidence, units(text.document_of_target)[0])


def best(held: HeldOut, *mixtures: Mixture) -> Mixture:
    return max(mixtures, key=lambda mixture: float(held.log_probs(mixture).mean()))


def perplexity(log_probs: np.ndarray) -> float:
    return math.exp(-float(log_probs.mean()))


def table(results: dict[str, Any]) -> str:
    """Tabulate everything as Markdown."""
    lines = [
        "# TRIME at the size of the reference model",
        "",
        "Perplexity per token on `test`. Four models of 6.6 million parameters, from the same first weights, saw WikiText-2 and",
        "the novels twice (1,536 updates of 16,384 tokens, one GPU): without memory, with local, with local and long-term (8",
        "segments of 512 tokens in a row), and with external memory (32 segments in a chain by BM25, own segment dropped with",
        f"p = .9). The cache holds {LONG:,} tokens, TRIME's local memory {LOCAL}, its long-term memory {LONG:,}; a million tokens of",
        "`train` are stored. Temperatures, λ, drop-off by age and the second interpolation are fitted to 16 k tokens of `valid`.",
        "Changes are against the Transformer with a cache tuned alike (T, λ, age), with paired bootstrap 95 % intervals.",
        "",
        "    python -m benchmarks.trime_models DATA --runs FOLDER",
        "    python -m benchmarks.trime DATA --models FOLDER --stores FOLDER",
        "",
    ]
    for corpus, result in results.items():
        lines += [
            f"## {corpus}",
            "",
            f"{result['entries']:,} entries, {result['test']:,} test tokens, {result['valid']:,} valid tokens; intervals over {result['unit']}.",
            "",
            "| | perplexity | to the tuned cache | its model without memory | paper | settings |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in result["rows"].items():
            interval = row["over the cache"]
            change = [100 * (math.exp(-interval[key]) - 1) for key in ("mean", "high", "low")]
            paper = f"{PAPER[name]:.2f}" if name in PAPER else ""
            lines.append(
                f"| {name} | {row['perplexity']:.2f} | {change[0]:+.1f} % ({change[1]:+.1f} to {change[2]:+.1f}) | "
                f"{row['without memory']:.2f} | {paper} | {row['settings']} |"
            )
        lines.append("")
    lines += [
        "*paper*: WikiText-103 dev, a model of 7 M parameters (Zhong et al. 2022). What differs from it: the text (twelve",
        "million tokens, not a hundred; read twice), a vocabulary of 8,192 pieces and not of words, a million stored tokens",
        "and not all, a cache of 4,096 tokens, and a Llama model. Compare the rows, not the numbers.",
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()

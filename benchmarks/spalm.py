"""Gates over the last state of the frozen reference model, beside fixed λ with the same four neighbors.

    python -m benchmarks.spalm DATA --stores FOLDER [--corpora wikitext2,law,code]

DATA holds `<corpus>.{train,valid,test}.jsonl.xz`. Half a million tokens of `train` are stored; λ and T of fixed mixtures,
and the gates, are fitted to 60 k tokens of `valid`, in seeded contiguous pieces, and 40 k tokens of `test` are scored once
a row. On the first corpus, two more gates are fitted to text that is stored, one of them with a text's own entries among
its neighbors: it learns to copy. Results: benchmarks/results/spalm.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memlm
from benchmarks.knn_lm import cut_documents, pieces
from memlm.evaluation._bootstrap import paired_bootstrap, units
from memlm.evaluation._retrieval import Text, gather, retrieve
from memlm.evaluation._tune import tune_cached
from memlm.mixtures import HeldOut, KnnMixture, Mixture, fit_spalm, fit_steered

RESULTS = Path(__file__).parent / "results"
CORPORA = ("wikitext2", "law", "code")
VALID, TEST, NEIGHBORS, MANY = 60_000, 40_000, 4, 1024
FIXED = "fixed λ, 4 neighbors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--corpora", default=",".join(CORPORA))
    options = parser.parse_args()
    path = RESULTS / "spalm.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    lm = memlm.reference_lm()
    for corpus in options.corpora.split(","):
        results[corpus] = measure(lm, options.data, options.stores, corpus)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "spalm.md").write_text(table(results))


def measure(lm: Any, data: Path, stores: Path, corpus: str) -> dict[str, Any]:
    train = cut_documents(lm, list(memlm.Corpus(data / f"{corpus}.train.jsonl.xz")))
    folder = stores / f"spalm-{corpus}"
    memory = memlm.Datastore(folder) if folder.exists() else memlm.Datastore.build(lm, train, folder)
    valid, test = (
        read(lm, Text(lm, pieces(data / f"{corpus}.{split}.jsonl.xz"), tokens), memory)
        for split, tokens in (("valid", VALID), ("test", TEST))
    )
    many = tune_of(valid, MANY)
    fixed = tune_of(valid, NEIGHBORS)
    width = lm.output.weight.shape[1]
    gates = {
        "SPALM, one gate": lambda held: fit_spalm(held, fixed),
        "SPALM, a gate a dimension": lambda held: fit_spalm(held, fixed, gates=width),
        "steered": lambda held: fit_steered(held, fixed),
    }
    rows = [row("fixed λ, 1,024 neighbors", many, valid, test), row(FIXED, fixed, valid, test)]
    few = valid.first(NEIGHBORS), test.first(NEIGHBORS)
    for name, fit in gates.items():
        started = time.perf_counter()
        mixture = fit(few[0].held)
        rows.append(row(name, mixture, *few) | {"seconds": time.perf_counter() - started})
    text = Text(lm, train, VALID)
    for name, own in (("left out", True), ("among the neighbors", False)) if corpus == CORPORA[0] else ():
        stored = read(lm, text, memory, NEIGHBORS, leave_out_own=own)
        if not bool(stored.held.evidence.memories[0].present.any()):
            continue  # a single document is all that is stored
        for kind in ("SPALM, one gate", "steered"):
            mixture = gates[kind](stored.held)
            rows.append(row(f"{kind}, fitted to stored text, own entries {name}", mixture, stored, few[1]))
    base = next(item for item in rows if item["name"] == FIXED)["log_probs"]
    documents = test.documents
    for item in rows:
        gain = paired_bootstrap(item["log_probs"] - base, documents)
        item |= {"against_fixed": [math.exp(-value) - 1 for value in (gain.mean, gain.high, gain.low)]}
    for item in rows:
        del item["log_probs"]
    return {
        "entries": len(memory),
        "valid_tokens": len(valid.held),
        "test_tokens": len(test.held),
        "unit": units(documents)[1],
        "lm": perplexity(test.held.lm_log_probs),
        "lm_valid": perplexity(valid.held.lm_log_probs),
        "among": float(right(test.first(NEIGHBORS).held).float().mean()),
        "rows": rows,
    }


class Pass:
    """A text with its neighbors."""

    def __init__(self, found: Any, documents: np.ndarray) -> None:
        self.found, self.documents = found, documents
        self.held = HeldOut(found.targets, found.lm_log_probs, found.evidence, units(documents)[0])

    def first(self, k: int) -> Pass:
        return Pass(replace(self.found, evidence=self.found.evidence.nearest([k])), self.documents)


def read(lm: Any, text: Text, memory: Any, k: int = MANY, *, leave_out_own: bool = True) -> Pass:
    options = {"beliefs": True, "hidden": True, "leave_out_own": leave_out_own}
    return Pass(gather(retrieve(lm, text, memory, [k], **options), text.tokens), text.document_of_target)


def tune_of(valid: Pass, k: int) -> KnnMixture:
    """Return the best λ and T with exactly so many neighbors."""
    best = tune_cached(valid.first(k).found, valid.documents).best
    assert isinstance(best, KnnMixture)
    return best


def row(name: str, mixture: Mixture, fitted: Pass, test: Pass) -> dict[str, Any]:
    log_probs = test.held.log_probs(mixture)
    weights = torch.cat([mixture.mix(part.evidence).weights[:, 0] for part in test.held.blocks(mixture.ks)])
    return {
        "name": name,
        "settings": mixture.describe(),
        "perplexity_fitted": perplexity(fitted.held.log_probs(mixture)),
        "perplexity": perplexity(log_probs),
        "auc": area(weights, right(test.first(NEIGHBORS).held)),
        "mean_weight": float(weights.mean()),
        "log_probs": log_probs.numpy(),
    }


def right(held: HeldOut) -> torch.Tensor:
    """Return whether the target is among the neighbors, bool, shape (n,)."""
    found = held.evidence.memories[0]
    return ((found.tokens == held.targets[:, None]) & found.present).any(dim=1)


def area(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Return the area under the ROC curve; ties count half."""
    _, place, number = score.double().unique(return_inverse=True, return_counts=True)
    ranks = number.cumsum(0) - (number - 1) / 2
    yes = int(positive.sum())
    no = len(positive) - yes
    return float((ranks[place][positive].sum() - yes * (yes + 1) / 2) / max(1, yes * no))


def perplexity(log_probs: torch.Tensor) -> float:
    return math.exp(-float(log_probs.double().mean()))


def table(results: dict[str, Any]) -> str:
    lines = [
        "# SPALM: gates over the last state of a frozen model",
        "",
        "Reference model, four neighbors of each token; λ, T and gates fitted to `valid`, scored once on `test`. *Against",
        "fixed λ* is the change of perplexity with its 95 % interval. *AUC*: how well the weight of the memory (1 − g, or λ)",
        "tells whether the target is among the four neighbors; .5 is a guess. Made by",
        "",
        "    python -m benchmarks.spalm DATA --stores FOLDER",
    ]
    for corpus, found in results.items():
        lines += [
            "",
            f"## {corpus}, {found['entries']:,} entries",
            "",
            f"{found['valid_tokens']:,} tokens of `valid`, {found['test_tokens']:,} of `test`; the model alone "
            f"{found['lm_valid']:.2f} and {found['lm']:.2f}. The target is among "
            f"the neighbors of {100 * found['among']:.0f} % of the tokens of `test`.",
            "",
            "| gate | on the text it was fitted to | `test` | against fixed λ | mean weight | AUC | seconds to fit |",
            "|---|---|---|---|---|---|---|",
        ]
        for item in found["rows"]:
            mean, low, high = (100 * value for value in item["against_fixed"])
            seconds = f"{item['seconds']:.0f}" if "seconds" in item else ""
            interval = "" if item["name"] == FIXED else f"{mean:+.1f} % ({low:+.1f} … {high:+.1f})"
            auc = "" if item["name"].startswith("fixed") else f"{item['auc']:.3f}"
            lines.append(
                f"| {item['name']} | {item['perplexity_fitted']:.2f} | {item['perplexity']:.2f} | {interval} | "
                f"{item['mean_weight']:.3f} | {auc} | {seconds} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Searches skipped by the learned weight: perplexity and speed, against always searching and against searching less.

    python -m benchmarks.skipping DATA_FOLDER --stores FOLDER [--corpora wikitext2]

The datastore of a corpus is that of benchmarks/mixtures.py. The learned weight is fitted to 100 k tokens of `valid`, and
everything else is chosen there, on halves that the network was not fitted to: the most searches that can be skipped
within 1 % of the perplexity of the same mixture without skipping, and within 1 % of the best fixed λ (the comparison of
He et al. 2021); and, of a half, a quarter and an eighth of the lists, each with the most searches that can be skipped
within 1 % of searching always and all, the one that took `valid` the least time. Each is scored once on 20 k tokens of
`test`, every pass timed three times in turn, beside fewer lists visited by every search without skipping.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import memlm
from benchmarks.knn_lm import TOKENS, pieces
from benchmarks.mixtures import store
from memlm.evaluation._compare import read
from memlm.evaluation._retrieval import Text
from memlm.evaluation._tune import tune_cached
from memlm.mixtures._fit_learned import fit_learned, judged_skipping_curve

RESULTS = Path(__file__).parent / "results"
VALID_TOKENS = 100_000
TOLERANCE = 0.01
REPEATS = 3
FEWER = (2, 4, 8)  # by how much fewer lists are visited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--corpora", default="wikitext2")
    options = parser.parse_args()
    lm = memlm.reference_lm()
    path = RESULTS / "skipping.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for corpus in options.corpora.split(","):
        memory = store(lm, options.data, corpus, options.stores)
        results[corpus] = measure(lm, memory, options.data, corpus)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "skipping.md").write_text(table(results))


def measure(lm: Any, memory: memlm.Datastore, data: Path, corpus: str) -> dict[str, Any]:
    text = pieces(data / f"{corpus}.valid.jsonl.xz")
    settings = {"max_k": 1024, "cache": 1, "max_tokens": VALID_TOKENS, "show_progress": True}
    valid = read(lm, memory, text, description=f"{corpus} valid", **settings)
    held = valid.held.memory(0)
    found = replace(valid.found, evidence=held.evidence)
    fixed = tune_cached(found, valid.text.document_of_target).best
    always = fit_learned(held, fixed, tolerance=0)
    judged = judged_skipping_curve(held, fixed)
    allowed = {
        "skipping, within 1 % of itself": judged[0]["perplexity"] * (1 + TOLERANCE),
        "skipping, within 1 % of fixed λ": float((-held.log_probs(fixed).mean()).exp()) * (1 + TOLERANCE),
    }
    arms = {"fixed λ": (fixed, 1), "learned": (always, 1)}
    for name, limit in allowed.items():
        share = _most(judged, limit)
        threshold = float(always.predicted(held.evidence.belief).quantile(share))
        arms[name] = (replace(always, threshold=threshold if share else 0.0), 1)
    del valid, held, found
    limit, seconds = allowed["skipping, within 1 % of itself"], {}
    curves = {}
    for fewer in FEWER:
        with visiting(memory, fewer):
            valid = read(lm, memory, text, description=f"{corpus} valid, 1/{fewer} of the lists", **settings)
        held = valid.held.memory(0)
        curves[fewer] = judged_skipping_curve(held, fixed)
        share = _most(curves[fewer], limit)
        mixture = fit_learned(held, fixed, tolerance=0)
        arms[f"learned, 1/{fewer} of the lists"] = (mixture, fewer)
        if curves[fewer][0]["perplexity"] <= limit:
            threshold = float(mixture.predicted(held.evidence.belief).quantile(share)) if share else 0.0
            seconds[fewer] = valid.found.model_seconds + valid.found.search_seconds[0] * (1 - share)
            both = replace(mixture, threshold=threshold)
            arms[f"skipping and 1/{fewer} of the lists, within 1 % of searching all"] = (both, fewer)
        del valid, held
    for fewer in seconds:
        if fewer != min(seconds, key=lambda number: seconds[number]):
            del arms[f"skipping and 1/{fewer} of the lists, within 1 % of searching all"]
    return {
        "valid_tokens": VALID_TOKENS,
        "nprobe": memory.index.details["nprobe"],
        "valid_curve": judged,
        "valid_curves_fewer_lists": curves,
        "valid_seconds_fewer_lists": seconds,
        "rows": scored(lm, memory, Text(lm, pieces(data / f"{corpus}.test.jsonl.xz"), TOKENS), arms),
    }


def _most(curve: list[dict[str, float]], limit: float) -> float:
    """Return the largest share of searches that can be skipped within a perplexity."""
    return max((row["skipped"] for row in curve if row["perplexity"] <= limit), default=0.0)


@contextmanager
def visiting(memory: memlm.Datastore, fewer: int) -> Iterator[None]:
    """Let every search visit so many times fewer lists."""
    nprobe = memory.index.details["nprobe"]
    memory.index.visit(max(1, nprobe // fewer))
    try:
        yield
    finally:
        memory.index.visit(nprobe)


def scored(lm: Any, memory: memlm.Datastore, text: Text, arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Score the test text by every arm in turn, `REPEATS` times; speeds are medians."""
    speeds: dict[str, list[float]] = {name: [] for name in ("lm", *arms)}
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(REPEATS):
        for name, (mixture, fewer) in arms.items():
            with visiting(memory, fewer):
                result = memlm.evaluate(lm, text, memory, mixture)
            plain, mixed = result.results[0], result.results[-1]
            speeds["lm"].append(plain.tokens_per_second)
            speeds[name].append(mixed.tokens_per_second)
            rows["lm"] = {"perplexity": plain.perplexity, "searched": 0.0}
            rows[name] = {"perplexity": mixed.perplexity, "searched": result.settings["searched"]}
    return [
        {"method": name, **rows[name], "tokens_per_second": statistics.median(speeds[name])} for name in ("lm", *arms)
    ]


def table(results: dict[str, Any]) -> str:
    """Tabulate everything as Markdown."""
    parts = ["# Searches skipped by the learned weight", ""]
    parts += [
        "Perplexity per token on 20 k tokens of `test`, which was scored once with each setting; tokens/s are medians of",
        f"{REPEATS} passes in turn. Thresholds were chosen on {VALID_TOKENS:,} tokens of `valid`.",
        "",
        "    python -m benchmarks.skipping DATA --stores FOLDER",
        "",
    ]
    for corpus, item in results.items():
        always = next(row for row in item["rows"] if row["method"] == "learned")
        parts += [f"## {corpus}", "", f"{item['nprobe']} lists visited by a search.", ""]
        parts += ["| method | searched | perplexity | to learned | tokens/s | to learned |", "|---" * 6 + "|"]
        for row in item["rows"]:
            change, speed = (row[key] / always[key] for key in ("perplexity", "tokens_per_second"))
            cells = [f"{100 * row['searched']:.0f} %", f"{row['perplexity']:.2f}", f"{100 * (change - 1):+.1f} %"]
            cells += [f"{row['tokens_per_second']:,.0f}", f"{speed:.2f}×"]
            parts.append("| " + " | ".join([row["method"], *cells]) + " |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    main()

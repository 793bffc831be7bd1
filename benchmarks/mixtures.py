"""Every way to choose λ on six corpora, adapters carried to other corpora, and one gate over two datastores.

    python -m benchmarks.mixtures DATA_FOLDER --stores FOLDER [--corpora law,latex] [--parts compare,transfer,gate]

DATA_FOLDER holds `<corpus>.{train,valid,test}.jsonl.xz`. The datastore of a corpus holds a million tokens of `train`,
whole documents in a seeded order, the last one cut; that of WikiText-2, on which the model was trained, the whole. It lies
behind FAISS and is made in FOLDER/<corpus>-{1m,all}/memory unless it is there already. Everything is fitted to 100 k tokens of `valid`
and reported on 20 k tokens of `test`, in seeded contiguous pieces. Results are added to benchmarks/results/mixtures.json
and tabulated in mixtures.md. Takes 24 GB of memory with both parts that need several corpora, 8 GB for `compare` alone.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import memlm
from benchmarks.cache_distance import by_distance
from benchmarks.knn_lm import CORPORA, TOKENS, cut_documents, pieces
from memlm import ops
from memlm.evaluation._compare import Read, compare_read, read
from memlm.evaluation._comparison_page import markdown
from memlm.evaluation._retrieval import Text, gather, retrieve
from memlm.evaluation._tune import tune_cached
from memlm.evidence import Evidence, join
from memlm.mixtures import AdapterMixture, HeldOut, KnnMixture, fit_gate, memory_likelihoods
from memlm.mixtures._adapter import corrections
from memlm.mixtures._features import features
from memlm.mixtures._fit_adapter import fit_adapter

RESULTS = Path(__file__).parent / "results"
ENTRIES, WHOLE = 1_000_000, ("wikitext2",)
TOKENS_OF = {"valid": 100_000, "test": TOKENS}
SETTINGS = {"max_k": 1024, "cache": 1024, "show_progress": True}
PAIR = ("law", "code")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--parts", default="compare,control,transfer,gate")
    options = parser.parse_args()
    lm = memlm.reference_lm()
    results: dict[str, Any] = {}
    path = RESULTS / "mixtures.json"
    if path.exists():
        results = json.loads(path.read_text())
    fixed, adapters, tests, sides = {}, {}, {}, {}
    for corpus in options.corpora.split(","):
        memory = store(lm, options.data, corpus, options.stores)
        valid, test = (side(lm, memory, options.data, corpus, split) for split in ("valid", "test"))
        tests[corpus] = test.held.memory(0)
        if "compare" in options.parts:
            comparison = compare_read(lm, memory, valid, test)
            comparison.save(options.stores / f"{corpus}.html")
            print(f"{corpus}\n{comparison}\n", flush=True)
            results.setdefault("compare", {})[corpus] = comparison.to_dict() | {"markdown": markdown(comparison)}
            results.setdefault("cache", {})[corpus] = by_distance(valid.held.memory(1), test.held.memory(1))
            fixed[corpus], adapters[corpus] = (comparison.mixtures[name] for name in ("knn-lm", "adapter"))
        else:  # what the other parts need of it
            found = replace(valid.found, evidence=valid.held.memory(0).evidence)
            fixed[corpus] = tune_cached(found, valid.text.document_of_target).best
            adapters[corpus] = fit_adapter(valid.held.memory(0), fixed[corpus])
        if "control" in options.parts:
            results.setdefault("control", {})[corpus] = control(fixed[corpus], adapters[corpus], tests[corpus])
        publish(results)
        if corpus in PAIR:
            sides[corpus] = (memory, valid.held.memory(0), test.held.memory(0))
        del valid, test  # gigabytes of evidence of the cache
    if "transfer" in options.parts and len(adapters) > 1:
        results["transfer"] = transfer(fixed, adapters, tests)
        publish(results)
    if "gate" in options.parts and all(corpus in sides for corpus in PAIR):
        results["gate"] = two_datastores(lm, options.data, sides, adapters)
        publish(results)


def publish(results: dict[str, Any]) -> None:
    (RESULTS / "mixtures.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "mixtures.md").write_text(table(results))


def store(lm: Any, data: Path, corpus: str, stores: Path) -> memlm.Datastore:
    path = stores / (f"{corpus}-all" if corpus in WHOLE else f"{corpus}-1m") / "memory"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        train = list(memlm.Corpus(data / f"{corpus}.train.jsonl.xz"))
        memlm.Datastore.build(lm, train if corpus in WHOLE else cut_documents(lm, train, ENTRIES), path)
    return memlm.Datastore(path)


def side(lm: Any, memory: memlm.Datastore, data: Path, corpus: str, split: str) -> Read:
    source = pieces(data / f"{corpus}.{split}.jsonl.xz")
    return read(lm, memory, source, description=f"{corpus} {split}", max_tokens=TOKENS_OF[split], **SETTINGS)


def control(fixed: KnnMixture, adapter: AdapterMixture, held: HeldOut) -> dict[str, float]:
    """Perplexity of an adapter when every token gets λ, or all that the network says, of another token."""
    said = torch.cat(
        [
            adapter.network(features(part.evidence.memories[0], part.evidence.belief, adapter.temperature, adapter.k))
            for part in held.blocks(adapter.ks)
        ]
    )
    other = said[torch.randperm(len(said), generator=torch.Generator().manual_seed(0))]
    arms = {
        "adapter": said,
        "λ shuffled": torch.cat([other[:, :1], said[:, 1:]], dim=1),
        "all that the network says shuffled": other,
    }
    rows = {"fixed λ": perplexity(held.log_probs(fixed))}
    for name, words in arms.items():
        log_probs, start = [], 0
        for part in held.blocks(adapter.ks):
            found, numbers = part.evidence.memories[0], slice(start, start + len(part))
            weight, sharpness, tail = corrections(words[numbers], adapter.interpolation_weight)
            shares = ops.adapted_log_weights(found.distances, found.present, adapter.temperature, sharpness, tail)
            memory = memory_likelihoods((shares,), part.evidence, part.targets)[:, 0].double()
            weight = (weight * found.present.any(dim=1)).double()
            log_probs.append(
                ((1 - weight) * part.lm_log_probs.double().exp() + weight * memory).clamp_min(1e-300).log()
            )
            start += len(part)
        rows[name] = perplexity(torch.cat(log_probs))
    return rows


def perplexity(log_probs: Tensor) -> float:
    return math.exp(-float(log_probs.double().mean()))


def transfer(fixed: dict[str, Any], adapters: dict[str, Any], tests: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Perplexity change, in percent of the tuned fixed λ, of every corpus' adapter on every corpus' test and datastore."""
    rows: dict[str, dict[str, float]] = {}
    for source, adapter in adapters.items():
        rows[source] = {}
        for target, held in tests.items():
            rows[source][target] = 100 * (
                perplexity(held.log_probs(adapter)) / perplexity(held.log_probs(fixed[target])) - 1
            )
    return rows


def two_datastores(lm: Any, data: Path, sides: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
    """One gate over both datastores, fitted to both valid texts together, against each datastore's adapter alone."""
    helds: dict[str, list[HeldOut]] = {"valid": [], "test": []}
    for corpus in PAIR:
        for place, split in enumerate(("valid", "test"), start=1):
            text = Text(lm, pieces(data / f"{corpus}.{split}.jsonl.xz"), TOKENS_OF[split])
            known = sides[corpus][place]
            found = []
            for other in PAIR:
                if other == corpus:
                    found.append(known.evidence.memories[0])
                else:
                    passed = retrieve(lm, text, sides[other][0], [1024], description=f"{corpus} in {other}")
                    found.append(gather(passed, text.tokens).found)
            evidence = Evidence(tuple(found), known.evidence.belief)
            helds[split].append(HeldOut(known.targets, known.lm_log_probs, evidence, known.groups))
    members = tuple(adapters[corpus] for corpus in PAIR)
    first, second = helds.pop("valid")
    both = HeldOut(
        torch.cat([first.targets, second.targets]),
        torch.cat([first.lm_log_probs, second.lm_log_probs]),
        join([first.evidence, second.evidence]),
        np.concatenate([first.groups, second.groups + 1 + first.groups.max()]),
    )
    del first, second
    gate = fit_gate(both, members, [sides[corpus][0].statistics() for corpus in PAIR])
    rows = {}
    for corpus, held in zip(PAIR, helds["test"], strict=True):
        alone = {other: perplexity(held.memory(place).log_probs(members[place])) for place, other in enumerate(PAIR)}
        weights = torch.cat([gate.mix(part.evidence).weights for part in held.blocks(gate.ks)]).mean(dim=0).tolist()
        rows[corpus] = {
            "lm": perplexity(held.lm_log_probs),
            **{f"adapter of {other}": value for other, value in alone.items()},
            "gate": perplexity(held.log_probs(gate)),
            **{f"mean λ of {other}": weight for other, weight in zip(PAIR, weights, strict=True)},
        }
    return rows


def table(results: dict[str, Any]) -> str:
    """Tabulate everything as Markdown."""
    parts = [
        "# When to trust the memory: every way to choose λ",
        "",
        "Perplexity per token on `test`, with the reference language model (its training text holds WikiText-2 and none",
        "of the others) and a million tokens of `train` stored (of WikiText-2 all three), behind FAISS. Fitted to 100 k",
        "tokens of `valid`; each row's test text was scored once. Changes in percent of perplexity, with paired bootstrap",
        "95 % intervals. *λ shuffled* gives every token the weight of another one. tokens/s: model, search and mixing on two shared, busy cores, in a pass in",
        "which everything is searched for every method; compare them within a table alone.",
        "",
        "    python -m benchmarks.mixtures DATA --stores FOLDER",
        "",
    ]
    compared = results.get("compare", {})
    if compared:
        methods = [row["method"] for row in next(iter(compared.values()))["rows"]]
        parts += ["## Change of perplexity against the tuned fixed λ", ""]
        parts += ["| method | " + " | ".join(compared) + " | mean of the domains |", "|---" * (len(compared) + 2) + "|"]
        fixed = {corpus: _perplexity(item, "knn-lm") for corpus, item in compared.items()}
        domains = [corpus for corpus in compared if corpus != "wikitext2"]
        for method in methods:
            changes = {corpus: _perplexity(item, method) / fixed[corpus] for corpus, item in compared.items()}
            mean = math.exp(sum(math.log(changes[corpus]) for corpus in domains) / max(1, len(domains)))
            cells = [*changes.values(), mean] if method != "lm" else [*changes.values()]
            text = [f"{100 * (change - 1):+,.1f} %" for change in cells]
            parts.append("| " + " | ".join([method, *text, *([""] if method == "lm" else [])]) + " |")
        parts.append("| *fixed λ* | " + " | ".join(f"{value:,.2f}" for value in fixed.values()) + " | |")
        parts.append("")
    if "transfer" in results:
        columns = list(results["transfer"])
        parts += ["## Adapters carried to other datastores", ""]
        parts += [
            "Rows: fitted with; columns: used with, without refitting; against that datastore's tuned fixed λ.",
            "",
        ]
        parts += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for source, row in results["transfer"].items():
            parts.append("| " + " | ".join([source, *(f"{row[column]:+,.1f} %" for column in columns)]) + " |")
        parts.append("")
    if "control" in results:
        columns = list(results["control"])
        names = list(next(iter(results["control"].values())))
        parts += ["## What is left of the adapter when it is shuffled", ""]
        parts += [
            "Against the tuned fixed λ. Where λ alone is another token's, p_kNN is still corrected for the token itself.",
            "",
        ]
        parts += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name in names[1:]:
            rows = (results["control"][corpus] for corpus in columns)
            cells = (f"{100 * (row[name] / row[names[0]] - 1):+,.1f} %" for row in rows)
            parts.append("| " + " | ".join([name, *cells]) + " |")
        parts.append("")
    if "cache" in results:
        columns = list(results["cache"])
        parts += ["## λ of a cache by distance, and by age", ""]
        parts += [
            "A linear cache of 1,024 tokens without a datastore, θ of the best constant λ; see benchmarks/cache_distance.py."
        ]
        parts += ["Perplexity with one λ, then changes against it.", ""]
        parts += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        parts.append(
            "| *one λ* | " + " | ".join(f"{results['cache'][corpus]['one λ']:,.2f}" for corpus in columns) + " |"
        )
        for name in ("buckets", "buckets, λ shuffled", "exponential", "exponential, λ shuffled", "age"):
            rows = (results["cache"][corpus] for corpus in columns)
            cells = (f"{100 * (row[name] / row['one λ'] - 1):+,.1f} %" for row in rows)
            parts.append("| " + " | ".join([name, *cells]) + " |")
        for name in ("number of buckets", "age τ"):
            cells = (f"{results['cache'][corpus][name]:,.0f}" for corpus in columns)
            parts.append("| " + " | ".join([name, *cells]) + " |")
        parts.append("")
    if "gate" in results:
        columns = list(next(iter(results["gate"].values())))
        parts += ["## One gate over two datastores", "", "Fitted to both `valid` texts together.", ""]
        parts += ["| test text | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for corpus, row in results["gate"].items():
            cells = (f"{row[name]:.3f}" if name.startswith("mean") else f"{row[name]:,.2f}" for name in columns)
            parts.append("| " + " | ".join([corpus, *cells]) + " |")
        parts.append("")
    for corpus, item in compared.items():
        parts += [f"## {corpus}", "", item["markdown"]]
    return "\n".join(parts).rstrip() + "\n"


def _perplexity(item: dict[str, Any], method: str) -> float:
    return next(row["perplexity"] for row in item["rows"] if row["method"] == method)


if __name__ == "__main__":
    main()

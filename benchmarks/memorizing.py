"""Memorizing Transformers: perplexity on documents by memory size, a short fine-tune, no training at all; step time.

    python -m benchmarks.memorizing DATA --runs FOLDER [--parts tune,curve,speed] [--corpora isabelle,code,novels]

DATA holds `<corpus>.{train,test}.jsonl.xz`. A directory of `code` is one document: its files in the order of their paths.
tune: the reference model, which was trained without memory, goes on for a few steps on each corpus, without and with
memory. curve: perplexity on `test` by memory size. speed: a training step. Finished pieces are kept in FOLDER; run again to
go on. Results: benchmarks/results/memorizing.{json,md}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import memlm
from memlm.evaluation._bootstrap import paired_bootstrap, units
from memlm.layers import AttentionMemories, forget, memorize
from memlm.training import document_streams

RESULTS = Path(__file__).parent / "results"
CORPORA = ("isabelle", "code", "novels")
LAYER, LENGTH, TOP_K = 4, 256, 32  # of six layers; tokens a segment
ROWS, STEPS, RATE, TRAINED = 8, 150, 1e-3, 8192  # TRAINED: tokens of memory while tuning
SIZES = (0, 512, 2048, 8192, 32768)
DOCUMENTS, LONGEST = 2, 34_000  # test documents, and how much of each
ARMS = {
    "reference": (0, SIZES[-1]),
    "tuned without memory": SIZES,
    "tuned with memory": (*SIZES, -SIZES[-1]),  # negative: a row reads the memory of the other document
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--parts", default="tune,curve,speed")
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--longest", type=int, default=LONGEST)
    options = parser.parse_args()
    path = RESULTS / "memorizing.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part, corpus in itertools.product(options.parts.split(","), options.corpora.split(",")):
        if part == "tune":
            for arm in ("tuned without memory", "tuned with memory"):
                tune(options, corpus, arm)
        elif part == "curve":
            results.setdefault("curve", {})[corpus] = curve(options, corpus)
    if "speed" in options.parts:
        results["speed"] = speed()
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "memorizing.md").write_text(table(results))


def token_ids(options: argparse.Namespace, corpus: str, split: str) -> list[np.ndarray]:
    """Token ids of every document, the longest of `test` alone and cut off."""
    path = options.runs / f"{corpus}-{split}.npz"
    if not path.exists():
        options.runs.mkdir(parents=True, exist_ok=True)
        tokenizer = memlm.reference_lm().tokenizer
        tokenizer.model_max_length = 10**9
        texts = texts_of(options.data, corpus, split)
        if split == "test":
            texts = [text[: 10 * options.longest] for text in sorted(texts, key=len, reverse=True)[:DOCUMENTS]]
        np.savez(path, *(np.array(tokenizer(text)["input_ids"], np.int32) for text in texts))
    with np.load(path) as file:
        found = [file[name].astype(np.int64) for name in file.files]
    return [ids[: options.longest + 1] for ids in found] if split == "test" else found


def texts_of(data: Path, corpus: str, split: str) -> list[str]:
    documents = list(memlm.Corpus(data / f"{corpus}.{split}.jsonl.xz"))
    if corpus != "code":
        return [document.text for document in documents]
    folders = defaultdict(list)
    for document in sorted(documents, key=lambda item: item.id):
        folders[Path(document.id).parent].append(document.text)
    return ["\n".join(texts) for texts in folders.values()]


def place(options: argparse.Namespace, corpus: str, arm: str) -> Path:
    return options.runs / f"{corpus}-{arm.replace(' ', '-')}"


def tune(options: argparse.Namespace, corpus: str, arm: str) -> None:
    """Train on documents read in order, one step a segment."""
    result = place(options, corpus, arm).with_suffix(".pt")
    documents = token_ids(options, corpus, "train")
    if result.exists():
        return
    torch.manual_seed(0)
    model = memlm.reference_lm().model.float().train()
    memory = memorize(model, [LAYER], size=TRAINED if arm == "tuned with memory" else 0, top_k=TOP_K)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    orders = (np.random.default_rng(epoch).permutation(len(documents)) for epoch in itertools.count())
    endless = (documents[number] for order in orders for number in order)
    started, losses = time.perf_counter(), []
    for step, batch in enumerate(itertools.islice(document_streams(endless, ROWS, LENGTH), options.steps)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10, 2 * (1 - step / options.steps))
        memory.reset(batch.begins)
        logits = model(batch.input_ids, attention_mask=batch.known, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 25 == 0:
            seconds = time.perf_counter() - started
            print(corpus, arm, step + 1, f"{np.mean(losses[-25:]):.3f}", f"{seconds:.0f} s", flush=True)
    forget(model)
    torch.save(model.state_dict(), result)


@torch.no_grad()
def nats(model: Any, documents: list[np.ndarray], memory: AttentionMemories, rolled: bool) -> np.ndarray:
    """Nats of every target, document after document; each is one row."""
    rows = len(documents)
    found: list[list[np.ndarray]] = [[] for _ in documents]
    with ExitStack() as stack:
        if rolled:
            stack.enter_context(memory.reading_from([*range(1, rows), 0]))
        for batch in document_streams(documents, rows, LENGTH):
            logits = model(batch.input_ids, attention_mask=batch.known, use_cache=False).logits
            values = cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
            for row in range(rows):
                found[row].append(values[row, batch.known[row].bool()].double().numpy())
    return np.concatenate([np.concatenate(parts) for parts in found])


def curve(options: argparse.Namespace, corpus: str) -> dict[str, Any]:
    """Every arm by memory size."""
    documents = token_ids(options, corpus, "test")
    model = memlm.reference_lm().model.float().eval()
    measured: dict[str, np.ndarray] = {}
    for arm, sizes in ARMS.items():
        if arm != "reference":
            model.load_state_dict(torch.load(place(options, corpus, arm).with_suffix(".pt"), weights_only=True))
        for size in sizes:
            name = f"{arm}, {size}" if size >= 0 else f"{arm}, {-size}, of the other document"
            path = place(options, corpus, name).with_suffix(".npy")
            if not path.exists():
                started = time.perf_counter()
                memory = memorize(model, [LAYER], size=abs(size), top_k=TOP_K)
                np.save(path, nats(model, documents, memory, size < 0))
                forget(model)
                print(
                    corpus,
                    name,
                    f"{math.exp(np.load(path).mean()):.3f}",
                    f"{time.perf_counter() - started:.0f} s",
                    flush=True,
                )
            measured[name] = np.load(path)
    number = np.repeat(np.arange(len(documents)), [len(ids) - 1 for ids in documents])
    rows = {}
    for name, values in measured.items():
        base = measured[f"{name.split(',')[0]}, 0"]
        change = paired_bootstrap(base - values, number)
        rows[name] = {"perplexity": math.exp(values.mean()), "gain": change.to_dict()}
    lengths = [len(ids) - 1 for ids in documents]
    return {"rows": rows, "lengths": lengths, "unit": units(number)[1], "steps": options.steps}


def speed(rows: int = 2, repeats: int = 7) -> dict[str, Any]:
    """A training step of the reference model with a full memory, in turns with one without."""
    model = memlm.reference_lm().model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    torch.manual_seed(0)
    ids = torch.randint(0, 8192, (rows, 512))

    def step() -> float:
        started = time.perf_counter()
        logits = model(ids, use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    found: dict[str, Any] = {}
    for size in (8192, 32768):
        plain, memorized = [], []
        step()
        for _ in range(repeats):
            plain.append(step())
            memory = memorize(model, [4], size=size, top_k=TOP_K)
            keys = torch.randn(rows, 4, size, 64)
            memory.memories[4].store.write(keys, keys)
            step()
            memorized.append(step())
            forget(model)
        found[str(size)] = {
            "ratio": float(np.median(memorized) / np.median(plain)),
            "ratios": [float(with_ / without) for with_, without in zip(memorized, plain, strict=True)],
        }
        print("speed", size, found[str(size)]["ratio"], flush=True)
    return {"threads": torch.get_num_threads(), "rows": rows, "torch": torch.__version__, "sizes": found}


def table(results: dict[str, Any]) -> str:
    lines = [
        "# Memorizing Transformers: perplexity by memory size",
        "",
        "    python -m benchmarks.memorizing DATA --runs FOLDER",
        "",
        "The reference model (6.6 million parameters, trained on prose without memory) goes on for a few steps on the training",
        f"text of each corpus, with and without a memory of {TRAINED:,} tokens in layer {LAYER} of 6 (joint softmax, top_k {TOP_K}, nothing added",
        f"that is learned); {ROWS} rows of {LENGTH} tokens a step, the same text in the same order. Perplexity a token on `test`: the",
        f"{DOCUMENTS} longest documents, at most {LONGEST:,} tokens of each, in segments of {LENGTH} that see nothing of one another but through memory.",
        "A directory of `code` is one document. In brackets the change to the same model with memory 0, with a paired bootstrap 95 %",
        "interval. *Tuned without memory* with a memory is a joint softmax that nobody trained. One seed. The paper trains for",
        "hundreds of thousands of steps; this is a CPU's few minutes, so compare columns and rows, not the numbers with the paper's.",
        "",
    ]
    for corpus, result in results.get("curve", {}).items():
        arms = list(ARMS)
        lengths = ", ".join(f"{length:,}" for length in result["lengths"])
        lines += [
            f"## {corpus}",
            "",
            f"{result['steps']} steps, {result['steps'] * ROWS * LENGTH:,} tokens; test documents of {lengths} tokens; intervals over {result['unit']}.",
            "",
            "| memory | " + " | ".join(arms) + " |",
            "|---" + "|---" * len(arms) + "|",
        ]
        for size in (*map(str, SIZES), f"{SIZES[-1]}, of the other document"):
            cells = [cell(result["rows"].get(f"{arm}, {size}"), size == "0") for arm in arms]
            lines.append(f"| {size} | " + " | ".join(cells) + " |")
        untrained, tuned = (result["rows"][f"{arm}, {SIZES[-1]}"] for arm in arms[1:])
        start = math.log(result["rows"][f"{arms[1]}, 0"]["perplexity"])
        gains = [start - math.log(row["perplexity"]) for row in (untrained, tuned)]
        lines += [
            "",
            f"Against tuning without memory and using none, 32k tokens of memory give {gains[1]:+.3f} nats a token after tuning with",
            f"memory, {gains[0]:+.3f} untrained.",
            "",
        ]
    if "speed" in results:
        found = results["speed"]
        lines += [
            "## Step time",
            "",
            f"A training step of the reference model ({found['rows']} rows of 512 tokens, AdamW, {found['threads']} threads) with a full memory in one",
            f"layer, top_k {TOP_K}, over the same step without; medians of steps in turn.",
            "",
            "| memory | ratio | lowest | highest |",
            "|---|---|---|---|",
        ]
        for size, row in found["sizes"].items():
            lines.append(
                f"| {int(size):,} | {row['ratio']:.2f} | {min(row['ratios']):.2f} | {max(row['ratios']):.2f} |"
            )
    return "\n".join(lines).rstrip() + "\n"


def cell(row: dict[str, Any] | None, plain: bool) -> str:
    if row is None:
        return ""
    mean, low, high = (100 * math.expm1(-row["gain"][key]) for key in ("mean", "high", "low"))
    return f"{row['perplexity']:.2f}" + ("" if plain else f" ({mean:+.1f} %, {low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()

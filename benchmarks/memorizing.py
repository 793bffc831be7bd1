"""Memorizing Transformers: perplexity on documents by memory size, a short fine-tune, no training at all; step time.

    python -m benchmarks.memorizing DATA --runs FOLDER [--parts train,curve,speed] [--corpora isabelle,code,novels]

DATA holds `<corpus>.{train,test}.jsonl.xz`. A directory of `code` is one document: its files in the order of their paths.
train: for each corpus a small Llama without memory, one with, one with and no drop-off by age, and the first with memory for
its last fifth of steps. curve: perplexity on `test` by memory size. speed: a training step of the reference model. Finished pieces are kept in FOLDER; run
again to go on. Results: benchmarks/results/memorizing.{json,md}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

import memlm
from memlm.evaluation._bootstrap import paired_bootstrap, units
from memlm.layers import AttentionMemories, forget, memorize
from memlm.recipes._copying import CopyingLM, losses_of
from memlm.training import ModelShape, document_streams, train_tokenizer

from .squat import documents_of

RESULTS = Path(__file__).parent / "results"
CORPORA = ("isabelle", "code", "novels")
VOCABULARY, LENGTH, TOP_K = 2048, 128, 32  # LENGTH: tokens a segment
SHAPE = ModelShape(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=LENGTH,
)
ROWS, STEPS, RATE, FALLING, TRAINED = 16, 400, 2e-3, 0.2, 4096  # TRAINED: tokens of memory while training
SIZES = (0, 512, 2048, 8192, 32768)
DOCUMENTS, LONGEST = 2, 33_024  # test documents, and how much of each
WORN = 1e-3  # nats that an entry loses a token at first, where there is a drop-off by age


class Arm(NamedTuple):
    """A trained model, and how it is read."""

    trained: str
    drop_off: str
    sizes: tuple[int, ...]  # negative: a row reads the memory of the other document


ARMS = {
    "none": Arm("none", "none", SIZES),
    "none, by age": Arm("none", "age", SIZES[1:]),
    "tuned": Arm("tuned", "age", SIZES),
    "memory": Arm("memory", "age", (*SIZES, -SIZES[-1])),
    "memory, no drop-off": Arm("memory-no-drop-off", "none", (*SIZES, -SIZES[-1])),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--parts", default="train,curve,speed")
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--longest", type=int, default=LONGEST)
    options = parser.parse_args()
    path = RESULTS / "memorizing.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part, corpus in itertools.product(options.parts.split(","), options.corpora.split(",")):
        if part == "train":
            for arm in ("start", "none", "tuned", "memory", "memory-no-drop-off"):
                train(options, corpus, arm)
        elif part == "curve":
            results.setdefault("curve", {})[corpus] = curve(options, corpus)
    if "speed" in options.parts:
        results["speed"] = speed()
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "memorizing.md").write_text(table(results))


def token_ids(options: argparse.Namespace, corpus: str, split: str) -> list[np.ndarray]:
    """Token ids of every document, the longest of `test` alone and cut off."""
    folder = options.runs / corpus
    path = folder / f"{split}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        names = [str(options.data / f"{corpus}.train.jsonl.xz")]
        train_tokenizer(VOCABULARY, LENGTH, names, folder / "tokenizer")
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", model_max_length=10**9)
        documents = documents_of(options.data / f"{corpus}.{split}.jsonl.xz", corpus == "code")
        texts = [document.text for document in documents]
        if split != "train":
            texts = [text[: 10 * options.longest] for text in sorted(texts, key=len, reverse=True)[:DOCUMENTS]]
        elif corpus == "novels":  # enough for these steps
            texts = [text[:300_000] for text in texts]
        np.savez(path, *(np.array(tokenizer(text)["input_ids"], np.int32) for text in texts))
    with np.load(path) as file:
        found = [file[name].astype(np.int64) for name in file.files]
    return found if split == "train" else [ids[: options.longest + 1] for ids in found]


def place(options: argparse.Namespace, corpus: str, arm: str) -> Path:
    return options.runs / corpus / arm.replace(" ", "-")


def train(options: argparse.Namespace, corpus: str, arm: str) -> None:
    """Train on documents read in order, one step a segment; `none` and `tuned` go on from `start`."""
    result = place(options, corpus, arm).with_suffix(".pt")
    if result.exists():
        return
    documents = token_ids(options, corpus, "train")
    turn = round(options.steps * (1 - FALLING))
    first = turn if arm in ("none", "tuned") else 0
    stop = turn if arm == "start" else options.steps
    model = CopyingLM(SHAPE, seed=0).train()
    drop_off = "none" if arm == "memory-no-drop-off" else "age"
    memory = model.remember(0 if arm in ("start", "none") else TRAINED, TOP_K, drop_off)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    if first:
        state = torch.load(place(options, corpus, "start").with_suffix(".pt"), weights_only=True)
        model.load_state_dict(state, strict=False)  # the drop-off by age is new
    orders = (np.random.default_rng(epoch).permutation(len(documents)) for epoch in itertools.count())
    endless = (documents[number] for order in orders for number in order)
    last, started, losses = torch.zeros(ROWS, 1, dtype=torch.int64), time.perf_counter(), []
    batches = itertools.islice(document_streams(endless, ROWS, LENGTH), first, stop)
    for step, batch in enumerate(batches, start=first):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step - first + 1) / 20, (1 - step / options.steps) / FALLING)
        memory.reset(batch.begins)
        loss = losses_of(model, batch, last).sum() / (batch.targets >= 0).sum()
        last = batch.input_ids[:, -1:]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 40 == 0:
            seconds = time.perf_counter() - started
            print(corpus, arm, step + 1, f"{np.mean(losses[-40:]):.3f}", f"{seconds:.0f} s", flush=True)
    torch.save(model.state_dict(), result)


@torch.no_grad()
def nats(model: CopyingLM, documents: list[np.ndarray], memory: AttentionMemories, rolled: bool) -> np.ndarray:
    """Nats of every target, document after document; each is one row."""
    rows, last = len(documents), torch.zeros(len(documents), 1, dtype=torch.int64)
    found: list[list[np.ndarray]] = [[] for _ in documents]
    with ExitStack() as stack:
        if rolled:
            stack.enter_context(memory.reading_from([*range(1, rows), 0]))
        for batch in document_streams(documents, rows, LENGTH):
            values = losses_of(model, batch, last)
            last = batch.input_ids[:, -1:]
            for row in range(rows):
                found[row].append(values[row, batch.known[row].bool()].double().numpy())
    return np.concatenate([np.concatenate(parts) for parts in found])


def curve(options: argparse.Namespace, corpus: str) -> dict[str, Any]:
    """Every arm by memory size."""
    documents = token_ids(options, corpus, "test")
    measured: dict[str, np.ndarray] = {}
    worn = {}
    for name, arm in ARMS.items():
        state = torch.load(place(options, corpus, arm.trained).with_suffix(".pt"), weights_only=True)
        for size in arm.sizes:
            row = f"{name}, {size}" if size >= 0 else f"{name}, {-size}, of the other document"
            path = place(options, corpus, row).with_suffix(".npy")
            model = CopyingLM(SHAPE, seed=0).eval()
            memory = model.remember(abs(size), TOP_K, arm.drop_off)
            model.load_state_dict(
                state, strict=False
            )  # a size of 0 has no drop-off, and none was trained without memory
            if arm.drop_off == "age" and size:
                worn[name] = memory.memories[1].forgetting.exp().tolist()
            if not path.exists():
                started = time.perf_counter()
                np.save(path, nats(model, documents, memory, size < 0))
                seconds = time.perf_counter() - started
                print(corpus, row, f"{math.exp(np.load(path).mean()):.3f}", f"{seconds:.0f} s", flush=True)
            measured[row] = np.load(path)
    number = np.repeat(np.arange(len(documents)), [len(ids) - 1 for ids in documents])
    rows = {}
    for name, values in measured.items():
        change = paired_bootstrap(measured["none, 0"] - values, number)
        rows[name] = {"perplexity": math.exp(values.mean()), "gain": change.to_dict()}
    lengths = [len(ids) - 1 for ids in documents]
    facts = {"forgetting": worn, "steps": options.steps}
    return facts | {"rows": rows, "lengths": lengths, "unit": units(number)[1]}


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
        f"A Llama of two layers and width {SHAPE.hidden_size} for each corpus, over a byte-level BPE vocabulary of {VOCABULARY:,} made of the",
        "corpus. Its embedding sees the token before; the upper layer has memory, no positions, and starts as a head that copies",
        f"(training for minutes would not find it). Joint softmax, top_k {TOP_K}, queries and keys of length 1. *none* was trained without",
        f"memory: with memory, it is a joint softmax without any training; *by age*, with a drop-off of {WORN:g} nats a token that nobody",
        f"trained either. *tuned* is that model, with a memory of {TRAINED:,} tokens in its last fifth of steps; *memory* had {TRAINED:,} tokens",
        f"from the first step. Both learn a drop-off by age for each head, which starts at {WORN:g}; *no drop-off*, the paper's form, has none.",
        "Steps and text are the same for all, one seed.",
        "",
        f"Perplexity a token on `test`: the {DOCUMENTS} longest documents, at most {LONGEST:,} tokens of each, in segments of {LENGTH} that see",
        "nothing of one another but through memory. A directory of `code` is one document. In brackets the change to *none* with",
        "memory 0, with a paired bootstrap 95 % interval. The paper trains for hundreds of thousands of steps; this is a CPU's few",
        "minutes, so compare columns and rows, not the numbers with the paper's.",
        "",
    ]
    for corpus, result in results.get("curve", {}).items():
        arms, rows = list(ARMS), result["rows"]
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
            cells = [cell(rows.get(f"{arm}, {size}")) for arm in arms]
            lines.append(f"| {size} | " + " | ".join(cells) + " |")
        learned = {
            name: ", ".join(f"{value:.2g}" for value in result["forgetting"][name]) for name in ("tuned", "memory")
        }
        gains = {name: rows[f"{name}, {SIZES[-1]}"]["gain"]["mean"] for name in ARMS}
        lines += [
            "",
            f"32k tokens of memory change the nats of a token, against *none* without, by {-gains['none']:+.3f} with no training at all,",
            f"{-gains['none, by age']:+.3f} with a drop-off by age, {-gains['tuned']:+.3f} after the short fine-tune (that is",
            f"{gains['tuned'] / gains['memory']:.0%} of the gain of *memory*), {-gains['memory']:+.3f} in *memory* and {-gains['memory, no drop-off']:+.3f}",
            f"without drop-off. Drop-off learned, nats a token: tuned {learned['tuned']}; memory {learned['memory']}.",
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


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["gain"]["mean"]:
        return f"{row['perplexity']:.2f}"
    mean, low, high = (100 * math.expm1(-row["gain"][key]) for key in ("mean", "high", "low"))
    return f"{row['perplexity']:.2f} ({mean:+.1f} %, {low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()

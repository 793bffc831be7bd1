"""Memorizing Transformers: perplexity on documents by memory size, a short fine-tune, no training at all; step time.

    python -m benchmarks.memorizing DATA --runs FOLDER [--parts train,curve,reference,speed] [--corpora isabelle,code,novels]

DATA holds `<corpus>.{train,valid,test}.jsonl.xz`. A directory of `code` is one document: its files in the order of their
paths. train: for each corpus a small Llama without memory, one with, and the first with memory for its last fifth of steps.
curve: their perplexity on `test` by memory size, 0 to 32k tokens. reference: the reference model, never trained with memory;
the layer is chosen on `valid`. speed: a training step of the reference model. Finished pieces are kept in FOLDER; run again
to go on. Results: benchmarks/results/memorizing.{json,md}.
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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

import memlm
from memlm.evaluation._bootstrap import paired_bootstrap
from memlm.layers import AttentionMemories, forget, memorize
from memlm.training import ModelShape, document_streams
from memlm.training._scratch import train_tokenizer

RESULTS = Path(__file__).parent / "results"
CORPORA = ("isabelle", "code", "novels")
VOCABULARY, WIDTH, LAYERS, LENGTH = 2048, 128, 2, 128
ROWS, STEPS, RATE, FALLING = 16, 900, 3e-3, 0.2
TRAINED, TOP_K = 2048, 32
SIZES = (0, 512, 2048, 8192, 32768)
LONGEST, TEST, TEST_ROWS = 36_000, 100_000, 4  # tokens of a test document, of all, and documents read at once
REFERENCE_SIZES = (0, 512, 2048, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--parts", default="train,curve,reference,speed")
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--test", type=int, default=TEST)
    options = parser.parse_args()
    path = RESULTS / "memorizing.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in options.parts.split(","):
        if part == "speed":
            results["speed"] = speed()
        for corpus in options.corpora.split(",") if part != "speed" else ():
            if part == "train":
                train_all(options, corpus)
                continue
            results.setdefault(part, {})[corpus] = {"curve": curve, "reference": reference}[part](options, corpus)
        if part != "train":
            path.write_text(json.dumps(results, indent=1) + "\n")
            (RESULTS / "memorizing.md").write_text(table(results))


class SmallLM(nn.Module):
    """A Llama of two layers; its embedding sees the token before, so that the upper layer can look up what came next."""

    def __init__(self) -> None:
        super().__init__()
        config = SmolLM3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=344,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            no_rope_layers=[1, 0],
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.lm = SmolLM3ForCausalLM(config)
        self.before = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.before.weight, std=config.initializer_range)

    def forward(self, ids: Tensor, known: Tensor, last: Tensor) -> Tensor:
        """Return logits of ids, shape (rows, length); `last`, shape (rows, 1), are the tokens before them."""
        states = self.lm.get_input_embeddings()(ids) + self.before(torch.cat([last, ids[:, :-1]], dim=1))
        return self.lm(inputs_embeds=states, attention_mask=known, use_cache=False).logits


def texts_of(data: Path, corpus: str, split: str) -> list[str]:
    documents = list(memlm.Corpus(data / f"{corpus}.{split}.jsonl.xz"))
    if corpus != "code":
        return [document.text for document in documents]
    folders = defaultdict(list)
    for document in sorted(documents, key=lambda item: item.id):
        folders[Path(document.id).parent].append(document.text)
    return ["\n".join(texts) for texts in folders.values()]


def token_ids(options: argparse.Namespace, corpus: str, split: str) -> list[np.ndarray]:
    folder = options.runs / corpus
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.npz"
    if not path.exists():
        shape = ModelShape(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=344,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
        train_tokenizer(shape, [str(options.data / f"{corpus}.train.jsonl.xz")], folder / "tokenizer")
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", model_max_length=10**9)
        found = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts_of(options.data, corpus, split)]
        np.savez(path, *found)
    with np.load(path) as file:
        return [file[name].astype(np.int64) for name in file.files]


def train_all(options: argparse.Namespace, corpus: str) -> None:
    """Train what is not there yet. `tuned` is `none`, whose last steps, of falling rate, are made with memory."""
    folder = options.runs / corpus
    documents = token_ids(options, corpus, "train")
    middle = folder / "middle.pt"
    turn = round(options.steps * (1 - FALLING))
    if not middle.exists():
        train(folder, documents, "none", 0, None, 0, turn, options.steps, middle)
    for arm, size, start in (("none", 0, middle), ("tuned", TRAINED, middle)):
        if not (folder / f"{arm}.pt").exists():
            train(folder, documents, arm, size, start, turn, options.steps, options.steps, folder / f"{arm}.pt")
    if not (folder / "memory.pt").exists():
        train(folder, documents, "memory", TRAINED, None, 0, options.steps, options.steps, folder / "memory.pt")


def train(
    folder: Path,
    documents: list[np.ndarray],
    arm: str,
    size: int,
    start: Path | None,
    first: int,
    stop: int,
    steps: int,
    result: Path,
) -> None:
    torch.manual_seed(0)
    model = SmallLM()
    memory = memorize(model.lm, [-1], size=size, top_k=TOP_K, normalize="l2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    if start is not None:
        state = torch.load(start, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    orders = (np.random.default_rng(epoch).permutation(len(documents)) for epoch in itertools.count())
    endless = (documents[number] for order in orders for number in order)
    batches = itertools.islice(document_streams(endless, ROWS, LENGTH), first, stop)
    last, started, losses = torch.zeros(ROWS, 1, dtype=torch.int64), time.perf_counter(), []
    for step, batch in enumerate(batches, start=first):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, (1 - step / steps) / FALLING)
        memory.reset(batch.begins)
        last = last.masked_fill(batch.begins[:, None], 0)
        logits = model(batch.input_ids, batch.known, last)
        loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = batch.input_ids[:, -1:]
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            print(
                corpus_of(folder),
                arm,
                step + 1,
                f"{np.mean(losses[-100:]):.3f}",
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, result)


def corpus_of(folder: Path) -> str:
    return folder.name


def chosen(documents: list[np.ndarray], most: int) -> list[np.ndarray]:
    """The longest documents, cut off, of so many tokens together."""
    taken: list[np.ndarray] = []
    for ids in sorted(documents, key=len, reverse=True):
        room = most - sum(len(item) - 1 for item in taken)
        if room < LENGTH:
            break
        taken.append(ids[: min(LONGEST, room) + 1])
    return taken


@torch.no_grad()
def nats(
    model: Any, documents: list[np.ndarray], rows: int, memory: AttentionMemories | None, rolled: bool = False
) -> list[np.ndarray]:
    """Nats of every target, document by document."""
    reading, found = [-1] * rows, [[] for _ in documents]
    numbers = itertools.count()
    length = LENGTH if isinstance(model, SmallLM) else 512
    last = torch.zeros(rows, 1, dtype=torch.int64)
    with ExitStack() as stack:
        if memory is not None:
            memory.reset()
        if rolled and memory is not None:
            stack.enter_context(memory.reading_from([*range(1, rows), 0]))
        for batch in document_streams(documents, rows, length):
            if memory is not None:
                memory.reset(batch.begins)
            last = last.masked_fill(batch.begins[:, None], 0)
            if isinstance(model, SmallLM):
                logits = model(batch.input_ids, batch.known, last)
            else:
                logits = model(batch.input_ids, attention_mask=batch.known, use_cache=False).logits
            last = batch.input_ids[:, -1:]
            values = cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none", ignore_index=-100)
            for row in range(rows):
                if batch.begins[row]:
                    reading[row] = next(numbers)
                if batch.known[row].any():
                    found[reading[row]].append(values[row, batch.known[row].bool()].double().numpy())
    return [np.concatenate(parts) for parts in found]


def curve(options: argparse.Namespace, corpus: str) -> dict[str, Any]:
    """Every arm by memory size, with a control in which rows read each other's memory."""
    torch.manual_seed(0)
    documents = chosen(token_ids(options, corpus, "test"), options.test)
    number = np.repeat(np.arange(len(documents)), [len(ids) - 1 for ids in documents])
    rows: dict[str, Any] = {}
    baseline = None
    for arm in ("none", "tuned", "memory"):
        model = SmallLM().eval()
        state = torch.load(options.runs / corpus / f"{arm}.pt", weights_only=True)["model"]
        for size in (*SIZES, -SIZES[-1]):
            memory = memorize(model.lm, [-1], size=abs(size), top_k=TOP_K, normalize="l2")
            model.load_state_dict(state)
            started = time.perf_counter()
            values = np.concatenate(nats(model, documents, TEST_ROWS, memory, rolled=size < 0))
            forget(model.lm)
            baseline = values if baseline is None else baseline
            change = paired_bootstrap(baseline - values, number)
            name = f"{arm}, {size}" if size >= 0 else f"{arm}, {-size}, of other rows"
            rows[name] = {"perplexity": math.exp(values.mean()), "over none": change.to_dict()}
            print(corpus, name, f"{math.exp(values.mean()):.3f}", f"{time.perf_counter() - started:.0f} s", flush=True)
    return {
        "rows": rows,
        "documents": len(documents),
        "tokens": len(number),
        "longest": max(len(ids) - 1 for ids in documents),
        "trained tokens": options.steps * ROWS * LENGTH,
        "unit": change.unit,
    }


def reference(options: argparse.Namespace, corpus: str) -> dict[str, Any]:
    """The reference model with a joint softmax that nobody trained."""
    lm = memlm.reference_lm()
    model, tokenizer = lm.model.float().eval(), lm.tokenizer
    tokenizer.model_max_length = 10**9

    def read(split: str, tokens: int) -> list[np.ndarray]:
        texts = sorted(texts_of(options.data, corpus, split), key=len, reverse=True)[:2]
        return [np.array(tokenizer(text[: 8 * tokens])["input_ids"][: tokens + 1], np.int64) for text in texts]

    valid, test = read("valid", 4096), read("test", 16384)
    tried = {}
    for layer, positions in itertools.product(range(6), ("none", "first")):
        memory = memorize(model, [layer], size=4096, top_k=TOP_K, positions=positions)
        tried[f"layer {layer}, positions {positions}"] = float(np.concatenate(nats(model, valid, 2, memory)).mean())
        forget(model)
    best = min(tried, key=tried.__getitem__)
    layer, positions = int(best.split(",")[0].removeprefix("layer ")), best.rsplit(" ", 1)[1]
    print(corpus, best, {name: round(value, 4) for name, value in tried.items()}, flush=True)
    rows = {}
    for size in REFERENCE_SIZES:
        memory = memorize(model, [layer], size=size, top_k=TOP_K, positions=positions)
        values = np.concatenate(nats(model, test, 2, memory))
        if size == REFERENCE_SIZES[-1]:
            wrong = np.concatenate(nats(model, test, 2, memory, rolled=True))
            rows[f"{size}, of other rows"] = math.exp(wrong.mean())
        forget(model)
        rows[str(size)] = math.exp(values.mean())
        print(corpus, "reference", size, f"{math.exp(values.mean()):.3f}", flush=True)
    return {"rows": rows, "chosen": best, "valid": tried, "tokens": len(values), "documents": len(test)}


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
        f"A Llama of {LAYERS} layers and width {WIDTH} for each corpus, with memory in the upper layer (joint softmax, top_k",
        f"{TOP_K}, queries and keys of length 1), over a byte-level BPE vocabulary of {VOCABULARY:,} made of the corpus; its embedding sees",
        "the token before. Perplexity a token of that vocabulary, on `test`: the longest documents, read in segments of",
        f"{LENGTH} tokens, with memory emptied where a document begins. *none* was trained without memory; with memory at hand, that is a",
        f"joint softmax without any training. *tuned* is the same model, with a memory of {TRAINED:,} tokens for the last fifth of",
        f"its steps. *memory* had {TRAINED:,} tokens from its first step. Steps and text are the same for all, one seed. A directory of",
        "`code` is one document. In brackets the change to *none* with memory 0, with a paired bootstrap 95 % interval.",
        "",
    ]
    for corpus, result in results.get("curve", {}).items():
        lines += [
            f"## {corpus}",
            "",
            f"{result['trained tokens']:,} training tokens; {result['tokens']:,} test tokens of {result['documents']} documents, the "
            f"longest {result['longest']:,}; intervals over {result['unit']}.",
            "",
            "| memory | none | tuned | memory |",
            "|---|---|---|---|",
        ]
        for size in (*(str(size) for size in SIZES), f"{SIZES[-1]}, of other rows"):
            cells = []
            for arm in ("none", "tuned", "memory"):
                row = result["rows"][f"{arm}, {size}"]
                mean, low, high = (100 * (math.exp(-row["over none"][key]) - 1) for key in ("mean", "high", "low"))
                cells.append(f"{row['perplexity']:.2f} ({mean:+.1f} %, {low:+.1f} to {high:+.1f})")
            lines.append(f"| {size} | " + " | ".join(cells) + " |")
        gains = {
            arm: -result["rows"][f"{arm}, {SIZES[-1]}"]["over none"]["mean"] for arm in ("none", "tuned", "memory")
        }
        lines += ["", gain_line(gains), ""]
    if "reference" in results:
        lines += [
            "## The reference model, never trained with memory",
            "",
            "Joint softmax in one layer, which is chosen with the positions of keys on 8k tokens of `valid`; perplexity a token on",
            "`test`, two documents, segments of 512 tokens. It was trained on English prose: isabelle and code are strange to it.",
            "",
            "| corpus | chosen | "
            + " | ".join(str(size) for size in REFERENCE_SIZES)
            + f" | {REFERENCE_SIZES[-1]}, of other rows |",
            "|---" * (len(REFERENCE_SIZES) + 3) + "|",
        ]
        for corpus, result in results["reference"].items():
            cells = [
                f"{value:.2f}"
                for _, value in sorted(
                    result["rows"].items(), key=lambda item: (not item[0].isdigit(), int(item[0].split(",")[0]))
                )
            ]
            lines.append(f"| {corpus} | {result['chosen']} | " + " | ".join(cells) + " |")
        lines.append("")
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


def gain_line(gains: dict[str, float]) -> str:
    whole = gains["memory"]
    if whole >= 0:
        return "The model that was trained with memory does not gain."
    parts = {arm: 100 * gains[arm] / whole for arm in ("none", "tuned")}
    return f"Of what training with memory gains, in nats, at 32k tokens: {parts['tuned']:.0f} % by the fine-tune, {parts['none']:.0f} % untrained."


if __name__ == "__main__":
    main()

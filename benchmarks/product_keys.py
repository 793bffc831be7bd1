"""A small model with a memory of product keys against one without, at equal training FLOPs and tokens.

    python -m benchmarks.product_keys DATA --runs FOLDER [--arms dense,product-keys] [--seeds 0,1,2] [--part train|tune|table]

DATA holds `<corpus>.{train,valid,test}.jsonl.xz` of WikiText-2 and novels. Every (arm, seed) is trained and measured once
and kept in FOLDER; the same command goes on where it was stopped, and `--part table` writes benchmarks/results/product_keys.*.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memlm.documents import Corpus
from memlm.files import write_json
from memlm.layers import (
    ProductKeySettings,
    add_product_keys,
    count_slot_usage,
    product_key_memories,
    product_key_optimizers,
)
from memlm.recipes._claims import t_interval
from memlm.training import train_tokenizer

RESULTS = Path(__file__).parent / "results"
CORPORA = ("wikitext2", "novels")
DOCUMENTS = {"wikitext2": 10_000, "novels": 40}  # of train, at most
VOCABULARY, WIDTH, FEED_FORWARD, LAYERS, LENGTH = 2048, 128, 384, 3, 128
ROWS, FACT_ROWS = 16, 4  # rows a step; of these, rows of facts; half of the rest is WikiText-2
FACTS, WORDS = 512, 192  # facts; words that they are made of
HELD_OUT = 160_000  # tokens of valid and of test


@dataclass(frozen=True)
class Arm:
    """What stands in the layers: product keys at `layer`, beside a feed-forward that is narrower by as many FLOPs."""

    memory: ProductKeySettings | None = None
    layer: int = 2
    value_rate: float = 1e-2
    steps: int = 600
    rate: float = 3e-3


MEMORY = ProductKeySettings(
    sub_keys=128, heads=4, k=8, key_width=64, query_normalization="batch", value_gradient="dense"
)
ARMS = {"dense": Arm(), "product-keys": Arm(MEMORY)}
ONE_SLOT = ProductKeySettings(sub_keys=1, k=1, key_width=64, query_normalization="batch", value_gradient="dense")
TUNING = {
    "dense": Arm(),
    "dense, half the learning rate": Arm(rate=1.5e-3),
    "control: a memory of one slot": Arm(ONE_SLOT),
    "product-keys": Arm(MEMORY),
    "product-keys in the layer before": Arm(MEMORY, layer=1),
}
TUNING_SEED = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--part", choices=("train", "tune", "table"), default="train")
    options = parser.parse_args()
    if options.part == "table":
        write_table(options.runs)
        return
    text = prepare(options.data, options.runs)
    if options.part == "tune":
        for name, arm in TUNING.items():
            place = options.runs / "tuned" / f"{name}.json"
            if not place.exists():
                place.parent.mkdir(exist_ok=True)
                write_json(place, run(arm, TUNING_SEED, text, "valid"))
        return
    for seed in map(int, options.seeds.split(",")):
        for name in options.arms.split(","):
            place = options.runs / "measured" / f"{name}-{seed}.json"
            if not place.exists():
                place.parent.mkdir(exist_ok=True)
                write_json(place, run(ARMS[name], seed, text, "test"))


def prepare(data: Path, runs: Path) -> dict[str, Tensor]:
    """Return token ids by corpus and split, and the words that facts are made of; kept in RUNS."""
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / "text.npz"
    if not path.exists():
        names = {
            (corpus, split): str(data / f"{corpus}.{split}.jsonl.xz")
            for corpus in CORPORA
            for split in ("train", "valid", "test")
        }
        tokenizer = train_tokenizer(VOCABULARY, LENGTH, [names["wikitext2", "train"]], runs / "tokenizer")
        arrays = {}
        for (corpus, split), name in names.items():
            documents = list(islice(Corpus([name]), DOCUMENTS[corpus]))
            ids = tokenizer([item.text for item in documents])["input_ids"]
            arrays[f"{corpus}.{split}"] = np.concatenate([np.array(row, dtype=np.uint16) for row in ids])
        counts = np.bincount(arrays["wikitext2.train"], minlength=VOCABULARY)
        pieces = tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))
        whole = [n for n, piece in enumerate(pieces) if piece[0] == "Ġ" and piece[1:].isalpha() and len(piece) > 4]
        arrays["words"] = np.array(sorted(whole, key=lambda n: -counts[n])[:WORDS])
        arrays["frame"] = np.array(tokenizer(" the of is .", add_special_tokens=False)["input_ids"])
        np.savez(path, **arrays)
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in arrays.files}


def fact_sentences(text: dict[str, Tensor], seed: int) -> Tensor:
    """Return " the A of B is C ." for FACTS different pairs (A, B), shape (FACTS, 7); C is a word at random."""
    generator = torch.Generator().manual_seed(1000 + seed)
    pairs = torch.randperm(WORDS**2, generator=generator)[:FACTS]
    answers = torch.randint(WORDS, (FACTS,), generator=generator)
    the, of, is_, stop = text["frame"].tolist()
    first, second, third = text["words"][pairs // WORDS], text["words"][pairs % WORDS], text["words"][answers]
    column = torch.ones(FACTS, dtype=torch.int64)
    return torch.stack([the * column, first, of * column, second, is_ * column, third, stop * column], dim=1)


def new_model(arm: Arm, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        mlp_bias=True,  # a table can always learn a bias: the model without one has to have it, too
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if arm.memory is not None:
        narrow = narrowed(MEMORY)
        mlp = model.model.layers[arm.layer].mlp
        for name, (wide, out) in {
            "gate_proj": (WIDTH, narrow),
            "up_proj": (WIDTH, narrow),
            "down_proj": (narrow, WIDTH),
        }.items():
            linear = torch.nn.Linear(wide, out)
            torch.nn.init.normal_(linear.weight, std=config.initializer_range)
            torch.nn.init.zeros_(linear.bias)
            setattr(mlp, name, linear)
        add_product_keys(model, [arm.layer], arm.memory)
    return model


def memory_multiplications(memory: ProductKeySettings) -> int:
    """Multiplications of a memory for a position: query, scores of the sub-keys, softmax-weighted values, gate."""
    query = WIDTH * memory.heads * memory.key_width
    scores = memory.heads * memory.sub_keys * memory.key_width
    values = memory.heads * memory.k * WIDTH
    return query + scores + values + (2 * WIDTH * WIDTH if memory.output == "gated" else 0)


def narrowed(memory: ProductKeySettings) -> int:
    """Width of the feed-forward layer that pays for the memory beside it."""
    return FEED_FORWARD - math.ceil(memory_multiplications(memory) / (3 * WIDTH))


def multiplications(arm: Arm) -> int:
    """Multiplications of the forward pass for a position in the middle of a segment; backward costs twice as many."""
    attention = 4 * WIDTH * WIDTH + WIDTH * LENGTH  # of half the positions, for scores and for values
    total = LAYERS * (attention + 3 * WIDTH * FEED_FORWARD) + WIDTH * VOCABULARY
    if arm.memory is not None:
        total += memory_multiplications(arm.memory) - 3 * WIDTH * (FEED_FORWARD - narrowed(MEMORY))
    return total


def run(arm: Arm, seed: int, text: dict[str, Tensor], split: str) -> dict[str, Any]:
    """Train a model and measure it on valid, and on `split`."""
    model, facts = new_model(arm, seed), fact_sentences(text, seed)
    rate = {"learning_rate": arm.rate, "betas": (0.9, 0.98)}
    if arm.memory is None:
        optimizers: list[Any] = [
            torch.optim.AdamW(model.parameters(), lr=arm.rate, betas=(0.9, 0.98), weight_decay=0.0)
        ]
    else:
        optimizers = product_key_optimizers(model, value_learning_rate=arm.value_rate, **rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizers[0], lambda step: min(1, (step + 1) / 40, 1.6 * (1 - step / arm.steps))
    )
    tables = {id(memory.values) for memory in product_key_memories(model).values()}
    rest = [item for item in model.parameters() if id(item) not in tables]
    generator = torch.Generator().manual_seed(seed)
    started, losses = time.perf_counter(), []
    for step in range(arm.steps):
        batch = next_batch(text, facts, generator)
        loss = loss_of(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            print(
                f"{step + 1}: {np.mean(losses[-50:]):.3f}, {(time.perf_counter() - started) / (step + 1):.2f} s/step",
                flush=True,
            )
    seconds = time.perf_counter() - started
    found = measure(model.eval(), text, facts, split)
    print(json.dumps(found), flush=True)
    shape = None if arm.memory is None else asdict(arm.memory)
    parameters = sum(item.numel() for item in model.parameters())
    counted = {"parameters": parameters, "flops_a_token": 6 * multiplications(arm), "training_seconds": seconds}
    return asdict(arm) | {"memory": shape, "seed": seed} | counted | found


def next_batch(text: dict[str, Tensor], facts: Tensor, generator: torch.Generator) -> Tensor:
    """Return one batch, shape (ROWS, LENGTH)."""
    rows = []
    for number in range(ROWS - FACT_ROWS):
        ids = text[f"{CORPORA[number % 2]}.train"]
        start = int(torch.randint(len(ids) - LENGTH, (1,), generator=generator))
        rows.append(ids[start : start + LENGTH])
    for _ in range(FACT_ROWS):
        order = torch.randperm(FACTS, generator=generator)[: LENGTH // facts.shape[1] + 1]
        rows.append(facts[order].flatten()[:LENGTH])
    return torch.stack(rows)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Return the nats of every target, shape (rows · (length − 1),)."""
    logits = model(batch[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def measure(model: Any, text: dict[str, Tensor], facts: Tensor, split: str) -> dict[str, Any]:
    """Return nats a token and a word of both corpora, recall of facts, and usage; with the table rolled as control."""
    found: dict[str, Any] = {}
    memories = product_key_memories(model)
    for name in dict.fromkeys(("valid", split)):
        for corpus in CORPORA:
            found[f"{corpus}.{name}"] = nats(model, text[f"{corpus}.{name}"])
    found |= recall(model, facts)
    for path, memory in memories.items():
        with count_slot_usage(model) as usages:
            nats(model, text["wikitext2.valid"])
        found |= {"usage": usages[path].share, "divergence": usages[path].divergence}
        values = memory.values.data
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
        memory.values.data = values[order]
        found |= {f"{name}, shuffled": value for name, value in recall(model, facts).items()}
        found["wikitext2.valid, shuffled"] = nats(model, text["wikitext2.valid"])
        memory.values.data = values
    return found


def nats(model: Any, ids: Tensor) -> float:
    """Return the mean of the first HELD_OUT tokens, in segments that see nothing of one another."""
    segments = ids[: min(len(ids), HELD_OUT) // LENGTH * LENGTH].view(-1, LENGTH)
    return float(torch.cat([loss_of(model, part) for part in segments.split(64)]).mean())


def recall(model: Any, facts: Tensor) -> dict[str, float]:
    """Return how many answers are the first choice in the whole vocabulary, and their mean nats; each fact alone."""
    logits = torch.cat([model(part[:, :5]).logits[:, -1].float() for part in facts.split(512)])
    answers = facts[:, 5]
    right = (logits.argmax(dim=1) == answers).float().mean()
    return {"facts": float(right), "fact nats": float(F.cross_entropy(logits, answers))}


def write_table(runs: Path) -> None:
    """Write the JSON of all runs and the table with intervals over seeds."""
    found = [
        json.loads(path.read_text()) | {"arm": path.stem.rpartition("-")[0]}
        for path in sorted((runs / "measured").iterdir())
    ]
    write_json(RESULTS / "product_keys.json", found)
    arms = {name: [run for run in found if run["arm"] == name] for name in ARMS}
    first = {name: rows[0] for name, rows in arms.items()}
    tokens = first["dense"]["steps"] * ROWS * (LENGTH - 1)
    seeds = len(arms["dense"])
    memory = MEMORY
    lines = [
        "# Product keys at equal training FLOPs and tokens",
        "",
        TEXT.format(
            tokens=tokens,
            facts=FACT_ROWS / ROWS,
            shown=first["dense"]["steps"] * FACT_ROWS * (LENGTH / 7) / FACTS,
            seeds=seeds,
            narrow=narrowed(memory),
            slots=memory.slots,
            heads=memory.heads,
            k=memory.k,
            **globals(),
        ).strip(),
        "",
        "| | " + " | ".join(arms) + " | change, 95 % interval over seeds |",
        "|---" + "|---:" * (len(arms) + 1) + "|",
    ]
    for title, name, show, change in ROWS_OF_TABLE:
        cells = []
        for rows in arms.values():
            values = [run[name] for run in rows if name in run]
            cells.append(show(float(np.mean(values))) if values else "")
        pairs = [(a[name], b[name]) for a, b in zip(*arms.values(), strict=True) if name in a and name in b]
        cells.append(interval([b - a for a, b in pairs], change) if change and pairs else "")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "Tuned on seed 100, with facts of its own, and the valid texts:", "", *tuning_table(runs)]
    (RESULTS / "product_keys.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def tuning_table(runs: Path) -> list[str]:
    lines = ["| | WikiText-2 valid | facts recalled | slots read | KL |", "|---|---:|---:|---:|---:|"]
    for name in TUNING:
        path = runs / "tuned" / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            usage = [share(found["usage"]), f"{found['divergence']:.2f}"] if "usage" in found else ["", ""]
            cells = [name, perplexity(found["wikitext2.valid"]), share(found["facts"]), *usage]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def interval(differences: list[float], show: Any) -> str:
    found = t_interval(np.array(differences))
    mean = show(float(np.mean(differences)))
    return mean if found is None else f"{mean} ({show(found.low)} to {show(found.high)})"


def percent(difference: float) -> str:
    return f"{100 * math.expm1(difference):+.1f} %"


def points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def perplexity(nats: float) -> str:
    return f"{math.exp(nats):.2f}"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def whole(value: float) -> str:
    return f"{value:,.0f}"


ROWS_OF_TABLE = (
    ("WikiText-2 test, perplexity a token", "wikitext2.test", perplexity, percent),
    ("WikiText-2 valid, perplexity a token", "wikitext2.valid", perplexity, percent),
    ("novels test, perplexity a token", "novels.test", perplexity, percent),
    ("facts recalled", "facts", share, points),
    ("nats of a fact's answer", "fact nats", "{:.3f}".format, "{:+.3f}".format),
    ("control: facts recalled, table shuffled", "facts, shuffled", share, None),
    ("control: WikiText-2 valid, table shuffled", "wikitext2.valid, shuffled", perplexity, None),
    ("slots read on WikiText-2 valid", "usage", share, None),
    ("KL of the slots' weights to even ones, nats", "divergence", "{:.2f}".format, None),
    ("training FLOPs a token", "flops_a_token", whole, None),
    ("parameters", "parameters", whole, None),
    ("seconds of training (2 cores, shared)", "training_seconds", whole, None),
)
TEXT = """
Two Llamas of {LAYERS} layers, {WIDTH} wide, {LENGTH} tokens of context, a tokenizer of {VOCABULARY:,} tokens, {seeds} seeds each, on the same
{tokens:,} tokens in the same order: half WikiText-2, half novels, and {facts:.0%} of the rows are facts, “ the A of B is C .” with
words at random, {FACTS} of them, each seen about {shown:.0f} times. One has product keys beside the feed-forward of its last
layer: {slots:,} slots, {heads} heads of {k}. That feed-forward is {narrow} instead of {FEED_FORWARD} wide, which pays for the memory.

    python -m benchmarks.product_keys DATA --runs FOLDER
    python -m benchmarks.product_keys DATA --runs FOLDER --part tune
    python -m benchmarks.product_keys DATA --runs FOLDER --part table

FLOPs are two for each multiplication of a matrix, of attention's scores and values, of queries with sub-keys and of
weights with the values read, three times for the backward pass. Not counted, on either side: norms, softmax, the search
for the largest scores, the optimizer. On this CPU these are what makes the memory slower. Perplexity is per token of this
tokenizer, in segments that see nothing of one another ({HELD_OUT:,} tokens of each text). A fact is recalled when
the right word is the first choice of the whole vocabulary. Shuffled: the trained table's rows in random order.
This is a small run of minutes on a CPU: a fraction of an epoch, far from convergence.
"""


if __name__ == "__main__":
    main()

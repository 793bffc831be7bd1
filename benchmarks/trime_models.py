"""Four models of the reference model's size, trained alike but for the memory that they see (TRIME).

    python -m benchmarks.trime_models DATA --runs FOLDER [--parts prepare,train] [--arms none,local,long,external,continued]

DATA holds `<corpus>.{train,valid}.jsonl.xz` of WikiText-2 and novels. Four models begin with the same weights and see both
corpora twice, in 1,536 updates of 16,384 tokens; `continued` goes on from the one without memory for 200 smaller updates.
`prepare` makes the first weights, token ids and the chain by BM25; `train` needs nothing but these, and a GPU, or hours.
benchmarks/trime.py measures the models.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

import memlm
from memlm.files import write_json
from memlm.training import Batches, MemorySettings, ModelShape, TrimeRecipe, TrimeSchedule, train_trime
from memlm.training._scratch import llama_config
from memlm.training._trime_data import train_segments, valid_segments

CORPORA = ("wikitext2", "novels")
LENGTH, ROWS = 512, 32  # tokens a segment, segments an update


@dataclass(frozen=True)
class Arm:
    """What one model sees, and for how long."""

    kinds: list[str]
    order: dict[str, Any]
    own_document: bool = True
    start: str = "start"
    steps: int = 1536
    rate: float = 2e-3


STREAMS = {"streams": 4, "consecutive": ROWS // 4}
ARMS = {
    "none": Arm([], STREAMS),
    "local": Arm(["local"], STREAMS),
    "long": Arm(["local", "long-term"], STREAMS),
    "external": Arm(["local", "external"], {"order": "bm25", "rows": ROWS}),
    # goes on from the model without memory, and sees no other segment of its own document: short enough for a CPU
    "continued": Arm(["local", "external"], {"order": "bm25", "rows": 16}, False, "none/model", 200, 5e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--parts", default="prepare,train")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    if "prepare" in options.parts:
        prepare(options.data, options.runs)
    if "train" in options.parts:
        for arm in options.arms.split(","):
            train(options.data, options.runs, arm, options.steps)


def recipe(data: Path, runs: Path, arm: str, steps: int | None = None) -> TrimeRecipe:
    settings = ARMS[arm]
    steps = steps or settings.steps
    return TrimeRecipe(
        train=[str(data / f"{corpus}.train.jsonl.xz") for corpus in CORPORA],
        valid=[str(data / f"{corpus}.valid.jsonl.xz") for corpus in CORPORA],
        from_=str(runs / settings.start),
        memory=MemorySettings(kinds=settings.kinds, own_document=settings.own_document),
        batches=Batches(length=LENGTH, **settings.order),
        schedule=TrimeSchedule(
            steps=steps,
            learning_rate=settings.rate,
            warmup_steps=min(100, steps // 10),
            evaluate_every=500,
            checkpoint_every=min(1000, max(1, steps // 4)),
            valid_tokens=100_000 if settings.start == "start" else 20_000,
        ),
    )


def prepare(data: Path, runs: Path) -> None:
    """Make what all arms begin with: RUNS/start, a model, and RUNS/shared, token ids and the chain."""
    tokenizer = memlm.reference_lm().tokenizer
    shape = ModelShape(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(shape, tokenizer))
    model.save_pretrained(runs / "start")
    tokenizer.save_pretrained(runs / "start")
    shared = runs / "shared"
    shared.mkdir(exist_ok=True)
    lm = memlm.load(str(runs / "start"))
    train_segments(recipe(data, runs, "external"), lm, shared, True)
    valid_segments(recipe(data, runs, "external"), lm, shared, True)


def train(data: Path, runs: Path, arm: str, steps: int | None) -> None:
    settings, output = recipe(data, runs, arm, steps), runs / arm
    if not output.exists():  # token ids are the same for all
        output.mkdir()
        for file in (runs / "shared").iterdir():
            if ARMS[arm].own_document or file.name == "train.safetensors":  # another chain, other validation
                shutil.copy(file, output)
        write_json(output / "recipe.json", settings.describe())
    started = time.perf_counter()
    summary = train_trime(settings, output)
    summary["seconds"] = time.perf_counter() - started
    summary["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    write_json(output / "summary.json", summary)
    print(arm, summary, flush=True)


if __name__ == "__main__":
    main()

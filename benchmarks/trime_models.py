"""Four models of the reference model's size, trained alike but for the memory that they see (TRIME).

    python -m benchmarks.trime_models DATA --runs FOLDER [--parts prepare,train] [--arms none,local,long,external]

DATA holds `<corpus>.{train,valid}.jsonl.xz` of WikiText-2 and novels. All models begin with the same weights and see both
corpora as often, in as many updates of 16,384 tokens. `prepare` makes the first weights, token ids and the chain by BM25;
`train` needs nothing but these, and a GPU, or hours. benchmarks/trime.py measures them.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

import memlm
from memlm.files import write_json
from memlm.training import Batches, MemorySettings, ModelShape, TrimeRecipe, TrimeSchedule, train_trime
from memlm.training._scratch import llama_config
from memlm.training._trime_data import train_segments, valid_segments

CORPORA = ("wikitext2", "novels")
LENGTH, ROWS = 512, 32  # tokens a segment, segments an update
EPOCHS, RATE = 4, 2e-3
ARMS = {"none": [], "local": ["local"], "long": ["local", "long-term"], "external": ["local", "external"]}


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
    order = {"order": "bm25", "rows": ROWS} if arm == "external" else {"streams": 4, "consecutive": ROWS // 4}
    return TrimeRecipe(
        train=[str(data / f"{corpus}.train.jsonl.xz") for corpus in CORPORA],
        valid=[str(data / f"{corpus}.valid.jsonl.xz") for corpus in CORPORA],
        from_=str(runs / "start"),
        memory=MemorySettings(kinds=ARMS[arm]),
        batches=Batches(length=LENGTH, **order),  # type: ignore[arg-type]
        schedule=TrimeSchedule(
            steps=steps,
            epochs=None if steps else EPOCHS,
            learning_rate=RATE,
            warmup_steps=100,
            evaluate_every=500,
            checkpoint_every=1000,
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

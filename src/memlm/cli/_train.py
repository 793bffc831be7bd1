"""`memlm train`: train a language model from a recipe, alone or with memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import _common as common

Recipe = Annotated[Path, typer.Argument(help="Recipe in TOML; see docs/training.md.", metavar="RECIPE")]
Output = Annotated[Path, typer.Argument(help="Folder of the run; an unfinished run continues.", metavar="OUTPUT")]

app = typer.Typer(no_args_is_help=True, help="Train a model from a recipe; stop at any time, run again to continue.")


@app.command("lm")
def train_lm(recipe: Recipe, output: Output, json: common.Json = False) -> None:
    """Train a small Llama model and its tokenizer, without memory, on the CPU."""
    from ..training import load_recipe, train_language_model

    common.quiet_libraries()
    summary = train_language_model(load_recipe(recipe), output)
    lines = [f"{output / 'model'}: {summary['parameters']:,} parameters, {summary['tokens']:,} tokens"]
    lines += [f"  {name}: {row['bits_per_byte']:.3f} bits a byte" for name, row in summary["valid"].items()]
    common.emit(summary, "\n".join(lines), json)


@app.command("trime")
def train_trime(recipe: Recipe, output: Output, device: common.Device = None, json: common.Json = False) -> None:
    """Train a model to use a memory (TRIME), from scratch or from any causal LM."""
    from .. import training

    common.quiet_libraries()
    summary = training.train_trime(training.load_trime_recipe(recipe), output, device=device)
    lines = [f"{output / 'model'}: {summary['parameters']:,} parameters, {summary['tokens']:,} tokens"]
    lines += _with_and_without(summary)
    common.emit(summary, "\n".join(lines), json)


@app.command("spalm")
def train_spalm(recipe: Recipe, output: Output, device: common.Device = None, json: common.Json = False) -> None:
    """Train a model and a gate between it and its neighbors' next tokens (SPALM), or the gate alone."""
    from .. import training

    common.quiet_libraries()
    summary = training.train_spalm(training.load_spalm_recipe(recipe), output, device=device)
    lines = [f"{output / 'model'}, its gate {output / 'spalm.json'}: {summary['tokens']:,} tokens"]
    lines += _with_and_without(summary)
    common.emit(summary, "\n".join(lines), json)


def _with_and_without(summary: dict[str, Any]) -> list[str]:
    return [
        f"  {name}: perplexity {row['perplexity']:.2f} with memory, {row['perplexity_without_memory']:.2f} without"
        for name, row in summary["valid"].items()
    ]

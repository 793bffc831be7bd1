"""`memlm train-lm`: train a small language model from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _common as common


def train_lm(
    recipe: Annotated[Path, typer.Argument(help="Recipe in TOML; see memlm/training/reference.toml.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an unfinished run continues.")],
    json: common.Json = False,
) -> None:
    """Train a small Llama model and its tokenizer; stop it at any time, and run it again to continue."""
    from ..training import load_recipe, train_language_model

    common.quiet_libraries()
    summary = train_language_model(load_recipe(recipe), output)
    lines = [f"{output / 'model'}: {summary['parameters']:,} parameters, {summary['tokens']:,} tokens"]
    lines += [f"  {name}: {row['bits_per_byte']:.3f} bits a byte" for name, row in summary["valid"].items()]
    common.emit(summary, "\n".join(lines), json)

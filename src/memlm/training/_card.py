"""The card and the loss curve of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ._recipe import Recipe
from ._spalm_recipe import SpalmRecipe
from ._trime_recipe import TrimeRecipe


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw training and validation loss against tokens seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens seen, millions", ylabel="loss, nats a token")
    axes.plot([row["tokens"] / 1e6 for row in rows], [row["loss"] for row in rows], color="0.7", lw=0.8, label="train")
    evaluated = [row for row in rows if "valid" in row]
    for name in evaluated[0]["valid"] if evaluated else []:
        axes.plot([row["tokens"] / 1e6 for row in evaluated], [row["valid"][name] for row in evaluated], label=name)
    axes.set_ylim(top=min(axes.get_ylim()[1], 7.5))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def write_card(path: Path, recipe: Recipe, summary: dict[str, Any]) -> None:
    """Write the model card in Markdown."""
    shape, schedule = recipe.model, recipe.schedule
    valid = "\n".join(
        f"| {name} | {row['nats_per_token']:.3f} | {row['bits_per_byte']:.3f} |"
        for name, row in summary["valid"].items()
    )
    path.write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
---
# memlm reference language model

A small Llama model that ships with memlm, so that a memory can be tried where no model hub can be reached.
It writes recognizable English and knows little: it is a subject for experiments, not an assistant.

| | |
|---|---|
| parameters | {summary["parameters"]:,} ({shape.num_hidden_layers} layers, width {shape.hidden_size}, \
feed-forward {shape.intermediate_size}, {shape.num_attention_heads} heads, tied embeddings) |
| tokenizer | byte-level BPE, {shape.vocab_size:,} tokens, single digits; `<|endoftext|>` begins and ends a document |
| context | trained on blocks of {schedule.block} tokens |
| data | {", ".join(Path(item).name for item in recipe.train)}: {summary["train_tokens"]:,} tokens |
| license of the data | {recipe.license} |
| training | {summary["steps"]:,} steps of {schedule.batch * schedule.block:,} tokens = {summary["tokens"]:,} tokens; \
Muon for the matrices, AdamW for the rest; seed {schedule.seed} |

Validation, on 64 blocks spread over each corpus:

| corpus | nats a token | bits a byte |
|---|---|---|
{valid}

![loss](losses.png)

Made by `memlm train lm`.
"""
    )


def write_trime_card(path: Path, recipe: TrimeRecipe, summary: dict[str, Any]) -> None:
    """Write the card of a model trained with memory, in Markdown."""
    kinds, batches = recipe.memory.kinds, recipe.batches
    start = "from scratch" if recipe.from_ is None else f"from {Path(recipe.from_).name}"
    seen = f"with {', '.join(kinds)} memory (TRIME, Zhong et al. 2022)" if kinds else "without memory"
    streams, rows = batches.layout
    path.write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
---
# A language model trained {seen}

| | |
|---|---|
| start | {start} |
| parameters | {summary["parameters"]:,} |
| batches | {batches.order}, {streams} × {rows} segments of {batches.length} tokens |
| training | {summary["steps"]:,} steps, {summary["tokens"]:,} tokens; AdamW, seed {recipe.schedule.seed} |
| data | {", ".join(Path(item).name for item in recipe.train)} |
| license of the data | {recipe.license} |

Perplexity a token on validation text; the memory of a token is what its batch shows.

{_with_and_without(summary)}

It loads with `from_pretrained`. Its memory comes from memlm: `memlm tune MODEL none valid/ --mixture trime`.

Made by `memlm train trime`.
"""
    )


def write_spalm_card(path: Path, recipe: SpalmRecipe, summary: dict[str, Any]) -> None:
    """Write the card of a model trained with its neighbors' next tokens, in Markdown."""
    memory, batches = recipe.memory, recipe.batches
    trained = "the model and its gate" if memory.trained == "all" else "the gate alone"
    path.write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
---
# A language model trained with its neighbors' next tokens (SPALM, Yogatama et al. 2021)

| | |
|---|---|
| start | {Path(recipe.from_).name} |
| parameters | {summary["parameters"]:,}; trained: {trained} |
| memory | {memory.k} neighbors a token, {memory.gates} gate |
| batches | {batches.streams} segments of {batches.length} tokens behind {batches.carry} carried ones |
| training | {summary["steps"]:,} steps, {summary["tokens"]:,} tokens; AdamW, seed {recipe.schedule.seed} |
| data | {", ".join(Path(item).name for item in recipe.train)} |
| license of the data | {recipe.license} |

Perplexity a token on validation text, with the neighbors that the model at the start has found.

{_with_and_without(summary)}

It loads with `from_pretrained`. Its gate is `spalm.json`, a mixture of memlm: `memlm build MODEL train/ --output
memory/`, then `memlm eval MODEL memory/ test/ --mixture spalm.json`.

Made by `memlm train spalm`.
"""
    )


def _with_and_without(summary: dict[str, Any]) -> str:
    """Return the perplexities on validation text as a table."""
    lines = ["| text | with memory | without |", "|---|---|---|"]
    for name, row in summary["valid"].items():
        lines.append(f"| {name} | {row['perplexity']:.2f} | {row['perplexity_without_memory']:.2f} |")
    return "\n".join(lines)

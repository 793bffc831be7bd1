"""`memlm recipes`: training experiments with negative controls, and whether their claims hold here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from . import _common as common

app = typer.Typer(no_args_is_help=True, help="Training experiments with negative controls: list them, run one.")


@app.command("list")
def list_recipes(json: common.Json = False) -> None:
    """List the experiments, what each claims, and its sizes."""
    from ..recipes import experiments

    found = experiments()
    lines = []
    for item in found:
        lines += [f"{item.name}: {item.summary}", *(f"  - {claim.text}" for claim in item.claims)]
        lines += [f"  sizes: {', '.join(item.sizes)}; arms: {', '.join(item.arms)}"]
    values = [
        {
            "name": item.name,
            "summary": item.summary,
            "claims": [claim.text for claim in item.claims],
            "arms": dict(item.arms),
            "sizes": list(item.sizes),
        }
        for item in found
    ]
    common.emit({"recipes": values}, "\n".join(lines), json)


@app.command("run")
def run(
    name: Annotated[str, typer.Argument(help="Name of the recipe, as in `memlm recipes list`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run, runs/NAME by default; an unfinished run continues."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often every arm is trained.")] = 3,
    size: Annotated[str, typer.Option(help="full, or tiny, which takes seconds and shows nothing.")] = "full",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Arms trained at the same time; by default one a core, at most 4.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Train and measure every arm; exit with 1 where a claim does not hold. Stop it at any time and run it again."""
    from ..recipes import find_experiment, run_experiment

    experiment = find_experiment(name)
    common.quiet_libraries()
    outcome = run_experiment(
        experiment,
        Path("runs") / name if output is None else output,
        size=size,
        seeds=seeds,
        processes=min(4, _cores()) if processes is None else processes,
        say=common.note,
    )
    common.emit(outcome.to_dict(), str(outcome), json)
    if not outcome.holds:
        raise typer.Exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

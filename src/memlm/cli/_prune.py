"""`memlm prune`: entries that are alike become one that counts for all of them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from . import _common as common


def prune(
    datastore: common.Memory,
    neighbors: Annotated[
        int,
        typer.Option(help="Nearest entries among which each looks for some to take in; 0 merges equal keys alone."),
    ] = 8,
    distance: Annotated[
        float | None, typer.Option(help="Largest squared distance of what is taken in; any by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which entries are visited.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell how many entries would be merged.")] = False,
    index: Annotated[
        str | None, typer.Option(help="auto, exact, or a FAISS factory string; by default the kind that is there.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Merge entries of a document with the same next token and near keys.

    Where there are any, what was deleted leaves the disk, too, as by `memlm compact`; otherwise nothing is written.
    """
    from ..datastore import Datastore

    memory = Datastore(datastore)
    before, entries = common.size(datastore), len(memory)
    settings = {"distance": distance, "seed": seed, "dry_run": dry_run, "index": index, "show_progress": True}
    merged = memory.prune(neighbors, **settings)
    after = common.size(datastore)
    done = f"{merged:,} of {common.count(entries, 'entry', 'entries')}"
    done += " would be merged into others" if dry_run else " merged into others"
    if not dry_run:
        done += f", {decimal(before)} → {decimal(after)}" if merged else ", so nothing was written"
    common.emit(
        {"merged": merged, "dry_run": dry_run, "bytes_before": before, "bytes": after, **common.state(memory)},
        f"{datastore}: {done}; {common.described_state(memory)}",
        json,
    )

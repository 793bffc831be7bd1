"""`memlm merge`: the documents of another datastore, with their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _common as common


def merge(
    datastore: common.Memory,
    other: Annotated[Path, typer.Argument(help="Folder of the datastore to read from.", metavar="OTHER")],
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of documents with the same ids.")] = False,
    json: common.Json = False,
) -> None:
    """Copy the documents of another datastore of the same model into this one; no model is needed."""
    from ..datastore import Datastore

    memory = Datastore(datastore)
    added, replaced = memory.merge(other, replace=replace, show_progress=True)
    common.emit(
        {"added": added, "replaced": replaced, **common.state(memory)},
        f"{datastore}: {common.count(added, 'document')} of {other} added, {replaced:,} in the place of others; "
        f"{common.described_state(memory)}",
        json,
    )

"""`memlm compact`: what was deleted leaves the disk, and one index covers everything."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from . import _common as common


def compact(
    datastore: common.Memory,
    index: Annotated[
        str | None, typer.Option(help="auto, exact, or a FAISS factory string; by default the kind that is there.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Take deleted documents and earlier versions off the disk, join small segments, index all entries."""
    from ..datastore import Datastore

    memory = Datastore(datastore, verify=False)  # it is checked while it is held for writing
    before = common.size(datastore)
    memory.compact(index=index, show_progress=True)
    after = common.size(datastore)
    search = common.describe_search(memory.index.details)
    common.emit(
        {"bytes_before": before, "bytes": after, **common.state(memory)},
        f"{datastore}: {decimal(before)} → {decimal(after)}, search: {search}; {common.described_state(memory)}",
        json,
    )

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
    from ..datastore import compact as compact_

    before = common.size(datastore)
    compact_(datastore, index=index, show_progress=True)  # without opening an index that may be damaged
    memory = Datastore(datastore, verify=False)
    after = common.size(datastore)
    search = common.describe_search(memory.index.details)
    common.emit(
        {"bytes_before": before, "bytes": after, **common.state(memory)},
        f"{datastore}: {decimal(before)} → {decimal(after)}, search: {search}; {common.described_state(memory)}",
        json,
    )

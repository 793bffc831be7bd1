"""`memlm compress`: keys as fewer and shorter numbers."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.filesize import decimal

from . import _common as common


def compress(
    datastore: common.Memory,
    width: Annotated[
        int | None, typer.Option(help="Numbers to keep of a key; by default half of those that it has.")
    ] = None,
    keys: Annotated[str, typer.Option(help="int8, or float16 to keep fewer numbers and round none.")] = "int8",
    index: Annotated[str, typer.Option(help="auto, exact, or a FAISS factory string.")] = "auto",
    json: common.Json = False,
) -> None:
    """Store keys as their principal components, in 8 bits each; what was deleted leaves the disk, too."""
    from ..datastore import Datastore

    memory = Datastore(datastore, verify=False)  # it is checked while it is held for writing
    before = common.size(datastore)
    memory.compress(max(1, memory.width // 2) if width is None else width, keys, index=index, show_progress=True)
    after, stored = common.size(datastore), memory.manifest.keys
    search = common.describe_search(memory.index.details)
    common.emit(
        {"bytes_before": before, "bytes": after, "keys": stored, **common.state(memory)},
        f"{datastore}: keys of {stored['width']} × {stored['dtype']}, {decimal(before)} → {decimal(after)}, "
        f"search: {search}; {common.described_state(memory)}",
        json,
    )

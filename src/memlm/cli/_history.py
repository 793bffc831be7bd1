"""`memlm history` and `memlm rollback`: the versions of a datastore."""

from __future__ import annotations

from typing import Annotated

import typer

from . import _common as common


def history(datastore: common.Memory, json: common.Json = False) -> None:
    """List the versions that are kept: since the last compaction, at most 64."""
    from ..datastore import Manifest

    versions = [item.summary() for item in Manifest.load(datastore).history(datastore)][::-1]
    lines = [
        f"{item['version']:>6}  {item['written'].replace('T', ' ')[:19]}  {item['documents']:>9,} documents  "
        f"{item['entries']:>12,} entries  {item['change']}"
        for item in versions
    ]
    common.emit({"path": str(datastore), "versions": versions}, "\n".join(lines), json)


def rollback(
    datastore: common.Memory,
    version: Annotated[int, typer.Argument(help="Version to go back to; see `memlm history`.")],
    json: common.Json = False,
) -> None:
    """Publish what an earlier version held as a new version; nothing is lost, so this can be taken back, too."""
    from ..datastore import Datastore, rollback_to

    rollback_to(datastore, version)  # without opening what is there: it may be damaged
    memory = Datastore(datastore, verify=False)
    common.emit(common.state(memory), f"{datastore}: as in version {version}; {common.described_state(memory)}", json)

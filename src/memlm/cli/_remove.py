"""`memlm remove`: documents leave a datastore."""

from __future__ import annotations

import json as json_
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from . import _common as common

_LISTED = 20


def remove(
    datastore: common.Memory,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of documents.", metavar="[ID]...")] = None,
    pattern: Annotated[str | None, typer.Option(help="Also ids like this one: *, ?, [a-z] as in a shell.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Also documents with this metadata, KEY=VALUE (JSON or text); all given must fit."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell which.")] = False,
    json: common.Json = False,
) -> None:
    """Delete documents in one commit: nothing returns them from then on. `memlm compact` takes them off the disk."""
    from ..datastore import Datastore

    if not (ids or pattern is not None or where):
        raise ConfigError("nothing says what to remove; give ids, --pattern or --where")
    conditions = dict(_condition(item) for item in where or [])
    memory = Datastore(datastore)
    names = memory.remove(ids or (), pattern=pattern, where=conditions, dry_run=dry_run)
    lines = [f"{datastore}: {common.count(len(names), 'document')} {'would be removed' if dry_run else 'removed'}"]
    lines += [f"  {name}" for name in names[:_LISTED]]
    if len(names) > _LISTED:
        lines.append(f"  and {len(names) - _LISTED:,} more")
    lines.append(common.described_state(memory))
    common.emit({"removed": names, "dry_run": dry_run, **common.state(memory)}, "\n".join(lines), json)


def _condition(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise ConfigError(f"--where is {text!r}; expected KEY=VALUE")
    try:
        return name, json_.loads(value)
    except (ValueError, RecursionError):
        return name, value

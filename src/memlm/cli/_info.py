"""`memlm info`: what a datastore holds."""

from __future__ import annotations

from typing import Any

from . import _common as common


def info(datastore: common.Memory, json: common.Json = False) -> None:
    """Show what a datastore holds, what it is bound to and how it is searched; checks every file."""
    from ..datastore import Datastore

    described = Datastore(datastore).info()
    common.emit(described, "\n".join(_lines(described)), json)


def _lines(values: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix + name:<28} {value:,}" if isinstance(value, int) else f"{prefix + name:<28} {value}")
    return lines

"""`memlm info`: what a datastore holds."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich.filesize import decimal

from . import _common as common


def info(datastore: common.Memory, json: common.Json = False) -> None:
    """Show what a datastore holds, what it is bound to and how it is searched; checks every file."""
    from ..datastore import Datastore

    described = Datastore(datastore).info()
    common.emit(described, _described(described), json)


def _described(info: dict[str, Any]) -> str:
    encoder, site, index, corpus = info["encoder"], info["encoder"]["key_site"], info["index"], info["corpus"]
    search = common.describe_search(index)
    if "nprobe" in index:
        search += f", visits {index['nprobe']:,} of {index['lists']:,} lists"
    left_out = f", {corpus['skipped']:,} documents without text or binary left out" if corpus["skipped"] else ""
    lines = {
        "entries": f"{info['entries']:,} of {common.count(info['documents'], 'document')}",
        **({"deleted": f"{info['deleted']:,} entries, on the disk until `memlm compact`"} if info["deleted"] else {}),
        **({"merged": f"{info['merged']:,} more, which these stand for"} if info["merged"] else {}),
        **({} if info["complete"] else {"unfinished": "the build was broken off; the same command goes on"}),
        "size": f"{decimal(info['bytes'])} in {common.count(info['segments'], 'segment')}",
        "made": f"{datetime.fromisoformat(info['created']):%Y-%m-%d %H:%M %Z}, version {info['version']}",
        "from": f"{corpus['source']}{left_out}",
        "model": f"{encoder['name']} ({encoder['architecture']}, {encoder['dtype']}), {encoder['sha256'][:12]}",
        "tokenizer": f"{info['tokenizer']['vocab_size']:,} tokens, {info['tokenizer']['sha256'][:12]}",
        "keys": f"{site['name']} ({site['path']}, {site['tensor']}), {_numbers(info)}",
        "windows": f"{info['windows']['stride']} tokens after {info['windows']['context']} of context",
        "metric": common.metric_name(info["metric"]),
        "search": search,
        "files": "all match their checksums",
    }
    return "\n".join([info["path"], *(f"  {name:<10} {value}" for name, value in lines.items())])


def _numbers(info: dict[str, Any]) -> str:
    """Say what a stored key is made of."""
    stored, made = (f"{keys['width']} × {keys['dtype']}" for keys in (info["keys"], info["encoder_keys"]))
    return stored if info["keys"] == info["encoder_keys"] else f"compressed from {made} to {stored}"

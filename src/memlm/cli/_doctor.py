"""`memlm doctor`: is everything in order, and does a datastore still fit its model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from . import _common as common

_SAMPLED_TOKENS = 2048  # recomputed at a document's beginning
# Relative differences above which keys are not the same: what 16-bit types and another batch shape leave is far below.
_MEDIAN_LIMIT, _LARGEST_LIMIT = 0.02, 0.5


def doctor(
    datastore: Annotated[Path | None, typer.Argument(help="A datastore to check.")] = None,
    model: Annotated[str | None, typer.Option(help="The model that made it: recompute a sample of its keys.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents whose keys are recomputed.")] = 3,
    json: common.Json = False,
) -> None:
    """Show versions and hardware; check a datastore's files, and recompute some of its keys with the model."""
    if model is not None and datastore is None:
        raise ConfigError("--model is compared with the keys of a datastore; name that, too")
    report: dict[str, Any] = {"versions": _versions(), "hardware": _hardware(), "problems": []}
    lines = [f"{name:<13} {value}" for part in ("versions", "hardware") for name, value in report[part].items()]
    if datastore is not None:
        from ..datastore import Datastore

        memory = Datastore(datastore)  # raises where a file is damaged
        report["datastore"] = {
            "path": str(datastore),
            "entries": len(memory),
            "metric": memory.metric,
            "files": "match their checksums",
        }
        lines.append(
            f"{'datastore':<13} {datastore}: {len(memory):,} entries, searched by "
            f"{common.metric_name(memory.metric)}; all files match their checksums"
        )
        if model is not None:
            report["keys"] = _recompute(memory, model, documents)
            recomputed, median, largest = report["keys"].values()
            lines.append(
                f"{'keys':<13} {recomputed:,} recomputed; relative difference to the stored ones: median {median:.1g}, "
                f"largest {largest:.1g}"
            )
            if median > _MEDIAN_LIMIT or largest > _LARGEST_LIMIT:
                report["problems"].append("recomputed keys differ from the stored ones: other weights, or other code")
    lines += [f"problem: {text}" for text in report["problems"]] or ["no problem found"]
    common.emit(report, "\n".join(lines), json)
    if report["problems"]:
        raise typer.Exit(1)


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    packages = ("torch", "transformers", "tokenizers", "faiss-cpu", "safetensors", "numpy", "datasets", "pyarrow")
    for name in ("memlm", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _hardware() -> dict[str, Any]:
    import os

    import torch

    found: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if hasattr(os, "sysconf"):
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def _recompute(memory: Any, model: str, count: int) -> dict[str, Any]:
    """Compute the keys of some documents again and compare them with the stored ones."""
    import numpy as np
    import torch

    from ..documents import Document

    lm = common.load_for(memory, model, memory.manifest.encoder["dtype"], None)
    differences = []
    chosen = set(np.linspace(0, memory.manifest.documents - 1, count).astype(int).tolist())
    for number, stored in enumerate(memory.documents()):
        if number not in chosen:
            continue
        first, stop = stored["entries"]
        kept = np.zeros(_SAMPLED_TOKENS, bool)
        positions = memory.positions(first, stop)
        kept[positions[positions < len(kept)]] = True
        entries = first + kept.cumsum() - 1  # of each position that was not merged into another
        ids = lm.tokenize(Document(id=stored["id"], text=stored["text"])).ids[:_SAMPLED_TOKENS]
        for rows, keys in lm.keys([ids]):
            stored_too = torch.from_numpy(kept)[rows]
            old = memory.keys.gather_keys(entries[rows[stored_too].numpy()])
            new = keys.float().cpu()[stored_too]
            if memory.keys.codec is not None:
                new = memory.keys.codec.decode(memory.keys.codec.encode(new))
            differences.append((old - new).norm(dim=1) / new.norm(dim=1).clamp_min(1e-12))
    difference = torch.cat(differences).nan_to_num(nan=torch.inf).clamp_max(1e9)  # JSON has no infinity
    return {
        "recomputed": len(difference),
        "median_relative_difference": float(difference.median()),
        "largest_relative_difference": float(difference.max()),
    }

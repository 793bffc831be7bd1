"""The files of a table of rows: its description, its rows, what was committed beside them, and its lock."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import ConfigError, DatastoreCorrupt, DatastoreError, FormatVersionError
from ..files import sync_directory, sync_file, write_atomically, write_json
from ..tensors import Layout, create_tensors

VERSION = 1
TYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}


class Committed(NamedTuple):
    """What was committed beside the rows.

    Attributes:
        number: Of the commit, from 0.
        tensors: Whatever the trainer wants back, such as the adapter's weights.
        note: Likewise, plain values.
    """

    number: int
    tensors: dict[str, Tensor]
    note: dict[str, Any]

    def to_bytes(self) -> bytes:
        """Return it as a safetensors file."""
        return save(self.tensors, {"number": str(self.number), "note": json.dumps(self.note)})


def create_rows(folder: Path, described: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Create the file of rows, all zero, and return its tensors as writable maps."""
    kind, rows = TYPES[described["dtype"]][0], described["rows"]
    layout: Layout = {
        "owners": ("I64", (rows,)),
        "keys": (kind, (rows, described["key_width"])),
        "values": (kind, (rows, described["value_width"])),
    }
    return create_tensors(folder / "rows.safetensors", layout)


def staging_of(folder: Path) -> Path:
    """Make a folder beside the one that is to be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already; name a new folder for the table")
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def put_in_place(staging: Path, folder: Path, described: Mapping[str, Any], committed: Committed) -> None:
    """Complete a table and give it its name, in one step."""
    write_atomically(staging / "commit.safetensors", committed.to_bytes())
    write_json(staging / "bank.json", {"format": "memlm-bank", "version": VERSION} | dict(described))
    for path in staging.iterdir():
        sync_file(path)
    sync_directory(staging)
    staging.replace(folder)
    sync_directory(folder.parent)


def description_of(folder: Path) -> dict[str, Any]:
    """Read bank.json."""
    path = folder / "bank.json"
    if not path.exists():
        raise ConfigError(f"{folder} holds no bank.json; expected a folder made by Bank.create or publish")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if described["format"] != "memlm-bank":
            raise ValueError(f"its format is {described['format']!r}")
        version = int(described["version"])
        if version > VERSION:
            raise FormatVersionError(
                f"{folder} has version {version} of the format, this memlm knows {VERSION}; update memlm"
            )
        sizes = [described[name] for name in ("rows", "key_width", "value_width")]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"its sizes are {sizes}")
        if described["dtype"] not in TYPES or not isinstance(described["note"], dict):
            raise ValueError("its dtype or its note is none")
        return {"moments": described["moments"], "sha256": described["sha256"]} | described
    except (ValueError, KeyError, TypeError) as error:
        raise DatastoreCorrupt(f"{path} is damaged ({error}); restore it from a copy") from error


def locked(folder: Path, writable: bool, published: bool) -> int:
    """Return an open file that holds the lock of the table: of one writer or of some readers."""
    descriptor = os.open(folder / "bank.json", os.O_RDONLY)
    try:
        if not published:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        state = "in use" if writable else "being changed"
        raise DatastoreError(f"{folder} is {state} elsewhere; close it there, or read a published copy") from error
    return descriptor


def read_commit(folder: Path) -> Committed:
    """Read what was committed last."""
    path = folder / "commit.safetensors"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Committed(int(metadata["number"]), tensors, json.loads(metadata["note"]))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DatastoreCorrupt(f"{path} is damaged ({error}); restore the folder from a copy") from error

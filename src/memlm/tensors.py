"""Tensors in safetensors files, as memory maps: written in place, read without copying."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import safetensors

from .errors import DatastoreCorrupt

# safetensors name → NumPy type of the map; bfloat16, which NumPy lacks, is mapped as int16
_TYPES: dict[str, Any] = {
    "F16": np.float16,
    "F32": np.float32,
    "BF16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "I64": np.int64,
}
Layout = dict[str, tuple[str, tuple[int, ...]]]
Mode = Literal["r+", "c"]


def create_tensors(path: Path, layout: Layout) -> dict[str, np.ndarray]:
    """Create a safetensors file and return its tensors as writable maps, all zero.

    The whole file is reserved first, so that a full disk is an error here and not a crash while the map is written.

    Args:
        path: Must not exist.
        layout: Name → (safetensors type, shape), in the order of the file.

    Raises:
        OSError: The file cannot be made, or the disk is full.
    """
    header: dict[str, object] = {}
    end = 0
    for name, (kind, shape) in layout.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(_TYPES[kind]).itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        _reserve(file, 8 + len(text) + end)
    return _maps(path, "r+")


def _reserve(file: BinaryIO, size: int) -> None:
    """Give a new file its size, with every block allocated."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    file.seek(0, os.SEEK_END)  # macOS
    while (missing := size - file.tell()) > 0:
        file.write(bytes(min(missing, 1 << 20)))


def open_tensors(path: Path, mode: Mode = "c") -> dict[str, np.ndarray]:
    """Map the tensors of a safetensors file.

    Args:
        path: The file.
        mode: "c" is copy on write: nothing reaches the file, and torch takes it without a warning; "r+" writes to it.

    Raises:
        DatastoreCorrupt: The file is missing or is not a sound safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # checks header, sizes and offsets
        return _maps(path, mode)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise DatastoreCorrupt(f"{path} cannot be read ({error}); restore it from a copy or build again") from error


def map_bytes(path: Path) -> np.ndarray:
    """Map a file as bytes, uint8, shape (size,); nothing written there reaches the file."""
    return np.memmap(path, np.uint8, "c") if path.stat().st_size else np.zeros(0, np.uint8)


def _maps(path: Path, mode: Mode) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    whole = np.memmap(path, np.uint8, mode)  # one map, and so one open file, for all tensors
    maps: dict[str, np.ndarray] = {}
    for name, item in header.items():
        start, end = (8 + length + offset for offset in item["data_offsets"])
        maps[name] = whole[start:end].view(_TYPES[item["dtype"]]).reshape(item["shape"])
    return maps

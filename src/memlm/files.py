"""Writing files so that a killed process leaves either the old content or the new, never half of it."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ConfigError


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # never through a link that somebody left under this name
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends without an error.

    On an error nothing is left of it. What a killed process left there is removed by the next one: a folder is locked
    while it is written, and a lock dies with its process.

    Raises:
        ConfigError: `path` exists.
        OSError: It cannot be made.
    """
    refuse_existing(path)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), _descriptor(left) as folder:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        with _descriptor(temporary) as folder:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
            os.fsync(folder)
            refuse_existing(path)
            temporary.rename(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _descriptor(folder: Path) -> Iterator[int]:
    """Open a folder for the block."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def refuse_existing(path: Path) -> None:
    """Raise ConfigError where there is anything at `path`."""
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already; name a new one, or remove it first")


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace the content of `path` in one step."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, in one step."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return what `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sync_directory(path: Path) -> None:
    """Make renames inside `path` survive a power failure."""
    with _descriptor(path) as descriptor:
        os.fsync(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file survive a power failure."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

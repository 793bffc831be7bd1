"""The standard library of the running Python as a corpus: source code that every installation has."""

from __future__ import annotations

import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..documents import Document
from ..errors import CorpusError
from ..files import write_atomically

# Tests, tables that are nearly the same, other people's packages, and what a Python may lack or has lost by now
_LEFT_OUT = {
    *("test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "ensurepip"),
    *("idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "msilib", "__phello__"),
}
_SMALLEST = 1_000  # characters of a file that are worth taking
_SHARES = ("test", "valid", *("train",) * 8)  # a file's side is decided by its own name, so that no other file moves it


def standard_library(sizes: Mapping[str, int], longest: Mapping[str, int]) -> dict[str, list[Document]]:
    """Return files for train, valid and test, the same ones for every Python as far as it has them.

    Args:
        sizes: Characters of each side.
        longest: Characters taken of one file, for each side.

    Raises:
        CorpusError: This Python has too few sources, as where its library lies in an archive or is compiled only.
    """
    root = Path(sysconfig.get_path("stdlib"))
    room = dict(sizes)
    splits: dict[str, list[Document]] = {name: [] for name in sizes}
    for path in sorted(_files(root), key=lambda path: (_number(path, root), path)):
        side = _SHARES[_number(path, root) % len(_SHARES)]
        size = min(longest[side], room[side])
        if size >= _SMALLEST:
            text = _beginning(path.read_text(encoding="utf-8", errors="replace"), size)
            if text.strip():
                splits[side].append(Document(id=path.relative_to(root).as_posix(), text=text))
                room[side] -= len(text)
    for side, left in room.items():
        if left > sizes[side] / 4:
            raise CorpusError(
                f"{root} has only {sizes[side] - left:,} of {sizes[side]:,} characters for {side}; expected the .py "
                "files of a full standard library, as python.org's and the distributions' packages have them: run "
                "memlm with another Python"
            )
    return splits


def write_texts(folder: Path, documents: Mapping[str, list[Document]]) -> None:
    """Write each side into `folder` as JSON lines that `Corpus` reads."""
    folder.mkdir(exist_ok=True)
    for name, items in documents.items():
        lines = (json.dumps({"id": item.id, "text": item.text}) + "\n" for item in items)
        write_atomically(folder / f"{name}.jsonl", "".join(lines))


def _files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT and not name.startswith("config-")]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        yield from (path for path in paths if path.stat().st_size >= _SMALLEST)


def _number(path: Path, root: Path) -> int:
    return zlib.crc32(path.relative_to(root).as_posix().encode())


def _beginning(text: str, size: int) -> str:
    """Return the first lines of a text that fit into a number of characters."""
    return text if len(text) <= size else text[: text.rfind("\n", 0, size) + 1]

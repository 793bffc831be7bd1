"""Documents: reading text from files, folders, JSON lines and Hugging Face datasets, one document at a time."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from .errors import CorpusError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its name.

    Attributes:
        id: Unique within a corpus; for a file in a folder its path, relative to it or as given with others.
        text: The whole text.
        metadata: Anything that JSON can hold.
    """

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Corpus:
    """An iterable of documents that counts what it had to leave out.

    Args:
        source: A file (.jsonl, optionally .gz, .xz or .zst; anything else is read as UTF-8 text), a folder of such
            files (hidden ones are left out), a `datasets.Dataset`, an iterable of `Document`, mappings with `text`
            and optionally `id`, or a list of any of these. A list of strings is a list of paths.

    Documents without text are left out and counted in `skipped`, and so are binary files inside a folder. A binary
    file that was named is an error, and so is a corpus without any text: `CorpusError` is raised while iterating.
    Iterating a second time reads again, unless `source` can be read only once. Half of a surrogate pair, which no
    tokenizer takes, becomes U+FFFD.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.skipped: dict[str, str] = {}

    def __iter__(self) -> Iterator[Document]:
        self.skipped = {}
        seen: set[str] = set()
        for document in _read(self.source, self.skipped):
            if not document.text.strip():
                self.skipped[document.id] = "no text"
                continue
            if not document.id:
                raise CorpusError("a document has the id ''; ids name documents: give it one, or leave the field out")
            if document.id in seen:
                raise CorpusError(f"two documents have the id {document.id!r}; ids must be unique: rename one of them")
            seen.add(document.id)
            yield replace(document, text=_without_surrogates(document.text))
        if not seen:
            left_out = f" ({len(self.skipped)} left out: no text or binary)" if self.skipped else ""
            raise CorpusError(f"no text was found in {describe(self.source)}{left_out}; expected at least one document")


def describe(source: Any) -> str:
    """Return a short name for a corpus source, for messages and the manifest."""
    if isinstance(source, (str, os.PathLike)):
        return _without_surrogates(os.fspath(source))
    if isinstance(source, Corpus):
        return describe(source.source)
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, Path)) for item in source):
        return ", ".join(describe(item) for item in source)
    return type(source).__name__


def _read(source: Any, skipped: dict[str, str]) -> Iterator[Document]:
    if isinstance(source, Corpus):
        yield from _read(source.source, skipped)
    elif isinstance(source, (str, Path)):
        yield from _read_path(Path(source), skipped)
    elif isinstance(source, Document):
        yield source
    elif isinstance(source, Mapping):
        raise CorpusError("a single mapping is not a corpus; pass a list of mappings, or one split of a dataset")
    elif isinstance(source, Iterable):
        several = isinstance(source, (list, tuple)) and len(source) > 1
        for number, item in enumerate(source):
            if isinstance(item, Mapping):
                yield _from_mapping(item, f"row {number}", str(number))
            elif several and isinstance(item, (str, Path)):
                yield from _read_path(Path(item), skipped, prefix=f"{Path(item).as_posix()}/")
            else:
                yield from _read(item, skipped)
    else:
        raise CorpusError(f"cannot read documents from a {type(source).__name__}; pass a path or an iterable")


def _without_surrogates(text: str) -> str:
    """Replace what UTF-8 cannot hold: half pairs, and bytes of file names that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_path(path: Path, skipped: dict[str, str], prefix: str = "") -> Iterator[Document]:
    """Read a file or a folder; `prefix` keeps files of the same name in several folders apart."""
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a whole text in the place of a path is too long a name
        raise CorpusError(f"{str(path)[:80]!r}… is no path ({error.strerror}); expected a file or a folder") from error
    if is_folder:
        for file in sorted(path.rglob("*")):
            relative = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in relative.parts):
                name = _without_surrogates(prefix + relative.as_posix())
                try:
                    yield from _read_file(file, name)
                except _BinaryFile as error:
                    skipped[name] = str(error)
    elif path.exists():
        try:
            yield from _read_file(path, _without_surrogates(path.name))
        except _BinaryFile as error:
            raise CorpusError(f"{path} is not text ({error}); expected UTF-8 text or JSON lines") from error
    else:
        raise CorpusError(f"{path} does not exist; expected a file or a folder of text")


class _BinaryFile(Exception):
    pass


def _read_file(path: Path, name: str) -> Iterator[Document]:
    if path.name.endswith(JSONL_SUFFIXES):
        yield from _read_jsonl(path, name)
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} could not be read: {error}") from error
    if b"\0" in data[:65536]:
        raise _BinaryFile("it holds NUL bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _BinaryFile(f"invalid UTF-8 at byte {error.start}") from error
    yield Document(id=name, text=text.replace("\r\n", "\n"))


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig")
    if path.suffix == ".zst":
        return io.TextIOWrapper(io.BufferedReader(_ZstdFile(path)), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


class _ZstdFile(io.RawIOBase):
    """A .zst file for reading. Unlike the package's own, it notices when the file ends before its last frame does."""

    def __init__(self, path: Path) -> None:
        self._chunks = _zstd_chunks(path)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    import zstandard

    frame = None
    with path.open("rb") as file:
        while data := file.read(1 << 16):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the file ends before its last frame does")


def _read_jsonl(path: Path, name: str) -> Iterator[Document]:
    number = 0
    try:
        with _open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise CorpusError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
                    yield _from_mapping(row, f"{path}, line {number}", f"{name}:{number}")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise CorpusError(f"{path} could not be read after line {number}: {error}") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise CorpusError(f"{path}, line {number}: not valid JSON ({reason}); expected one object a line") from error


def _from_mapping(row: Mapping[str, Any], where: str, default_id: str) -> Document:
    text = row.get("text")
    if text is None or not isinstance(text, str):
        raise CorpusError(f"{where}: expected a string under 'text', got {type(text).__name__}; rename the field")
    metadata = {key: value for key, value in row.items() if key not in ("id", "text")}
    name = row.get("id")
    return Document(id=default_id if name is None else str(name), text=text, metadata=metadata)

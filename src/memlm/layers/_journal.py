"""The journal of a table that is being changed: what its rows held before, so that a killed process is undone.

Before a row is changed for the first time since the last commit, its content is appended and synced. A record that is
cut off belongs to rows that were not changed yet. FORMAT: 8 bytes "memlmjnl" and the commit's number (uint64); then
records of a number of rows and of bytes (uint64 each), the CRC-32 of what follows (uint32), the row numbers (int64),
and the rows' content, column after column.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DatastoreCorrupt
from ..files import sync_directory

_MAGIC = b"memlmjnl"
_HEAD = struct.Struct("<8sQ")
_RECORD = struct.Struct("<QQI")


class Undo(NamedTuple):
    """What some rows held.

    Attributes:
        ids: Row numbers, int64, shape (n,).
        columns: Of each column, shape (n, …).
    """

    ids: np.ndarray
    columns: list[np.ndarray]


class Journal:
    """An undo journal on disk.

    Args:
        path: The file; made by the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0  # of what is sound

    def append(self, commit: int, undo: Undo) -> None:
        """Add a record; when this returns it is on disk, and its rows may be changed.

        Args:
            commit: Number of the last commit: the state that the record leads back to.
            undo: Row numbers and their content.
        """
        parts = [undo.ids.tobytes(), *(np.ascontiguousarray(column).tobytes() for column in undo.columns)]
        check = 0
        for part in parts:
            check = zlib.crc32(part, check)
        is_new = not self._end
        with self.path.open("wb" if is_new else "r+b") as file:
            if is_new:
                file.write(_HEAD.pack(_MAGIC, commit))
            else:
                file.seek(self._end)  # a record that failed half-way is written over
            file.write(_RECORD.pack(len(undo.ids), sum(map(len, parts)), check))
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()
        if is_new:
            sync_directory(self.path.parent)

    def clear(self) -> None:
        """Forget everything: the changes are committed or undone."""
        self.path.unlink(missing_ok=True)
        self._end = 0

    def undo(self, commit: int, columns: Sequence[np.ndarray]) -> bool:
        """Write what the records hold back into the columns; the file stays.

        Args:
            commit: Number of the last commit; the records of an earlier one are committed and left alone.
            columns: In the order of the records, each of shape (rows, …).

        Returns:
            Whether any row was written.

        Raises:
            DatastoreCorrupt: The journal is damaged, other than by its end being cut off.
        """
        if not self.path.exists():
            return False
        written = False
        for record in self._records(commit, columns):
            written = True
            for column, before in zip(columns, record.columns, strict=True):
                column[record.ids] = before
        return written

    def _records(self, commit: int, columns: Sequence[np.ndarray]) -> Iterator[Undo]:
        row_bytes = 8 + sum(column[:1].nbytes for column in columns)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return
            magic, number = _HEAD.unpack(head)
            if magic != _MAGIC or number > commit:
                raise self._damaged("its head is wrong")
            if number < commit:
                return
            while size - file.tell() >= _RECORD.size:
                place = file.tell()
                count, length, check = _RECORD.unpack(file.read(_RECORD.size))
                if length != count * row_bytes:
                    raise self._damaged(f"the record at byte {place} has another length")
                data = file.read(length)
                if len(data) < length:
                    return  # cut off
                if zlib.crc32(data) != check:
                    if file.tell() == size:
                        return  # blocks of the last record never reached the disk
                    raise self._damaged(f"the record at byte {place} has another checksum")
                undo = _split(data, count, columns)
                if count and not 0 <= undo.ids.min() <= undo.ids.max() < len(columns[0]):
                    raise self._damaged(f"the record at byte {place} names rows that there are not")
                yield undo

    def _damaged(self, what: str) -> DatastoreCorrupt:
        return DatastoreCorrupt(
            f"{self.path} is damaged ({what}): the table was being changed and cannot be led back to its last commit; "
            "restore the folder from a copy"
        )


def _split(data: bytes, count: int, columns: Sequence[np.ndarray]) -> Undo:
    ids = np.frombuffer(data, np.int64, count)
    place, contents = ids.nbytes, []
    for column in columns:
        shape = (count, *column.shape[1:])
        content = np.frombuffer(data, column.dtype, int(np.prod(shape)), place).reshape(shape)
        place += content.nbytes
        contents.append(content)
    return Undo(ids, contents)

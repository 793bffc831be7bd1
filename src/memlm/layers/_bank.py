"""External weights: a table of key and value rows on disk, of which a model reads and changes a few at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DatastoreCorrupt, DatastoreError, KeyOverflow, ShapeError
from ..files import file_sha256, write_atomically
from ..tensors import Layout, create_tensors, open_tensors
from ._bank_files import TYPES, Committed, create_rows, description_of, locked, put_in_place, read_commit, staging_of
from ._journal import Journal, Undo
from ._rows import Nearest

_SCORES = 1 << 24  # inner products that a search holds at once
_COPIED = 1 << 14  # rows that publishing copies at once


class Bank:
    """A table of rows in a folder: memory maps, so that only what is touched is read, whatever the table's size.

    A **work table** is changed in place. Changes are kept by `commit`, whose tensors and note are kept with them in one
    step; `rollback`, an error inside `with`, or a killed process lead back to the last commit. One process may change
    it, or several read it. A **published** table, made by `publish`, is immutable and checked by SHA-256.

    A row is free until it is written: its owner is 0. A row has a key and a value, and in a table with moments the
    optimizer's state of the value (`RowTraining`), in a file of its own.

    Attributes:
        folder: Where it lies.
        rows: Rows that there is room for.
        key_width: Numbers of a key; 0 where rows are addressed otherwise.
        value_width: Numbers of a value.
        dtype: Of keys and values: torch.float32 or torch.bfloat16.
        note: Plain values that were given when the table was created, such as what made the rows.
        writable: Whether it may be changed.
        published: Whether it never changes again.
        moments: Whether it keeps the optimizer's state of every row.
        committed: What was committed last beside the rows.
    """

    def __init__(self, folder: str | Path, *, writable: bool = False, verify: bool = True) -> None:
        """Open a table.

        Args:
            folder: Made by `create` or `publish`.
            writable: Open a work table for changes; undoes what a killed process had not committed.
            verify: Compare a published table's checksum, which reads all of it.

        Raises:
            ConfigError: There is no table, or it is published and to be changed.
            DatastoreCorrupt: Its files are damaged or cut off.
            DatastoreError: Another process is changing it.
            FormatVersionError: A newer memlm made it.
        """
        self.folder = Path(folder)
        described = description_of(self.folder)
        self.rows, self.key_width, self.value_width = (described[name] for name in ("rows", "key_width", "value_width"))
        self.dtype = TYPES[described["dtype"]][1]
        self.note: dict[str, Any] = described["note"]
        self.moments: bool = described["moments"]
        self.published = described["sha256"] is not None
        self.writable = writable
        if self.published and writable:
            raise ConfigError(f"{folder} is published and cannot be changed; create another table and write its rows")
        self._lock = locked(self.folder, writable, self.published)
        try:
            self._open(described, verify)
        except BaseException:
            os.close(self._lock)
            raise

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        rows: int,
        key_width: int,
        value_width: int,
        dtype: str = "float32",
        moments: bool = False,
        note: Mapping[str, Any] | None = None,
    ) -> Bank:
        """Make a table of free rows, all zero, and open it for changes.

        The disk space is reserved, so that a full disk is an error here.

        Args:
            folder: Must not exist, or be empty.
            rows: Rows that it has room for.
            key_width: Numbers of a key; 0 for a table that is addressed by row numbers alone.
            value_width: Numbers of a value.
            dtype: "float32" or "bfloat16".
            moments: Keep the optimizer's state of every row, too; float32, a value's width and two numbers a row.
            note: Plain values, as JSON.

        Raises:
            ConfigError: A number is too small, the type unknown, or the folder in use.
        """
        folder = Path(folder)
        for name, number, least in (("rows", rows, 1), ("key_width", key_width, 0), ("value_width", value_width, 1)):
            if number < least:
                raise ConfigError(f"{name} is {number}; expected a whole number of at least {least}")
        if dtype not in TYPES:
            raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(TYPES)}")
        described = {"rows": rows, "key_width": key_width, "value_width": value_width, "dtype": dtype}
        described |= {"moments": moments, "note": dict(note or {}), "sha256": None}
        staging = staging_of(folder)
        create_rows(staging, described)
        if moments:
            layout: Layout = {
                "moments": ("F32", (rows, value_width)),
                "squares": ("F32", (rows,)),
                "steps": ("F32", (rows,)),
            }
            create_tensors(staging / "moments.safetensors", layout)
        put_in_place(staging, folder, described, Committed(0, {}, {}))
        return cls(folder, writable=True)

    def _open(self, described: dict[str, Any], verify: bool) -> None:
        path = self.folder / "rows.safetensors"
        mode = "r+" if self.writable else "c"
        maps = open_tensors(path, mode)
        shapes = {"keys": (self.rows, self.key_width), "owners": (self.rows,), "values": (self.rows, self.value_width)}
        if {name: item.shape for name, item in maps.items()} != shapes:
            raise DatastoreCorrupt(f"{path} does not fit bank.json; restore both from the same copy")
        if self.published and verify and file_sha256(path) != described["sha256"]:
            raise DatastoreCorrupt(f"{path} is damaged: its SHA-256 is not that of bank.json; restore it from a copy")
        if self.moments:
            path = self.folder / "moments.safetensors"
            moments = open_tensors(path, mode)
            shapes = {"moments": (self.rows, self.value_width), "squares": (self.rows,), "steps": (self.rows,)}
            if {name: item.shape for name, item in moments.items()} != shapes:
                raise DatastoreCorrupt(f"{path} does not fit bank.json; restore both from the same copy")
            maps |= moments
        self._maps = maps
        self._columns = [maps[name] for name in sorted(maps)]
        self.committed = read_commit(self.folder)
        self._journal = Journal(self.folder / "journal")
        self._saved: set[int] = set()  # rows that the journal has
        undone = self._journal.undo(self.committed.number, self._columns)  # a reader's maps are its own
        if self.writable:
            if undone:
                self._flush()
            self._journal.clear()
        self._find_rows()

    def _find_rows(self) -> None:
        taken = np.flatnonzero(self._maps["owners"])
        self._count, self._top = len(taken), int(taken[-1]) + 1 if len(taken) else 0
        self._holes = np.setdiff1d(np.arange(self._top), taken, assume_unique=True).tolist()[::-1]

    @property
    def keys(self) -> Tensor:
        """All keys, shape (rows, key_width), as a map of the file; not to be written to."""
        return self._tensor("keys")

    @property
    def values(self) -> Tensor:
        """All values, shape (rows, value_width), as a map of the file; not to be written to."""
        return self._tensor("values")

    @property
    def owners(self) -> Tensor:
        """Who wrote each row, int64, shape (rows,); 0 where it is free."""
        return self._tensor("owners")

    def __len__(self) -> int:
        """Rows that are written."""
        return self._count

    def _tensor(self, name: str) -> Tensor:
        array = torch.from_numpy(self._maps[name])
        return array.view(torch.bfloat16) if array.dtype == torch.int16 else array

    def write(self, owner: int, keys: Tensor, values: Tensor) -> Tensor:
        """Write new rows.

        Args:
            owner: Anything but 0, for `delete`; see `owner_of`.
            keys: Shape (n, key_width).
            values: Shape (n, value_width).

        Returns:
            Their numbers, int64, shape (n,).

        Raises:
            DatastoreError: There is no room, or the table is not writable.
            KeyOverflow: A number is not finite.
            ShapeError: Shapes are others.
        """
        self.check_writable()
        if owner == 0:
            raise ConfigError("owner is 0, which marks free rows; expected another number, such as that of owner_of")
        if keys.shape != (len(values), self.key_width) or values.shape != (len(keys), self.value_width):
            raise ShapeError(
                f"keys have shape {tuple(keys.shape)} and values {tuple(values.shape)}; expected (n, {self.key_width}) "
                f"and (n, {self.value_width})"
            )
        count = len(keys)
        if count > self.rows - self._count:
            raise DatastoreError(
                f"{self.folder} has room for {self.rows - self._count:,} more rows, {count:,} are to be written; "
                "delete some, or create a larger table"
            )
        keys, values = (self._stored(name, item) for name, item in (("keys", keys), ("values", values)))
        holes = self._holes[max(0, len(self._holes) - count) :][::-1]
        top = self._top + count - len(holes)
        ids = torch.tensor([*holes, *range(self._top, top)], dtype=torch.long)
        self._save(ids)
        del self._holes[len(self._holes) - len(holes) :]
        self._top, self._count = top, self._count + count
        for name, item in (("keys", keys), ("values", values), ("owners", torch.tensor(owner))):
            self._tensor(name)[ids] = item
        return ids

    def delete(self, owner: int) -> int:
        """Free all rows of an owner and overwrite them with zeros; returns how many there were."""
        self.check_writable()
        ids = torch.from_numpy(np.flatnonzero(self._maps["owners"] == owner)) if owner else torch.empty(0).long()
        self._save(ids)
        for column in self._columns:
            column[ids.numpy()] = 0
        self._count -= len(ids)
        self._holes = sorted({*self._holes, *ids.tolist()}, reverse=True)
        return len(ids)

    def read(self, name: str, ids: Tensor) -> Tensor:
        """Copy rows of a column: "keys", "values", "owners"; with moments "moments", "squares", "steps".

        Args:
            name: Of the column.
            ids: Int64, shape (n,).
        """
        return self._tensor(name)[ids.cpu()]

    def update(self, ids: Tensor, **columns: Tensor) -> None:
        """Overwrite rows in place, whoever owns them; a trainer's way to change what it has read.

        Args:
            ids: Int64, shape (n,), without duplicates.
            **columns: By name, each of shape (n, …).

        Raises:
            KeyOverflow: A number is not finite; no row is changed.
        """
        self.check_writable()
        stored = {name: self._stored(name, item) for name, item in columns.items()}
        ids = ids.cpu()
        self._save(ids)
        for name, item in stored.items():
            self._tensor(name)[ids] = item

    def nearest(self, queries: Tensor, k: int) -> Nearest:
        """Find the written rows of the largest inner products of key and query, exactly, in float32.

        Args:
            queries: Shape (n, key_width).
            k: Rows for each; where fewer are written the rest is absent.
        """
        queries = queries.detach().float().cpu()
        best = torch.full((len(queries), k), -torch.inf)
        ids = torch.zeros((len(queries), k), dtype=torch.long)
        block = max(1, _SCORES // max(1, len(queries)))
        for start in range(0, self._top, block):
            end = min(self._top, start + block)
            scores = queries @ self.keys[start:end].float().T  # (n, block)
            scores.masked_fill_(self.owners[start:end] == 0, -torch.inf)
            scores, numbers = torch.cat([best, scores], dim=1).topk(k, dim=1)
            known = torch.cat([ids, torch.arange(start, end).expand(len(ids), -1)], dim=1)
            best, ids = scores, known.gather(1, numbers)
        return Nearest(self.keys[ids].float(), self.values[ids].float(), best > -torch.inf)

    def commit(self, tensors: Mapping[str, Tensor] | None = None, note: Mapping[str, Any] | None = None) -> None:
        """Keep all changes since the last commit, with tensors and a note, in one step; they survive a power failure.

        What an earlier commit had beside the rows is replaced.
        """
        self.check_writable()
        if self._saved:
            self._flush()
        number = self.committed.number + 1
        tensors = {name: item.detach().cpu().contiguous() for name, item in (tensors or {}).items()}
        committed = Committed(number, tensors, dict(note or {}))
        write_atomically(self.folder / "commit.safetensors", committed.to_bytes())
        self.committed = committed
        self._journal.clear()
        self._saved.clear()

    def rollback(self) -> None:
        """Undo all changes since the last commit."""
        self.check_writable()
        if self._journal.undo(self.committed.number, self._columns):
            self._flush()
        self._journal.clear()
        self._saved.clear()
        self._find_rows()

    def publish(self, folder: str | Path, note: Mapping[str, Any] | None = None) -> None:
        """Copy all that is written, committed or not, into an immutable table at another place.

        Rows keep their numbers, and what was committed beside them comes along; the optimizer's state does not.

        Args:
            folder: Must not exist, or be empty.
            note: In the place of this table's own.
        """
        folder = Path(folder)
        rows = self.rows if not self.key_width else max(1, self._top)
        described = {"rows": rows, "key_width": self.key_width, "value_width": self.value_width}
        described |= {"dtype": str(self.dtype).removeprefix("torch."), "moments": False, "sha256": None}
        described["note"] = dict(self.note if note is None else note)
        staging = staging_of(folder)
        maps = create_rows(staging, described)
        for name, to in maps.items():
            for start in range(0, rows, _COPIED):
                to[start : start + _COPIED] = self._maps[name][:rows][start : start + _COPIED]
            if isinstance(to, np.memmap):
                to.flush()
        described["sha256"] = file_sha256(staging / "rows.safetensors")
        put_in_place(staging, folder, described, self.committed)

    def close(self) -> None:
        """Let another process have it; what was not committed is undone."""
        if self._lock >= 0:
            if self.writable:
                self.rollback()
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Bank:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is None and self.writable and self._saved:
            self.commit(self.committed.tensors, self.committed.note)
        self.close()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Bank:
        """Return the table itself: a copy of a model reads the same one, and its lock is that of one process."""
        return self

    def __reduce__(self) -> Any:
        raise DatastoreError(f"{self.folder} is a table on disk and cannot be pickled; open it again by its folder")

    def __repr__(self) -> str:
        return f"Bank({str(self.folder)!r}, {self._count:,} of {self.rows:,} rows written)"

    def _save(self, ids: Tensor) -> None:
        """Put rows into the journal before they are changed for the first time."""
        new = np.array([number for number in ids.tolist() if number not in self._saved], np.int64)
        if len(new):
            self._journal.append(self.committed.number, Undo(new, [column[new] for column in self._columns]))
            self._saved.update(new.tolist())

    def _stored(self, name: str, item: Tensor) -> Tensor:
        item = item.detach().cpu().to(self._tensor(name).dtype)
        if not item.isfinite().all():
            raise KeyOverflow(
                f"{name} for {self.folder} hold NaN or infinite numbers; nothing was written: check what made them"
            )
        return item

    def _flush(self) -> None:
        for column in self._columns:
            if isinstance(column, np.memmap):
                column.flush()

    def check_writable(self) -> None:
        """Raise `DatastoreError` unless the table can be changed."""
        if self._lock < 0:
            raise DatastoreError(f"{self.folder} is closed; open it again")
        if not self.writable:
            kind = "is published" if self.published else "was opened for reading"
            raise DatastoreError(f"{self.folder} {kind} and cannot be changed; open a work table with writable=True")

"""What attention remembers: the keys and values of the last tokens of each row, in a ring buffer."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ShapeError
from ..ops import nearest_keys


class Recalled(NamedTuple):
    """What queries found.

    Attributes:
        keys: Shape (rows, heads, n, k, d).
        values: Of the same shape.
        present: Bool, shape (rows, heads, n, k): False where there were fewer than k.
        places: When each was written, counted from 0 in its row, int64, shape (rows, heads, n, k).
    """

    keys: Tensor
    values: Tensor
    present: Tensor
    places: Tensor

    def in_order(self) -> Recalled:
        """Return the entries of each query in the order in which they were written, absent ones first."""
        order = self.places.masked_fill(~self.present, -1).argsort(dim=-1)
        wide = order[..., None].expand_as(self.keys)
        return Recalled(
            self.keys.gather(3, wide),
            self.values.gather(3, wide),
            self.present.gather(3, order),
            self.places.gather(3, order),
        )


class KeyValueMemory(Protocol):
    """What an attention layer needs of its memory."""

    @property
    def rows(self) -> int:
        """Texts that are remembered side by side; 0 before anything was written."""
        ...

    @property
    def written(self) -> Tensor:
        """Entries that each row has been given since it was last reset, int64, shape (rows,)."""
        ...

    def write(self, keys: Tensor, values: Tensor, known: Tensor | None = None) -> None:
        """Remember, without gradient."""
        ...

    def read(
        self, queries: Tensor, before: Tensor, k: int, order: Tensor | None = None, fading: Tensor | None = None
    ) -> Recalled | None:
        """Return the k nearest entries that each query sees, or None if nothing can be found."""
        ...

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget some rows or all."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that must be kept to go on."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave."""
        ...


class Ring:
    """The last `size` keys and values of every row and head, searched exactly where they are.

    Rows are independent. The buffer is made by the first `write`, in the type of what is written, and never grows: slot
    `place mod size` holds the entry of that place.

    Args:
        size: Entries a row.
        device: Where they are; None is where the first that is written is. What is found is returned to the queries'.
    """

    def __init__(self, size: int, device: str | torch.device | None = None) -> None:
        self.size, self.device = size, device
        self._keys = self._values = torch.empty(0)
        self._written = torch.zeros(0, dtype=torch.int64)

    @property
    def rows(self) -> int:
        """Texts that are remembered side by side; 0 before anything was written."""
        return len(self._written)

    @property
    def written(self) -> Tensor:
        """Entries that each row has been given since it was last reset, int64, shape (rows,)."""
        return self._written

    @torch.no_grad()
    def write(self, keys: Tensor, values: Tensor, known: Tensor | None = None) -> None:
        """Remember keys and values without their gradients, in order; of more than `size` the last.

        Args:
            keys: Shape (rows, heads, n, d).
            values: Of the same shape.
            known: Bool, shape (rows, n): False for padding, which is left out; None means that all are text.

        Raises:
            ShapeError: The memory holds another number of rows, or other heads or widths.
        """
        rows, _, n, _ = keys.shape
        if not self.rows:
            self._make(keys)
        keys, values = keys.to(self._keys.device), values.to(self._keys.device)
        expected = (*self._keys.shape[:2], n, self._keys.shape[3])
        if keys.shape != expected or values.shape != expected:
            raise ShapeError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit this memory, {expected}; "
                "reset it to begin with another number of rows"
            )
        known = torch.ones(rows, n, dtype=torch.bool, device=keys.device) if known is None else known.to(keys.device)
        count = known.sum(dim=1)
        numbers = known.cumsum(dim=1) - 1  # of each token within what its row is given now
        kept = known & (numbers >= (count - self.size)[:, None])
        row, token = kept.nonzero(as_tuple=True)  # (entries,)
        slot = (self._written[row] + numbers[row, token]) % self.size
        self._keys[row, :, slot] = keys[row, :, token].to(self._keys.dtype)
        self._values[row, :, slot] = values[row, :, token].to(self._values.dtype)
        self._written += count

    def read(
        self, queries: Tensor, before: Tensor, k: int, order: Tensor | None = None, fading: Tensor | None = None
    ) -> Recalled | None:
        """Return the k entries with the largest inner products that each query sees.

        Args:
            queries: Shape (rows, heads, n, d).
            before: A query sees entries of places below, int64, shape (rows, n).
            k: Entries a query.
            order: Row r reads the memory of row order[r], int64, shape (rows,); None is its own.
            fading: What an entry's product loses for each token of its age, shape (rows, heads, n); None is nothing.

        Returns:
            Fewer than k where so many were never written; None if no row has an entry.
        """
        filled = min(self.size, int(self._written.max())) if self.rows else 0
        if not filled:
            return None
        keys, values, written = self._keys, self._values, self._written
        home, device = queries.device, keys.device
        queries, before = queries.to(device), before.to(device)
        fading = None if fading is None else fading.to(device)
        if order is not None:
            keys, values, written = keys[order], values[order], written[order]
            before = before + (written - self._written)[:, None]
        last = written[:, None] - 1
        places = last - (last - torch.arange(filled, device=last.device)) % self.size  # (rows, filled)
        searched = keys[:, :, :filled]
        if fading is not None:  # one more number in each vector, whose product is what age costs
            queries = torch.cat([queries.float(), fading[..., None].float()], dim=-1)
            ages = (places - last).float()[:, None, :, None].expand(*searched.shape[:3], 1)
            searched = torch.cat([searched.float(), ages], dim=-1)
        slots, present = nearest_keys(queries, searched, places, before, k)
        rows, heads = slots.shape[:2]
        row = torch.arange(rows * heads, device=slots.device).view(rows, heads, 1, 1)
        flat = (row * self.size + slots).flatten()

        def chosen(buffer: Tensor) -> Tensor:
            return buffer.flatten(0, 2).index_select(0, flat).view(*slots.shape, -1)

        found = places.gather(1, slots.flatten(1)).view(slots.shape)
        return Recalled(*(part.to(home) for part in (chosen(keys), chosen(values), present, found)))

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget everything, and with it how many rows there were; or only the rows that are flagged or numbered.

        Args:
            rows: Bool, shape (rows,), or int64 row numbers; None is all.

        Raises:
            ShapeError: There is not one flag a row, or no row of a number.
        """
        if rows is None:
            self._keys = self._values = torch.empty(0)
            self._written = torch.zeros(0, dtype=torch.int64)
        elif self.rows:
            if rows.dtype == torch.bool and rows.shape != self._written.shape:
                raise ShapeError(f"reset has flags of shape {tuple(rows.shape)}; this memory has {self.rows} rows")
            if not rows.numel():
                return
            if rows.is_floating_point() or (rows.dtype != torch.bool and not 0 <= rows.min() <= rows.max() < self.rows):
                raise ShapeError(f"reset has {rows.tolist()}; expected flags, or row numbers from 0 to {self.rows - 1}")
            self._written[rows.to(self._written.device, torch.bool if rows.dtype == torch.bool else torch.int64)] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers themselves, not copies; none before anything was written."""
        if not self.rows:
            return {}
        return {"keys": self._keys, "values": self._values, "written": self._written}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave; the tensors are copied.

        Raises:
            ShapeError: They are of a memory of another size, or do not fit together.
        """
        if not state:
            self.reset()
            return
        keys, values, written = state["keys"], state["values"], state["written"]
        counts = written.dtype == torch.int64 and bool((written >= 0).all())
        if keys.ndim != 4 or keys.shape != values.shape or written.shape != keys.shape[:1] or not counts:
            raise ShapeError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} are not those of a memory")
        if keys.shape[2] != self.size:
            raise ShapeError(f"the state is of a memory of {keys.shape[2]} entries, this one has {self.size}")
        self._keys, self._values, self._written = (
            part.to(self.device or part.device, copy=True) for part in (keys, values, written)
        )

    def _make(self, like: Tensor) -> None:
        rows, heads, _, width = like.shape
        with torch.inference_mode(False):  # what is made in that mode could not be written outside it
            options: dict[str, Any] = {"dtype": like.dtype, "device": self.device or like.device}
            self._keys = torch.zeros(rows, heads, self.size, width, **options)
            self._values = torch.zeros(rows, heads, self.size, width, **options)
            self._written = torch.zeros(rows, dtype=torch.int64, device=options["device"])

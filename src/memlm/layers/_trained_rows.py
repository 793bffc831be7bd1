"""Trained rows: a layer's large table lies on disk, and only the rows that a batch touches are read and changed.

The rows are the values of product keys (Lample et al. 2019, arXiv:1907.05242): finding them needs the sub-keys alone,
of which there are as many as the square root of the rows, and so no other row is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, DatastoreMismatch
from ..ops import product_key_top_k, read_slots, row_adam
from ._bank import Bank
from ._beside import put_beside
from ._float32 import Float32Module

_STATE = ("exp_avg", "exp_avg_sq", "step")  # of torch's AdamW, for each parameter


class TrainedRows(Float32Module):
    """Product keys whose values are the rows of a table on disk; the sum of what the heads read is projected to the
    model.

    The rows of a new table are zero, and so is what is read, until they are trained (`RowTraining`).

    Args:
        width: Of the model.
        bank: Made by `Bank.create(…, rows=n * n, key_width=0, moments=True)`, or a published copy.
        heads: Queries at each position, each with sub-keys of its own; they share the rows.
        key_width: Of a query, even.
        top_k: Rows read by each head.
    """

    def __init__(self, width: int, bank: Bank, *, heads: int = 4, key_width: int = 64, top_k: int = 8) -> None:
        super().__init__()
        n = math.isqrt(bank.rows)
        if n * n != bank.rows or bank.key_width:
            raise ConfigError(
                f"the table has {bank.rows:,} rows with keys of width {bank.key_width}; expected n² rows and width 0, "
                f"as product keys address them, such as {n * n:,}"
            )
        if key_width < 2 or key_width % 2 or heads < 1 or not 1 <= top_k <= bank.rows:
            raise ConfigError(
                f"heads, key_width and top_k are {heads}, {key_width} and {top_k}; expected at least one head, an even "
                f"width, and 1 to {bank.rows:,} rows"
            )
        self.bank = bank
        self.heads, self.key_width, self.top_k = heads, key_width, top_k
        self.query = nn.Linear(width, heads * key_width)
        bound = (key_width / 2) ** -0.5  # as in the paper's code
        self.sub_keys = nn.Parameter(torch.empty(heads, 2, n, key_width // 2).uniform_(-bound, bound))
        self.out = nn.Linear(bank.value_width, width, bias=False)
        self.touched: list[tuple[Tensor, Tensor]] = []  # row numbers and what was read, while gradients are recorded

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is to be added to the feed-forward's output.

        Args:
            hidden: Its input, shape (…, width).
        """
        with torch.autocast(hidden.device.type, enabled=False):
            normed = F.layer_norm(hidden.float(), hidden.shape[-1:]).flatten(0, -2)  # (n, width)
            queries = self.query(normed).unflatten(-1, (self.heads, self.key_width))
            queries = F.layer_norm(queries, queries.shape[-1:])  # (n, heads, key width)
            scores, slots = product_key_top_k(queries, self.sub_keys, self.top_k)  # (n, heads, top_k)
            ids, places = slots.cpu().unique(return_inverse=True)
            rows = self.bank.read("values", ids).float().to(hidden.device)
            if self.training and torch.is_grad_enabled():
                self.touched.append((ids, rows.requires_grad_()))
            weights = scores.softmax(dim=-1).flatten(1)  # (n, heads · top_k)
            read = read_slots(rows, places.to(hidden.device).flatten(1), weights)
            return self.out(read).reshape(hidden.shape).to(hidden.dtype)

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the rows that had a gradient since the last call, and it: int64 (n,), and float32 (n, value width)."""
        read = [(ids, rows.grad) for ids, rows in self.touched if rows.grad is not None]
        self.touched.clear()
        if not read:
            return torch.empty(0, dtype=torch.long), torch.empty(0, self.bank.value_width)
        ids, places = torch.cat([ids for ids, _ in read]).unique(return_inverse=True)
        gradients = torch.zeros(len(ids), self.bank.value_width)
        return ids, gradients.index_add_(0, places, torch.cat([gradient.cpu() for _, gradient in read]))


def add_trained_rows(model: Any, layer: int, bank: Bank, **settings: Any) -> TrainedRows:
    """Put new `TrainedRows` beside the feed-forward of a layer, in place; they add nothing before they are trained.

    Args:
        model: A Hugging Face causal LM.
        layer: Its number from 0; negative from the last.
        bank: See `TrainedRows`.
        **settings: Of `TrainedRows`: heads, key_width, top_k. A table that was trained before brings its own.

    Raises:
        DatastoreMismatch: The table was trained with other settings.
    """
    hidden = model.config.get_text_config().hidden_size
    committed = bank.committed
    known = committed.note.get("settings")
    if known is not None:
        if any(known.get(name) != value for name, value in settings.items()):
            raise DatastoreMismatch(f"{bank.folder} was trained with {known}, {settings} are given; leave them out")
        settings = known
    rows = TrainedRows(hidden, bank, **settings)
    if known is not None:
        _load(rows, committed.tensors, bank)
    put_beside(model, layer, rows)
    return rows


class RowTraining:
    """Trains a table's rows and what reads them, and keeps both in one step.

    After `loss.backward()`, `update` changes the rows that the batch has read, by `row_adam`, and the module's own
    parameters by AdamW. `commit` keeps rows, moments, parameters, AdamW's state and the number of steps; a killed
    process is led back to its last commit, and the same batches from there on give the same numbers, bit for bit.

    Args:
        rows: What is trained; nothing else is.
        learning_rate: Of the module's parameters.
        row_learning_rate: Of the rows.
        betas: Of both.
        rate: Factor of both learning rates by the number of steps made, such as a warm-up.

    Attributes:
        steps: Updates made, those before the last commit of an earlier run included.
    """

    def __init__(
        self,
        rows: TrainedRows,
        *,
        learning_rate: float = 1e-3,
        row_learning_rate: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        rate: Callable[[int], float] = lambda steps: 1.0,
    ) -> None:
        rows.bank.check_writable()
        if not rows.bank.moments:
            raise ConfigError(f"{rows.bank.folder} keeps no moments; expected a table made with moments=True")
        self.rows = rows
        self.row_learning_rate, self.betas, self.rate = row_learning_rate, betas, rate
        self.optimizer = torch.optim.AdamW(rows.parameters(), lr=1.0, betas=betas, weight_decay=0.0)
        self.learning_rate = learning_rate
        self.steps = 0
        committed = rows.bank.committed
        if "steps" in committed.note:
            self.steps = int(committed.note["steps"])
            for name, parameter in rows.named_parameters():
                state = {key: committed.tensors.get(f"optimizer.{name}.{key}") for key in _STATE}
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device if key != "step" else "cpu", copy=True)
                    for key, value in state.items()
                    if value is not None
                }

    def update(self) -> int:
        """Apply the gradients of what was read since the last update; returns the number of rows that were changed."""
        rate = self.rate(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        ids, gradients = self.rows.take_gradients()
        bank = self.rows.bank
        names = ("values", "moments", "squares", "steps")
        values, moments, squares, steps = (bank.read(name, ids) for name in names)
        learning_rate = self.row_learning_rate * rate
        after = row_adam(values, gradients, moments, squares, steps, learning_rate, self.betas)
        bank.update(ids, **dict(zip(names, after, strict=True)))
        self.steps += 1
        return len(ids)

    def commit(self) -> None:
        """Keep everything, in one step."""
        rows = self.rows
        tensors = dict(rows.state_dict())
        for name, parameter in rows.named_parameters():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        settings = {"heads": rows.heads, "key_width": rows.key_width, "top_k": rows.top_k}
        rows.bank.commit(tensors, {"steps": self.steps, "settings": settings})


def _load(rows: TrainedRows, tensors: dict[str, Tensor], bank: Bank) -> None:
    wanted = rows.state_dict()
    if any(name not in tensors or tensors[name].shape != item.shape for name, item in wanted.items()):
        raise DatastoreMismatch(
            f"what {bank.folder} was trained with does not fit this model, of width {rows.query.in_features}; load the "
            "model that it was trained with"
        )
    rows.load_state_dict({name: tensors[name] for name in wanted})

"""A memory of product keys as a module (Lample et al. 2019, arXiv:1907.05242)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..ops import product_key_top_k, read_slots

QueryNormalization = Literal["layer", "batch", "none"]
OutputForm = Literal["sum", "gated"]
ValueGradient = Literal["sparse", "dense"]
Observer = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class ProductKeySettings:
    """The shape of a memory of product keys.

    Attributes:
        sub_keys: n, sub-keys in each of the two sets of a head; there are n² slots.
        heads: Queries for each position. They have keys of their own and share the values, and their results add up.
        k: Slots that each head reads.
        key_width: d of queries and keys; even.
        query_normalization: "layer" normalizes each head's query; "batch" normalizes over the positions of a training
            batch, as in the paper, padding among them; "none".
        output: "sum" is the weighted sum of values; "gated" is W₂(sum ⊙ silu(W₁ x)) (Memory+, Berges et al. 2024,
            arXiv:2412.09764, eq. 3).
        value_gradient: "sparse" holds the rows that were read, and needs an optimizer that takes it; "dense" is faster
            for small tables.

    Raises:
        ConfigError: A number or a name that cannot work.
    """

    sub_keys: int
    heads: int = 4
    k: int = 32
    key_width: int = 128
    query_normalization: QueryNormalization = "layer"
    output: OutputForm = "sum"
    value_gradient: ValueGradient = "sparse"

    def __post_init__(self) -> None:
        for name in ("sub_keys", "heads", "k", "key_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")
        if self.key_width % 2:
            raise ConfigError(f"key_width is {self.key_width}; expected an even number, as keys have two halves")
        if self.k > self.slots:
            raise ConfigError(f"k is {self.k}; expected at most {self.slots}, the number of slots")
        names = {"query_normalization": QueryNormalization, "output": OutputForm, "value_gradient": ValueGradient}
        for name, kind in names.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(kind))}")

    @property
    def slots(self) -> int:
        """Rows of the table of values."""
        return self.sub_keys**2


class ProductKeyMemory(nn.Module):
    """A table of values of which every position reads a few rows, those whose keys are nearest to its queries.

    m(x) = Σ_heads Σ_{i ∈ top k} softmax_i(q · k_i) v_i

    Attributes:
        settings: Its shape.
        values: The table, shape (slots, width). It wants a higher learning rate than the rest and no weight decay; see
            `product_key_optimizers`.
        observer: Where not None, called in every forward pass with the slots that were read, int64, shape
            (…, heads · k), and their weights, of the same shape; see `count_slot_usage`.
    """

    def __init__(self, width: int, settings: ProductKeySettings) -> None:
        """Make a memory for states of a width, with random keys and values."""
        super().__init__()
        heads, key_width = settings.heads, settings.key_width
        self.settings = settings
        self.observer: Observer | None = None
        self.query = nn.Linear(width, heads * key_width)
        self.query_norm = _query_norm(settings)
        self.sub_keys = nn.Parameter(torch.empty(heads, 2, settings.sub_keys, key_width // 2))
        self.values = nn.Parameter(torch.empty(settings.slots, width))
        nn.init.uniform_(self.sub_keys, -1 / math.sqrt(key_width // 2), 1 / math.sqrt(key_width // 2))
        nn.init.normal_(self.values, std=width**-0.5)
        if settings.output == "gated":
            self.gate = nn.Linear(width, width, bias=False)
            self.project = nn.Linear(width, width, bias=False)

    def silence(self) -> None:
        """Make the memory give zeros, in a form from which it can still learn."""
        nn.init.zeros_(self.project.weight if self.settings.output == "gated" else self.values)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what the memory gives for every position.

        Args:
            hidden: Float, shape (…, width).

        Returns:
            The same shape and type.
        """
        states = hidden.flatten(0, -2)  # (positions, width)
        weights, slots = self.address(states)
        if self.observer is not None:
            shape = (*hidden.shape[:-1], slots.shape[1])
            self.observer(slots.detach().view(shape), weights.detach().view(shape))
        read = read_slots(self.values, slots, weights, sparse_gradient=self.settings.value_gradient == "sparse")
        if self.settings.output == "gated":
            read = self.project(read * F.silu(self.gate(states)))
        return read.to(hidden.dtype).view_as(hidden)

    def address(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return which slots are read and by which weight.

        Args:
            states: Shape (positions, width).

        Returns:
            Weights that sum to 1 for each head, float32 (float64 for float64), and slots, int64; both of shape
            (positions, heads · k).
        """
        settings = self.settings
        queries = self.query_norm(self.query(states.to(self.query.weight.dtype)))  # (positions, heads · d)
        queries = queries.unflatten(-1, (settings.heads, settings.key_width))
        scores, slots = product_key_top_k(queries, self.sub_keys, settings.k)  # (positions, heads, k)
        return scores.softmax(dim=-1).flatten(1), slots.flatten(1)

    def extra_repr(self) -> str:
        """Return the shape for `print(model)`."""
        settings = self.settings
        return f"{settings.slots:,} slots, {settings.heads} heads, k {settings.k}"


class _HeadNorm(nn.LayerNorm):
    """Normalizes the query of each head by itself."""

    def forward(self, input: Tensor) -> Tensor:
        """Take and give queries of shape (positions, heads · d)."""
        return super().forward(input.unflatten(-1, (-1, *self.normalized_shape))).flatten(1)


def _query_norm(settings: ProductKeySettings) -> nn.Module:
    if settings.query_normalization == "layer":
        return _HeadNorm(settings.key_width)
    if settings.query_normalization == "batch":
        return nn.BatchNorm1d(settings.heads * settings.key_width)
    return nn.Identity()


def product_key_memories(model: nn.Module) -> dict[str, ProductKeyMemory]:
    """Return the memories of product keys in a model by their dotted paths; empty where there is none."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ProductKeyMemory)}

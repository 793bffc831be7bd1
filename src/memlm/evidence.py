"""What a mixture may look at: what each memory found, and what the model believes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# What a smaller distance means; the names are those of a datastore's manifest.
SQUARED_L2, INNER_PRODUCT = METRICS = ("squared_l2", "inner_product")
LATELY = 64  # tokens of the text that a mixture may look back at
# Entries of one memory that a target may look at: what a mixture finds is a matrix of targets × entries
MOST_ENTRIES = 1 << 20
_Rows = TypeVar("_Rows", bound=tuple)
_RIDGE = 1e-3  # of the mean square of a dimension: rows of few tokens do not span all dimensions


class Found(NamedTuple):
    """What one memory found for n targets, k neighbors each.

    Attributes:
        distances: Squared L2 or the negative inner product, as the datastore's metric says; the latter in a cache;
            float32, shape (n, k).
        tokens: The neighbors' values, int64, shape (n, k).
        present: Bool, shape (n, k); False where fewer than k were found.
        entries: Where they stand in the memory, int64, shape (n, k); a pass that is kept holds the first column alone.
        ages: Tokens since then, int64, shape (n, k), in a cache; None in a datastore.
        log_counts: Log of how many entries each of them stands for, float32, shape (n, k), in a pruned datastore; None
            where each stands for itself alone.
    """

    distances: Tensor
    tokens: Tensor
    present: Tensor
    entries: Tensor
    ages: Tensor | None = None
    log_counts: Tensor | None = None

    @classmethod
    def nothing(cls, n: int, k: int) -> Found:
        """Return n rows in which nothing was found."""
        zeros = torch.zeros((n, k), dtype=torch.long)
        return cls(torch.full((n, k), torch.inf), zeros, zeros.bool(), zeros.clone())  # rows may be filled in later

    def among(self, wanted: Tensor) -> Found:
        """Return as many rows as `wanted` (bool) has: these where it is True, in order, and nothing elsewhere."""
        whole = Found.nothing(len(wanted), self.tokens.shape[1])
        if self.log_counts is not None:
            whole = whole._replace(log_counts=torch.zeros(whole.tokens.shape))
        for place, part in zip(whole, self, strict=True):
            if place is not None and part is not None:
                place[wanted] = part
        return whole

    def nearest(self, k: int) -> Found:
        """Return the first k neighbors of every target."""
        return self.each(lambda part: part[:, :k])

    def each(self, change: Callable[[Tensor], Tensor]) -> Found:
        """Apply a function to every tensor."""
        return Found(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]

    @classmethod
    def joined(cls, parts: Sequence[Found]) -> Found:
        """Put rows of one memory together, in the order given; there must be some."""
        return _together(parts, torch.cat)


class Belief(NamedTuple):
    """What the model knows and thinks before each of n targets.

    Attributes:
        keys: What it saw, float32, shape (n, key width).
        last: The token that it has just read, int64, shape (n,).
        top: Its most likely next token, int64, shape (n,); −1 where a black box does not tell which.
        confidence: log p_LM of that token, float32, shape (n,).
        entropy: Of p_LM, in nats, float32, shape (n,).
        normalizer: logsumexp of its logits, float32, shape (n,); NaN where only probabilities are known.
        read: The last tokens that it has read, the newest last, int64, shape (n, LATELY); −1 before the text began.
            None where nobody asked.
        hidden: h, what its output embedding reads, float32, shape (n, width). None where nobody asked.
    """

    keys: Tensor
    last: Tensor
    top: Tensor
    confidence: Tensor
    entropy: Tensor
    normalizer: Tensor
    read: Tensor | None = None
    hidden: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor, keys: Tensor, last: Tensor) -> Belief:
        """Read a belief off logits of shape (n, vocabulary)."""
        normalizer = logits.logsumexp(dim=-1)
        largest, top = logits.max(dim=-1)
        log_probs = logits - normalizer[:, None]
        # a token that the model rules out has log p = −inf, and no share in the entropy
        entropy = -(log_probs.exp() * log_probs.clamp_min(-1e30)).sum(dim=-1)
        return cls(keys, last, top, largest - normalizer, entropy, normalizer)

    def rows(self, rows: Tensor) -> Belief:
        """Return some targets: a mask, or numbers."""
        return Belief(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


def read_lately(tokens: Tensor, places: Tensor, starts: Tensor | int = 0) -> Tensor:
    """Return the last tokens read at some places, the newest last, int64, shape (n, LATELY); −1 where there are none.

    Args:
        tokens: Everything read, int64, shape (length,).
        places: Numbers in it, int64, shape (n,).
        starts: Where the text of each place begins, int64, shape (n,), or one number for all.
    """
    starts = torch.as_tensor(starts, device=tokens.device)
    numbers = places[:, None] + torch.arange(1 - LATELY, 1, device=tokens.device)  # (n, LATELY)
    return tokens[numbers.clamp_min(0)].masked_fill(numbers < starts.reshape(-1, 1), -1)


@dataclass(frozen=True, eq=False)
class OutputEmbedding:
    """The last layer of a model: its logits are W h + b.

    Attributes:
        weight: W, one row e(y) a token, float32, shape (vocabulary, width).
        bias: b, float32, shape (vocabulary,); None where there is none.
    """

    weight: Tensor
    bias: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return W h + b, float32, shape (n, vocabulary), of h of shape (n, width)."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def to(self, device: torch.device | str) -> OutputEmbedding:
        """Return the layer on a device."""
        if self.weight.device == torch.device(device):
            return self
        return OutputEmbedding(self.weight.to(device), None if self.bias is None else self.bias.to(device))

    @cached_property
    def isolating(self) -> Tensor:
        """A, float32, shape (width, width): a step along A e(y) raises the logit of y, on the mean of all tokens by 1,
        and changes others, by least squares, as little as the width allows.
        """
        weight = self.weight.double()
        moments = weight.T @ weight / len(weight)
        ridge = _RIDGE * moments.diagonal().mean().clamp_min(1e-30)
        inverse = torch.linalg.inv(
            moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        )
        own = ((weight @ inverse) * weight).sum(dim=1).mean()
        return (inverse / own.clamp_min(1e-30)).float()


class Evidence(NamedTuple):
    """What each memory found, in the order of the memories, and what the model believes, if a mixture asked for it.

    Beside the states `Belief.hidden` comes the layer that reads them, which is the same for all targets.
    """

    memories: tuple[Found, ...]
    belief: Belief | None = None
    output: OutputEmbedding | None = None

    def rows(self, rows: Tensor | slice) -> Evidence:
        """Return some targets: a mask, numbers, or a slice."""
        return _each([self], lambda parts: parts[0][rows])

    def room(self, n: int) -> Evidence:
        """Return room for n targets like these; see `put`."""
        return _each([self], lambda parts: parts[0].new_empty((n, *parts[0].shape[1:])))

    def put(self, rows: Tensor, part: Evidence) -> None:
        """Write targets into these rows, int64, shape (targets,)."""
        _each([self, part], lambda parts: parts[0].index_put_((rows,), parts[1]))

    def nearest(self, ks: Sequence[int]) -> Evidence:
        """Return the first neighbors alone, so many of each memory."""
        return self._replace(memories=tuple(found.nearest(k) for found, k in zip(self.memories, ks, strict=True)))


def join(parts: Sequence[Evidence]) -> Evidence:
    """Put targets together, in the order given; there must be some."""
    return _each(parts, torch.cat)


def join_beliefs(parts: Sequence[Belief]) -> Belief:
    """Put targets together, in the order given; there must be some."""
    return _together(parts, torch.cat)


def _each(parts: Sequence[Evidence], change: Callable[[list[Tensor]], Tensor]) -> Evidence:
    """Apply a function to every tensor of some evidence."""
    memories = [_together(column, change) for column in zip(*(part.memories for part in parts), strict=True)]
    beliefs = [part.belief for part in parts if part.belief is not None]
    return Evidence(tuple(memories), _together(beliefs, change) if beliefs else None, parts[0].output)


def _together(parts: Sequence[_Rows], change: Callable[[list[Tensor]], Tensor]) -> _Rows:
    """Apply a function to every column of some parts, none of which has a column that another one lacks."""
    columns = list(zip(*parts, strict=True))
    assert all(len({item is None for item in column}) == 1 for column in columns), "a column would be lost"
    return type(parts[0])(*(None if column[0] is None else change(list(column)) for column in columns))

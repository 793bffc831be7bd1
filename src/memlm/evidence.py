"""What a mixture may look at: what each memory found, and what the model believes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# What a smaller distance means; the names are those of a datastore's manifest.
SQUARED_L2, INNER_PRODUCT = METRICS = ("squared_l2", "inner_product")
LATELY = 64  # tokens of the text that a mixture may look back at
# Entries of one memory that a target may look at: what a mixture finds is a matrix of targets × entries
MOST_ENTRIES = 1 << 20
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
    """

    distances: Tensor
    tokens: Tensor
    present: Tensor
    entries: Tensor
    ages: Tensor | None = None

    @classmethod
    def nothing(cls, n: int, k: int) -> Found:
        """Return n rows in which nothing was found."""
        zeros = torch.zeros((n, k), dtype=torch.long)
        return cls(torch.full((n, k), torch.inf), zeros, zeros.bool(), zeros.clone())  # rows may be filled in later

    def among(self, wanted: Tensor) -> Found:
        """Return as many rows as `wanted` (bool) has: these where it is True, in order, and nothing elsewhere."""
        whole = Found.nothing(len(wanted), self.tokens.shape[1])
        for place, part in zip(whole[:4], self[:4], strict=True):
            place[wanted] = part
        return whole

    def nearest(self, k: int) -> Found:
        """Return the first k neighbors of every target."""
        ages = None if self.ages is None else self.ages[:, :k]
        return Found(self.distances[:, :k], self.tokens[:, :k], self.present[:, :k], self.entries[:, :k], ages)


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
    columns = list(zip(*parts, strict=True))
    return Belief(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _each(parts: Sequence[Evidence], change: Callable[[list[Tensor]], Tensor]) -> Evidence:
    """Apply a function to every tensor of some evidence."""

    def both(items: Sequence[NamedTuple]) -> list[Tensor | None]:
        columns = zip(*items, strict=True)
        return [None if any(part is None for part in column) else change(list(column)) for column in columns]

    memories = [Found(*both(column)) for column in zip(*(part.memories for part in parts), strict=True)]  # type: ignore
    beliefs = [part.belief for part in parts if part.belief is not None]
    return Evidence(tuple(memories), Belief(*both(beliefs)) if beliefs else None, parts[0].output)  # type: ignore

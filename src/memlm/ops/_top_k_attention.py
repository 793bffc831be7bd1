"""Attention to the k best keys of each query (Gupta, Dar, Goodman, Ciprut, Berant 2021, arXiv:2106.06899, section 3.1).

    s_ij = cap · tanh(scale · q_i·k_j / cap) + mask_ij        T_i = the k largest s_ij
    w_ij = exp(s_ij) / (exp(sink) + Σ_{l ∈ T_i} exp(s_il))    o_i = Σ_{j ∈ T_i} w_ij v_j

Queries are taken a chunk at a time. What is kept for the gradient is queries, keys, values and the numbers of the
chosen keys: it grows with the length, not with its square. Scores, weights and dropout are computed again, chunk by
chunk. The gradient is that of the function above, zero for keys that were not chosen. Cap and sink are of later models
(Gemma 2, gpt-oss); without them cap · tanh(x / cap) is x, and exp(sink) is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Settings(NamedTuple):
    k: int
    scale: float
    causal: bool
    cap: float | None
    dropout: float
    chunk_size: int
    seed: int


def top_k_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    cap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    chunk_size: int = 128,
) -> Tensor:
    """Let every query attend to the k visible keys with the highest scores; of equal ones, to any.

    Args:
        queries: Shape (batch, heads, n, width), float.
        keys: Shape (batch, key heads, m, width), m ≥ 1; heads are a multiple of key heads and share them in order.
        values: Shape (batch, key heads, m, value width).
        k: Keys a query, at least 1; from m on this is plain attention.
        scale: Of the products; None means 1 / √width.
        mask: Bool, True where a query may see a key, or float, added to the scores; it broadcasts to (batch, heads, n,
            m) and gets no gradient.
        causal: Query i sees keys 0…i at most.
        cap: Scores lie within ± cap.
        sinks: A score for each head that takes its share of the softmax and gives nothing, shape (heads,).
        dropout: Probability that a chosen weight is zero; the others are divided by 1 − dropout. Drawn from torch's
            global generator.
        chunk_size: Queries that are computed together.

    Returns:
        Shape (batch, heads, n, value width); 0 for a query that sees no key. Differentiable once in queries, keys,
        values and sinks. Under autocast it has autocast's type.

    Raises:
        ValueError: k or chunk_size is below 1, or dropout outside [0, 1), or the mask requires a gradient.

    Example:
        >>> keys = torch.tensor([[[[3.0], [2.0], [1.0]]]])
        >>> top_k_attention(torch.ones(1, 1, 1, 1), keys, keys, k=1)
        tensor([[[[3.]]]])
    """
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k is {k} and chunk_size {chunk_size}; expected at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected a number from 0 to below 1")
    if mask is not None and mask.requires_grad:
        raise ValueError("the mask requires a gradient, and top-k attention has none for it; detach it")
    groups = keys.shape[1]
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    seed = int(torch.randint(1 << 62, ())) if dropout else 0
    device = queries.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)].expand(-1, -1, queries.shape[2], keys.shape[2])
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (groups, -1))  # (b, g, r, n, m)
    with torch.autocast(device, enabled=False):
        return _TopKAttention.apply(
            queries.unflatten(1, (groups, -1)),  # (b, g, r, n, d): r heads share the keys of one
            keys,
            values,
            None if sinks is None else sinks.view(groups, -1, 1, 1),
            mask,
            _Settings(k, scale, causal, cap, dropout, chunk_size, seed),
        ).flatten(1, 2)


class _TopKAttention(torch.autograd.Function):
    """Queries (b, g, r, n, d), keys (b, g, m, d), values (b, g, m, e), sinks (g, r, 1, 1), mask (b, g, r, n, m)."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sinks: Tensor | None,
        mask: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        outputs, chosen, biases = [], [], []
        draws = _Draws(settings, queries.device)
        for first, rows in _chunks(queries, settings):
            seen = _seen(first, rows, keys, settings)
            scores = _capped(_products(rows, keys[:, :, :seen]) * settings.scale, settings.cap)  # (b, g, r, c, seen)
            part = None if mask is None else mask[..., first : first + rows.shape[3], :seen]
            if part is not None:
                scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
            if settings.causal:
                scores = scores.masked_fill(_after(first, rows, seen), -torch.inf)
            best, places = scores.topk(min(settings.k, seen), sorted=False)  # (b, g, r, c, k)
            weights = draws.dropped(_weights(best, sinks)[0], draws.kept(best.shape))
            outputs.append(_products(spread(weights, places, seen, values.dtype), values[:, :, :seen].mT))
            # a key that is masked is chosen only where fewer than k are visible: a negative number marks it
            chosen.append(torch.where(best > -torch.inf, places, ~places).int())
            if part is not None and part.dtype != torch.bool:
                biases.append(part.expand(scores.shape).gather(-1, places))
        ctx.settings, ctx.biased = settings, bool(biases)
        ctx.save_for_backward(queries, keys, values, sinks, *chosen, *biases)
        return torch.cat(outputs, dim=3) if outputs else queries.new_zeros(*queries.shape[:4], values.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[bad-override]
        settings: _Settings = ctx.settings
        queries, keys, values, sinks, *saved = ctx.saved_tensors
        chosen = saved[: len(saved) // 2] if ctx.biased else saved
        biases = saved[len(chosen) :] or [None] * len(chosen)
        exact = torch.promote_types(queries.dtype, torch.float32)  # sums over chunks are not rounded in between
        d_queries = torch.zeros_like(queries)
        d_keys, d_values = torch.zeros_like(keys, dtype=exact), torch.zeros_like(values, dtype=exact)
        d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=exact)
        draws = _Draws(settings, queries.device)
        for (first, rows), numbers, bias in zip(_chunks(queries, settings), chosen, biases, strict=True):
            seen, stop = _seen(first, rows, keys, settings), first + rows.shape[3]
            places = torch.where(numbers < 0, ~numbers, numbers).long()
            capped = _capped(_products(rows, keys[:, :, :seen]).gather(-1, places) * settings.scale, settings.cap)
            best = (capped if bias is None else capped + bias).masked_fill(numbers < 0, -torch.inf)
            weights, sunk = _weights(best, sinks)
            kept = draws.kept(best.shape)
            d_rows = d_output[..., first:stop, :]
            d_weights = draws.dropped(_products(d_rows, values[:, :, :seen]).gather(-1, places).to(exact), kept)
            mean = (weights * d_weights).sum(dim=-1, keepdim=True)
            d_scores = weights * (d_weights - mean) * settings.scale
            if settings.cap is not None:
                d_scores = d_scores * (1 - (capped / settings.cap).square())
            if d_sinks is not None and sunk is not None:
                d_sinks -= (sunk * mean).sum(dim=(0, 3))[..., None]
            d_dense = spread(d_scores, places, seen, queries.dtype)
            d_queries[..., first:stop, :] = _products(d_dense, keys[:, :, :seen].mT)
            d_keys[:, :, :seen] += d_dense.flatten(2, 3).mT @ rows.flatten(2, 3)
            dense = spread(draws.dropped(weights, kept), places, seen, values.dtype)
            d_values[:, :, :seen] += dense.flatten(2, 3).mT @ d_rows.flatten(2, 3)
        d_sinks = None if d_sinks is None else d_sinks.to(sinks.dtype)
        return d_queries, d_keys.to(keys.dtype), d_values.to(values.dtype), d_sinks, None, None


class _Draws:
    """Dropout of one call: the same seed draws the same weights, chunk after chunk, in both directions."""

    def __init__(self, settings: _Settings, device: torch.device) -> None:
        self.dropout = settings.dropout
        self.generator = torch.Generator(device).manual_seed(settings.seed) if settings.dropout else None

    def kept(self, shape: torch.Size) -> Tensor | None:
        if self.generator is None:
            return None
        return torch.rand(shape, generator=self.generator, device=self.generator.device) >= self.dropout

    def dropped(self, weights: Tensor, kept: Tensor | None) -> Tensor:
        return weights if kept is None else weights * kept / (1 - self.dropout)


def _chunks(queries: Tensor, settings: _Settings) -> list[tuple[int, Tensor]]:
    starts = range(0, queries.shape[3], settings.chunk_size)
    return [(first, queries[..., first : first + settings.chunk_size, :]) for first in starts]


def _seen(first: int, rows: Tensor, keys: Tensor, settings: _Settings) -> int:
    """Return how many of the first keys a chunk can see."""
    return min(keys.shape[2], first + rows.shape[3]) if settings.causal else keys.shape[2]


def _after(first: int, rows: Tensor, seen: int) -> Tensor:
    """Return where a key stands after a query of the chunk, shape (c, seen)."""
    places = torch.arange(max(seen, first + rows.shape[3]), device=rows.device)
    return places[:seen] > places[first : first + rows.shape[3], None]


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply rows (b, g, r, c, d) by columns (b, g, m, d): shape (b, g, r, c, m)."""
    return (rows.flatten(2, 3) @ columns.mT).unflatten(2, rows.shape[2:4])


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else (scores / cap).tanh() * cap


def _weights(best: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the softmax over the last dimension, and the sink's share; in float32 at least, 0 where all is −inf."""
    scores = best.to(torch.promote_types(best.dtype, torch.float32))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    limits = torch.finfo(scores.dtype)
    powers = (scores - scores.amax(dim=-1, keepdim=True).clamp_min(limits.min)).exp()
    weights = powers / powers.sum(dim=-1, keepdim=True).clamp_min(limits.tiny)
    return (weights, None) if sinks is None else (weights[..., :-1], weights[..., -1:])


def spread(chosen: Tensor, places: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Put what belongs to the chosen keys, (…, k), where these are among all: shape (…, width), 0 elsewhere."""
    dense = torch.zeros((*chosen.shape[:-1], width), dtype=dtype, device=chosen.device)
    return dense.scatter_(-1, places, chosen.to(dtype))

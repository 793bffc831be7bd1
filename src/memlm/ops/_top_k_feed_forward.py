"""Feed-forward layers as attention, to the k best hidden units of each input (Gupta et al. 2021, section 3.2).

    s_j = a_j·x + b_j    T = the k largest s_j    y = Σ_{j ∈ T} φ(s_j) (u_j·x + c_j) v_j

Rows a_j of the first matrix are keys, rows v_j of the second are values, and the activation φ stands where attention
has the softmax. The factor u_j·x + c_j is that of gated layers (SwiGLU and its like); others have none. The paper's
models have φ = ReLU, where the highest scores give the largest units; where they do not, T may instead be the k units
that are largest, |φ(s_j) (u_j·x + c_j)|. Inputs are taken a chunk at a time, and what is kept for the gradient is
inputs and the numbers of the chosen units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._top_k_attention import spread

Linear = tuple[Tensor, Tensor | None]  # rows for the hidden units (hidden, width), and their bias (hidden,)


def top_k_feed_forward(
    inputs: Tensor,
    first: Linear,
    values: Tensor,
    k: int,
    *,
    activation: Callable[[Tensor], Tensor],
    factor: Linear | None = None,
    by: Literal["score", "size"] = "score",
    chunk_size: int = 1024,
) -> Tensor:
    """Let every input use its k best hidden units; of equal ones, any.

    Args:
        inputs: Shape (…, width), float.
        first: The matrix a, shape (hidden, width), and the bias b, shape (hidden,) or None.
        values: v, shape (hidden, output width).
        k: Units an input, at least 1; from `hidden` on this is the plain layer.
        activation: φ, number by number.
        factor: u and c of a gated layer, as `first`.
        by: "score" takes the units with the highest scores before the activation, as the paper does; "size" those
            whose values after it, and after the factor, are furthest from 0.
        chunk_size: Inputs that are computed together.

    Returns:
        Shape (…, output width), without the bias of the second matrix. Differentiable once in all tensors. Under
        autocast it has autocast's type.

    Raises:
        ValueError: k or chunk_size is below 1, or `by` is neither.

    Example:
        >>> layer = torch.tensor([[1.0], [2.0]])  # both units see the input; the second is twice the first
        >>> top_k_feed_forward(torch.ones(1, 1), (layer, None), layer, k=1, activation=torch.relu)
        tensor([[4.]])
    """
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k is {k} and chunk_size {chunk_size}; expected at least 1")
    if by not in ("score", "size"):
        raise ValueError(f"by is {by!r}; expected 'score' or 'size'")
    tensors = [inputs.flatten(0, -2), *first, values, *(factor or (None, None))]
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    with torch.autocast(device, enabled=False):
        output = _TopKFeedForward.apply(*tensors, min(k, len(values)), activation, by, chunk_size)
    return output.unflatten(0, inputs.shape[:-1])


class _TopKFeedForward(torch.autograd.Function):
    """Inputs (n, width); the other tensors as above."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        keys: Tensor,
        bias: Tensor | None,
        values: Tensor,
        factors: Tensor | None,
        factor_bias: Tensor | None,
        k: int,
        activation: Callable[[Tensor], Tensor],
        by: Literal["score", "size"],
        chunk_size: int,
    ) -> Tensor:
        outputs, chosen = [], []
        for rows in inputs.split(chunk_size):
            parts = _parts(rows, keys, bias, factors, factor_bias)
            ranks = parts[0] if by == "score" else _units(parts, activation).abs()
            places = ranks.topk(k, sorted=False).indices  # (c, k)
            units = _units([part.gather(-1, places) for part in parts], activation)
            outputs.append(spread(units, places, len(keys), values.dtype) @ values)
            chosen.append(places.int())
        ctx.activation, ctx.chunk_size = activation, chunk_size
        ctx.save_for_backward(inputs, keys, bias, values, factors, factor_bias, *chosen)
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[bad-override]
        inputs, keys, bias, values, factors, factor_bias, *chosen = ctx.saved_tensors
        exact = torch.promote_types(inputs.dtype, torch.float32)  # sums over chunks are not rounded in between
        d_inputs = torch.empty_like(inputs)
        sums = [
            None if tensor is None else torch.zeros_like(tensor, dtype=exact)
            for tensor in (keys, bias, values, factors, factor_bias)
        ]
        chunks = zip(*(tensor.split(ctx.chunk_size) for tensor in (inputs, d_output, d_inputs)), chosen, strict=True)
        for rows, d_rows, d_chunk, numbers in chunks:
            places = numbers.long()
            dense_parts = _parts(rows, keys, bias, factors, factor_bias)
            parts = [part.gather(-1, places).requires_grad_() for part in dense_parts]
            with torch.enable_grad():
                units = _units(parts, ctx.activation)
            d_units = (d_rows @ values.mT).gather(-1, places)
            d_parts = torch.autograd.grad(units, parts, d_units)
            d_dense = [spread(part, places, len(keys), inputs.dtype) for part in d_parts]  # each (c, hidden)
            d_chunk.copy_(sum(part @ rows_of for part, rows_of in zip(d_dense, (keys, factors), strict=False)))
            dense = spread(units.detach(), places, len(keys), values.dtype)
            d_first, d_factor = d_dense[0], d_dense[-1]
            summands = (d_first.mT @ rows, d_first.sum(0), dense.mT @ d_rows, d_factor.mT @ rows, d_factor.sum(0))
            for total, part in zip(sums, summands, strict=True):
                if total is not None:
                    total += part
        totals = [
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, (keys, bias, values, factors, factor_bias), strict=True)
        ]
        return d_inputs, *totals, None, None, None, None


def _parts(
    rows: Tensor, keys: Tensor, bias: Tensor | None, factors: Tensor | None, factor_bias: Tensor | None
) -> list[Tensor]:
    """Return the scores of all units, (c, hidden), and what multiplies them in gated layers."""
    scores = torch.nn.functional.linear(rows, keys, bias)
    return [scores] if factors is None else [scores, torch.nn.functional.linear(rows, factors, factor_bias)]


def _units(parts: list[Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
    units = activation(parts[0])
    return units if len(parts) == 1 else units * parts[1]

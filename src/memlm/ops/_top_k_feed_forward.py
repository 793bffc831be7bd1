"""Feed-forward layers as attention, to the k best hidden units of each input (Gupta et al. 2021, section 3.2).

    s_j = a_j·x + b_j    T = the k largest s_j    y = Σ_{j ∈ T} φ(s_j) (u_j·x + c_j) v_j

Rows a_j of the first matrix are keys, rows v_j of the second are values, and the activation φ stands where attention
has the softmax. The factor u_j·x + c_j is that of gated layers (SwiGLU and its like); others have none. Inputs are
taken a chunk at a time, and what is kept for the gradient is inputs and the numbers of the chosen units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    chunk_size: int = 1024,
) -> Tensor:
    """Let every input use the k hidden units with the highest scores before the activation; of equal ones, any.

    Args:
        inputs: Shape (…, width), float.
        first: The matrix a, shape (hidden, width), and the bias b, shape (hidden,) or None.
        values: v, shape (hidden, output width).
        k: Units an input, at least 1; from `hidden` on this is the plain layer.
        activation: φ, number by number.
        factor: u and c of a gated layer, as `first`.
        chunk_size: Inputs that are computed together.

    Returns:
        Shape (…, output width), without the bias of the second matrix. Differentiable once in all tensors. Under
        autocast it has autocast's type.

    Raises:
        ValueError: k or chunk_size is below 1.

    Example:
        >>> layer = torch.tensor([[1.0], [2.0]])  # both units see the input; the second is twice the first
        >>> top_k_feed_forward(torch.ones(1, 1), (layer, None), layer, k=1, activation=torch.relu)
        tensor([[4.]])
    """
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k is {k} and chunk_size {chunk_size}; expected at least 1")
    tensors = [inputs.flatten(0, -2), *first, values, *(factor or (None, None))]
    device = inputs.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    with torch.autocast(device, enabled=False):
        output = _TopKFeedForward.apply(*tensors, min(k, len(values)), activation, chunk_size)
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
        chunk_size: int,
    ) -> Tensor:
        outputs, chosen = [], []
        for rows in inputs.split(chunk_size):
            best, places = _linear(rows, keys, bias).topk(k, sorted=False)  # (c, k)
            units = activation(best)
            if factors is not None:
                units = units * _linear(rows, factors, factor_bias).gather(-1, places)
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
            scores = [_linear(rows, keys, bias).gather(-1, places)]
            if factors is not None:
                scores.append(_linear(rows, factors, factor_bias).gather(-1, places))
            scores = [score.requires_grad_() for score in scores]
            with torch.enable_grad():
                units = ctx.activation(scores[0])
                units = units * scores[1] if factors is not None else units
            d_units = (d_rows @ values.mT).gather(-1, places)
            d_scores = torch.autograd.grad(units, scores, d_units)
            d_dense = [spread(part, places, len(keys), inputs.dtype) for part in d_scores]  # each (c, hidden)
            d_chunk.copy_(sum(part @ rows_of for part, rows_of in zip(d_dense, (keys, factors), strict=False)))
            dense = spread(units.detach(), places, len(keys), values.dtype)
            d_first, d_factor = d_dense[0], d_dense[-1]
            parts = (d_first.mT @ rows, d_first.sum(0), dense.mT @ d_rows, d_factor.mT @ rows, d_factor.sum(0))
            for total, part in zip(sums, parts, strict=True):
                if total is not None:
                    total += part
        totals = [
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, (keys, bias, values, factors, factor_bias), strict=True)
        ]
        return d_inputs, *totals, None, None, None


def _linear(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(rows, matrix, bias)

"""Top-k feed-forward layers in a Hugging Face decoder: each input uses the hidden units that answer it most."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..errors import ConfigError, UnsupportedArchitecture
from ..models import DecoderLayer, decoder_layers
from ._removable import Removable


class _Parts(NamedTuple):
    """The modules of a feed-forward layer, or None for what it does not have."""

    first: Any
    factor: Any
    second: Any
    activation: Any
    dropout: Any


def top_k_feed_forward(
    model: Any,
    layers: Sequence[int] | None = None,
    *,
    k: int,
    by: Literal["score", "size"] = "score",
    chunk_size: int = 1024,
) -> Removable:
    """Let feed-forward layers of a model use the k best hidden units of each input, in place.

    Modules, weights and their names stay what they are, so the model is trained, saved and loaded as before; after
    loading, call this again.

    Args:
        model: A causal LM of transformers.
        layers: Numbers of decoder layers, from 0; see `decoder_layers`. None means all.
        k: Units an input uses; from the layer's width on, nothing changes but rounding.
        by: Best are the units with the highest "score" before the activation (of gated layers, that of the gate), as in
            the paper, or those of the largest "size" after it, which loses less where the activation is not ReLU.
        chunk_size: Inputs that are computed together.

    Returns:
        What makes the model what it was, by `remove()` or as a block.

    Raises:
        ConfigError: k or chunk_size is below 1, `by` is neither, or a layer that the model does not have, that is named
            twice or has this already, or none.
        UnsupportedArchitecture: A layer has no feed-forward module of two matrices, or three with a gate; experts, say.

    Example:
        >>> from memlm.models import reference_lm
        >>> model = reference_lm().model
        >>> change = top_k_feed_forward(model, [0, 2], k=128)
        >>> change.remove()
    """
    if k < 1 or chunk_size < 1:
        raise ConfigError(f"k is {k} and chunk_size {chunk_size}; expected at least 1")
    if by not in ("score", "size"):
        raise ConfigError(f"by is {by!r}; expected 'score' or 'size'")
    modules = [_feed_forward(layer, model) for layer in _chosen(model, layers)]  # all are checked before one is changed
    replaced = [(module, vars(module).get("forward")) for module in modules]
    for module in modules:
        # on the module itself: a partial of a function is copied with the module, and then refers to the copy
        module.forward = partial(_forward, module, k, by, chunk_size)
    return Removable(partial(_restore, replaced))


def _restore(replaced: list[tuple[Any, Any]]) -> None:
    for module, before in replaced:
        del module.forward
        if before is not None:
            module.forward = before


def _chosen(model: Any, layers: Sequence[int] | None) -> list[DecoderLayer]:
    found = decoder_layers(model)
    numbers = range(len(found)) if layers is None else layers
    if not numbers:
        raise ConfigError("no layer is named; expected at least one")
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"layers are {', '.join(map(str, numbers))}; expected different ones")
    for number in numbers:
        if not 0 <= number < len(found):
            raise ConfigError(f"layer {number} is not in the model; expected numbers from 0 to {len(found) - 1}")
    return [found[number] for number in numbers]


def _feed_forward(layer: DecoderLayer, model: Any) -> Any:
    """Return the feed-forward module of a layer, if top-k with all its units computes what it does."""
    module = getattr(layer.module, layer.feed_forward) if layer.feed_forward else None
    before = vars(module).get("forward") if module is not None else None
    if isinstance(before, partial) and before.func is _forward:
        raise ConfigError(f"{layer.path} has a top-k feed-forward layer already; remove that first")
    parts = None if module is None else _parts(module)
    if module is None or parts is None or not _is_computed_by(module, parts):
        raise UnsupportedArchitecture(
            f"{layer.path} of {type(model).__name__} has no feed-forward module of two matrices, or three with a gate, "
            "that top-k could take the place of; expected a family that has, such as Llama, GPT-2, GPT-NeoX or Qwen"
        )
    return module


def _parts(module: nn.Module) -> _Parts | None:
    """Find the parts by what they are; the matrices are defined in the order of their use, the gate first."""
    children = list(module.children())
    matrices = [child for child in children if isinstance(child, nn.Linear | Conv1D)]
    dropouts = [child for child in children if isinstance(child, nn.Dropout)]
    others = [child for child in children if child not in matrices and child not in dropouts]
    if len(matrices) not in (2, 3) or len(dropouts) > 1 or len(others) != 1:
        return None
    if next(others[0].parameters(), None) is not None:  # an activation that is learned would get no gradient
        return None
    factor = matrices[1] if len(matrices) == 3 else None
    return _Parts(matrices[0], factor, matrices[-1], others[0], dropouts[0] if dropouts else None)


@torch.no_grad()
def _is_computed_by(module: Any, parts: _Parts) -> bool:
    """Say whether, on random inputs, all hidden units together give what the module gives."""
    weight, training = parts.first.weight, module.training
    rows = _rows(parts.first)[0]
    inputs = torch.randn(1, 4, rows.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    module.eval()
    try:
        wanted = module(inputs)
        given = _forward(module, len(rows), "score", 4, inputs)
    except (TypeError, RuntimeError):  # more arguments than the input, or matrices that do not fit together
        return False
    finally:
        module.train(training)
    error = (given - wanted).float().norm() / wanted.float().norm()
    return given.shape == wanted.shape and bool(error < 32 * torch.finfo(weight.dtype).eps)


def _forward(module: nn.Module, k: int, by: Literal["score", "size"], chunk_size: int, hidden: Tensor) -> Tensor:
    """Compute a feed-forward module, hidden and result of shape (…, width), with the k best units."""
    parts: Any = _parts(module)
    first, bias = _rows(parts.first)
    values = _rows(parts.second)[0].T  # (hidden, width)
    factor = None if parts.factor is None else _rows(parts.factor)
    if len(first) == 2 * len(values):  # the gate and what it multiplies are one matrix
        (first, up), (bias, up_bias) = first.chunk(2), (None, None) if bias is None else bias.chunk(2)
        factor = (up, up_bias)
    output = ops.top_k_feed_forward(
        hidden, (first, bias), values, k, activation=parts.activation, factor=factor, by=by, chunk_size=chunk_size
    )
    if parts.second.bias is not None:
        output = output + parts.second.bias.to(output.dtype)
    return output if parts.dropout is None else parts.dropout(output)


def _rows(matrix: Any) -> tuple[Tensor, Tensor | None]:
    """Return a matrix as nn.Linear has it, (outputs, inputs), and its bias."""
    return (matrix.weight.T if isinstance(matrix, Conv1D) else matrix.weight), matrix.bias

"""Top-k attention as an attention implementation of transformers, for every model that lets its attention be chosen."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .. import ops
from ..errors import ConfigError, ModelError, UnsupportedArchitecture
from ._removable import Removable

# what some models hand to their attention that would change the result, and has no place in top-k attention
_REFUSED = {
    "position_bias": "it has learned position biases",
    "block_indices": "it chooses blocks of keys itself",
    "sinks": "its sinks depend on the query",
    "cache": "it is in continuous batching, with a paged cache",
}


def register_top_k(k: int = 128, *, name: str = "memlm_topk", chunk_size: int = 128) -> str:
    """Make `attn_implementation=name` mean top-k attention, in `from_pretrained` and `set_attn_implementation`.

    Importing memlm registers nothing; this does, for the process: the attention itself, and how its mask is made, as a
    model hands no mask at all to an attention that has no mask function. Another name gives another k beside it; the
    same name again changes k for models that have it. Caps of scores, sinks, sliding windows, shared key heads, padding
    and caches are honored. There are no attention weights to return: `output_attentions` is refused.

    Of models that compute attention by themselves, some are refused at their first call (`UnsupportedArchitecture`),
    and some by transformers when they are made (a KeyError of the name); `top_k_attention` refuses them all.

    Args:
        k: Keys a query attends to, at least 1.
        name: What it is called.
        chunk_size: Queries that are computed together.

    Returns:
        The name.

    Raises:
        ConfigError: k or chunk_size is below 1, or the name is that of another implementation.

    Example:
        >>> register_top_k(64)
        'memlm_topk'
    """
    if k < 1 or chunk_size < 1:
        raise ConfigError(f"k is {k} and chunk_size {chunk_size}; expected at least 1")
    present = AttentionInterface().get(name)
    if name == "eager" or (present is not None and getattr(present, "func", None) is not _attend):
        raise ConfigError(f"{name!r} is another attention implementation of transformers; choose another name")
    AttentionInterface.register(name, partial(_attend, k=k, chunk_size=chunk_size))
    AttentionMaskInterface.register(name, _visible)
    return name


def top_k_attention(model: Any, k: int = 128, *, chunk_size: int = 128) -> Removable:
    """Let a model attend to the k best keys of each query, in all its attention layers, in place.

    Args:
        model: A model of transformers; it keeps its weights, and needs no training for it.
        k: Keys a query attends to; from the length of the text on, nothing changes but rounding.
        chunk_size: Queries that are computed together.

    Returns:
        What makes the model what it was, by `remove()` or as a block.

    Raises:
        ConfigError: k or chunk_size is below 1, or the model has top-k attention already.
        UnsupportedArchitecture: The model does not let its attention be chosen.

    Example:
        >>> from memlm.models import reference_lm
        >>> model = reference_lm().model
        >>> with top_k_attention(model, k=32):
        ...     model.config._attn_implementation
        'memlm_topk_32_128'
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = model.config._attn_implementation
    if getattr(AttentionInterface().get(before), "func", None) is _attend:
        raise ConfigError(f"{type(model).__name__} has top-k attention already ({before!r}); remove it first")
    _check(type(model))
    model.set_attn_implementation(register_top_k(k, name=f"memlm_topk_{k}_{chunk_size}", chunk_size=chunk_size))
    return Removable(partial(model.set_attn_implementation, before))


def _check(model_class: type) -> None:
    if not model_class._can_set_attn_implementation():  # type: ignore[missing-attribute]
        raise UnsupportedArchitecture(
            f"{model_class.__name__} computes attention by itself and not through transformers' AttentionInterface, so "
            "top-k attention cannot take its place; use a family that does, such as Llama, GPT-2, GPT-NeoX or Qwen"
        )


def _visible(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """Return which keys the queries may see, as bool; None where `_attend` knows, as for `sdpa`."""
    # some models ask for a mask and then compute attention by themselves: this is the only place that sees them
    model_class = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, type):
        _check(model_class)
    return sdpa_mask(*args, **kwargs)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    k: int,
    chunk_size: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks for it: (batch, heads, n, width) in, (batch, n, heads, width) out, and no weights."""
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedArchitecture(f"{type(module).__name__}: {reason}; use another attn_implementation")
    if kwargs.get("output_attentions"):
        raise ModelError(
            "top-k attention has no attention weights to return; use attn_implementation='eager' for those"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    output = ops.top_k_attention(
        query,
        key,
        value,
        k,
        scale=scaling,
        mask=attention_mask,
        # without a mask, one query is the last; of several, the first sees the first key alone, as `sdpa` has it
        causal=bool(is_causal) and attention_mask is None and query.shape[2] > 1,
        cap=softcap,
        sinks=s_aux,
        dropout=dropout,
        chunk_size=chunk_size,
    )
    return output.transpose(1, 2).contiguous(), None

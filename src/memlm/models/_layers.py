"""The layers of a decoder, and which of a layer's modules are its attention and its feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitecture

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
FEED_FORWARD_NAMES = ("mlp", "ffn", "feed_forward", "block_sparse_moe")


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer of a decoder.

    Attributes:
        index: Its number, from 0 at the embedding.
        path: Its dotted path, from the top-level model.
        module: The layer.
        attention: Name of the attribute that is its attention, or None.
        feed_forward: Name of the attribute that is its feed-forward, or None (OPT has two linear maps and no module).
    """

    index: int
    path: str
    module: nn.Module
    attention: str | None
    feed_forward: str | None


def decoder_layers(model: Any) -> list[DecoderLayer]:
    """List the layers of a causal language model, from the embedding up; a PEFT model is looked through.

    Raises:
        UnsupportedArchitecture: The model has no decoder below its head, or that has no list of layers.
    """
    layers = find_layers(model)
    if layers is None:
        raise UnsupportedArchitecture(f"{type(model).__name__} has no list of layers below its head")
    path = path_of(model, layers)
    return [
        DecoderLayer(
            index,
            f"{path}.{index}",
            layer,
            _first(layer, _ATTENTION_NAMES),
            _first(layer, FEED_FORWARD_NAMES),
        )
        for index, layer in enumerate(layers)
    ]


def find_layers(model: Any) -> nn.ModuleList | None:
    """Return the list that holds a decoder's layers, the longest that is in no other; None if there is no list."""
    decoder = find_decoder(model)
    stacks = {path: item for path, item in decoder.named_modules() if isinstance(item, nn.ModuleList) and len(item)}
    # a list inside another is one of experts, and may be longer than that of the layers
    inner = {path for path in stacks for other in stacks if path.startswith(f"{other}.")}
    return max((stacks[path] for path in stacks if path not in inner), key=len, default=None)


def find_decoder(model: Any) -> nn.Module:
    """Return the part of a causal LM below its output embedding."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if decoder is None or decoder is base:
        decoder = getattr(base, base.base_model_prefix, None)
    if decoder is None or decoder is base:
        raise UnsupportedArchitecture(f"{type(model).__name__} is not a causal LM with a decoder below its head")
    return decoder


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Return the dotted path of a module."""
    return next(path for path, candidate in model.named_modules() if candidate is module)


def _first(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(layer, name, None), nn.Module)), None)

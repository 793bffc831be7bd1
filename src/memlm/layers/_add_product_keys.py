"""Memories of product keys in a Hugging Face decoder: in the place of feed-forward layers, or beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ..errors import ConfigError, ModelError, UnsupportedArchitecture
from ..models import DecoderLayer, decoder_layers
from ._around import Around, modules_around
from ._product_keys import ProductKeyMemory, ProductKeySettings

Placement = Literal["beside", "replace"]


def add_product_keys(
    model: Any, layers: Sequence[int], settings: ProductKeySettings, *, placement: Placement = "beside"
) -> dict[int, ProductKeyMemory]:
    """Give layers of a model a memory of product keys, in place.

    Args:
        model: A causal LM of transformers.
        layers: Numbers of decoder layers, from 0; see `decoder_layers`.
        settings: Shape of each memory.
        placement: "beside" adds what the memory gives to what the feed-forward layer gives, at first nothing: the
            logits stay exactly as they were. "replace" puts the memory in the layer's place, as in the paper; the layer
            is kept for `remove_product_keys`, outside of the model's parameters and state.

    Returns:
        The new memories by layer, in the type and on the device of the layer's parameters.

    Raises:
        ConfigError: A layer that the model does not have, that is named twice or has a memory already, or none.
        UnsupportedArchitecture: No feed-forward module to stand beside, or experts that would be replaced.

    Example:
        >>> from memlm.models import reference_lm
        >>> model = reference_lm().model
        >>> print(*add_product_keys(model, [3], ProductKeySettings(sub_keys=8)))
        3
    """
    if placement not in get_args(Placement):
        raise ConfigError(f"placement is {placement!r}; expected one of {', '.join(get_args(Placement))}")
    found = decoder_layers(model)
    chosen = [_choose(found, number, model) for number in layers]
    if not chosen:
        raise ConfigError("no layer is named; expected at least one")
    if len(set(layers)) < len(chosen):
        raise ConfigError(f"layers are {', '.join(map(str, layers))}; expected different ones")
    for layer in chosen:
        _check(layer, placement)
    width = model.config.get_text_config().hidden_size
    memories = {}
    for layer in chosen:
        feed_forward, memory = _feed_forward(layer), ProductKeyMemory(width, settings)
        memory.to(next(feed_forward.parameters())).train(feed_forward.training)
        wrapper: nn.Module
        if placement == "beside":
            memory.silence()
            wrapper = BesideFeedForward(feed_forward, memory)
        else:
            wrapper = InPlaceOfFeedForward(feed_forward, memory)
        setattr(layer.module, str(layer.feed_forward), wrapper)
        memories[layer.index] = memory
    return memories


def remove_product_keys(model: Any) -> None:
    """Take all memories of product keys out of a model, and put its own feed-forward layers back as they are now.

    Raises:
        ModelError: The model has none.
    """
    around = [item for layer in decoder_layers(model) for item in modules_around(layer)]
    changed = [(put, module) for put, module in around if isinstance(module, BesideFeedForward | InPlaceOfFeedForward)]
    if not changed:
        raise ModelError(f"{type(model).__name__} has no memory of product keys; nothing to remove")
    for put, wrapper in changed:
        put(wrapper.kept())


def changed_layers(model: Any) -> Iterator[tuple[DecoderLayer, BesideFeedForward | InPlaceOfFeedForward]]:
    """Yield the layers that have a memory of product keys, with the module in the place of the feed-forward layer."""
    for layer in decoder_layers(model):
        for _, module in modules_around(layer):
            if isinstance(module, BesideFeedForward | InPlaceOfFeedForward):
                yield layer, module


class BesideFeedForward(Around):
    """A feed-forward layer and a memory, added up. In the state it has the names of the layer, and `product_keys`."""

    placement: Placement = "beside"

    def __init__(self, feed_forward: nn.Module, memory: ProductKeyMemory) -> None:
        """Put a memory beside a layer."""
        super().__init__()
        self.feed_forward = feed_forward
        self.product_keys = memory
        self.train(feed_forward.training)
        # so that the model's own weights are saved and loaded under the names that they always had
        self.register_state_dict_post_hook(_leave_out_name)
        self.register_load_state_dict_pre_hook(_put_in_name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns, with the memory's part; hidden has shape (…, width)."""
        output, memory = self.feed_forward(hidden, *args, **kwargs), self.product_keys(hidden)
        if isinstance(output, tuple):  # experts that tell their router's scores
            return (output[0] + memory.view_as(output[0]), *output[1:])
        return output + memory.view_as(output)

    def kept(self) -> nn.Module:
        """Return the feed-forward layer."""
        return self.feed_forward

    def keep(self, module: nn.Module) -> None:
        """Stand beside another one."""
        self.feed_forward = module


class InPlaceOfFeedForward(Around):
    """A memory where a feed-forward layer was."""

    placement: Placement = "replace"

    def __init__(self, feed_forward: nn.Module, memory: ProductKeyMemory) -> None:
        """Put a memory in the place of a layer."""
        super().__init__()
        self.product_keys = memory
        self.train(feed_forward.training)
        self._replaced = [feed_forward]  # in a list, where its parameters are not the model's

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return what the memory gives, of shape (…, width); in some families the layer adds the residual itself."""
        output = self.product_keys(hidden)
        return output if residual is None else output + residual

    def kept(self) -> nn.Module:
        """Return the feed-forward layer, on the memory's device and in its mode."""
        return self._replaced[0].to(self.product_keys.values.device).train(self.training)

    def keep(self, module: nn.Module) -> None:
        """Stand in the place of another one."""
        self._replaced[0] = module

    def _apply(self, fn: Any, recurse: bool = True) -> InPlaceOfFeedForward:
        """Let the layer follow where the model's type changes, so that it fits when it is put back."""
        self._replaced[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _leave_out_name(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}feed_forward.")]:
        state[prefix + name.removeprefix(f"{prefix}feed_forward.")] = state.pop(name)


def _put_in_name(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    names = [name for name in state if name.startswith(prefix) and not name.startswith(f"{prefix}product_keys.")]
    for name in names:
        state[f"{prefix}feed_forward.{name.removeprefix(prefix)}"] = state.pop(name)


def _feed_forward(layer: DecoderLayer) -> Any:
    return getattr(layer.module, layer.feed_forward) if layer.feed_forward else None


def _choose(layers: list[DecoderLayer], number: int, model: Any) -> DecoderLayer:
    if not 0 <= number < len(layers):
        raise ConfigError(f"{type(model).__name__} has no layer {number}; expected 0 to {len(layers) - 1}")
    return layers[number]


def _check(layer: DecoderLayer, placement: Placement) -> None:
    feed_forward = _feed_forward(layer)
    if feed_forward is None:
        raise UnsupportedArchitecture(
            f"the feed-forward of {layer.path} is no module of its own; product keys cannot stand there"
        )
    for _, module in modules_around(layer):
        if isinstance(module, BesideFeedForward | InPlaceOfFeedForward):
            raise ConfigError(f"layer {layer.index} has a memory of product keys already; take it out first")
        feed_forward = module.kept()
    if placement == "replace" and hasattr(feed_forward, "experts"):
        raise UnsupportedArchitecture(
            f"the feed-forward of {layer.path} is a mixture of experts, whose router others listen to; expected "
            'placement="beside"'
        )

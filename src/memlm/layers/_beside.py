"""Surgery: a module beside the feed-forward of one layer, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, ModelError, UnsupportedArchitecture
from ..models import DecoderLayer, decoder_layers, find_decoder
from ._around import Around, modules_around
from ._reader import RowReader


class Beside(Around):
    """A feed-forward whose output has another module's added, which sees the same input.

    Args:
        inner: The feed-forward.
        added: Maps its input to what is added.
    """

    def __init__(self, inner: nn.Module, added: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.added = added
        self.train(inner.training)
        # the model's own weights keep their names in its state, and so in what it saves
        self.register_state_dict_post_hook(_shorten)
        self.register_load_state_dict_pre_hook(_lengthen)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the feed-forward does, with what is added to its first tensor."""
        output = self.inner(hidden, *args, **kwargs)
        if isinstance(output, tuple):  # experts return their routing, too
            return (output[0] + self.added(hidden).reshape(output[0].shape), *output[1:])
        return output + self.added(hidden)

    def kept(self) -> nn.Module:
        """Return the feed-forward."""
        return self.inner

    def keep(self, module: nn.Module) -> None:
        """Stand beside another one."""
        self.inner = module


def _shorten(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    inner = f"{prefix}inner."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _lengthen(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    added = f"{prefix}added."
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(added)]:
        state[f"{prefix}inner.{name.removeprefix(prefix)}"] = state.pop(name)


def put_beside(model: Any, layer: int, added: nn.Module) -> None:
    """Put a module beside the feed-forward of a layer, in place.

    Args:
        model: A Hugging Face causal LM.
        layer: Its number from 0; negative from the last.
        added: What is put there; it goes to the layer's device.

    Raises:
        ConfigError: There is no such layer, or something is beside its feed-forward already.
        UnsupportedArchitecture: The layer has no feed-forward module.
    """
    found = feed_forward_of(model, layer)
    inner = getattr(found.module, str(found.feed_forward))
    for _, module in modules_around(found):
        if isinstance(module, Beside):
            raise ConfigError(
                f"{found.path} has a {type(module.added).__name__} already; remove it first, or name another layer"
            )
    added.to(next(inner.parameters()).device)
    setattr(found.module, str(found.feed_forward), Beside(inner, added))


def remove_beside(model: Any, added: nn.Module) -> None:
    """Undo `put_beside`: the model is bit for bit what it was."""
    for layer in decoder_layers(model):
        for put, module in modules_around(layer):
            if isinstance(module, Beside) and module.added is added:
                put(module.inner)
                if getattr(added, "hook", None) is not None:
                    added.hook.remove()  # type: ignore[union-attr]
                return
    raise ModelError(
        f"the {type(added).__name__} is beside no layer of this {type(model).__name__}; it was removed already"
    )


def feed_forward_of(model: Any, layer: int) -> DecoderLayer:
    """Return the layer of a number, which has a feed-forward module."""
    layers = decoder_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise ConfigError(f"layer is {layer}; expected one of the {len(layers)} layers, 0 to {len(layers) - 1}")
    found = layers[layer]
    if found.feed_forward is None:
        raise UnsupportedArchitecture(
            f"{found.path} of {type(model).__name__} has no feed-forward module of its own; expected one of the "
            "families whose layers do, such as Llama, GPT-2, GPT-NeoX or Qwen"
        )
    return found


def add_row_reader(model: Any, layer: int, **settings: Any) -> RowReader:
    """Put a new `RowReader` beside the feed-forward of a layer, in place; it adds nothing before it is trained.

    Args:
        model: A Hugging Face causal LM.
        layer: Its number from 0; negative from the last. A layer about a third of the way up finds facts best.
        **settings: Of `RowReader`: key_width, value_width, top_k, window.
    """
    width = model.get_input_embeddings().weight.shape[1]
    hidden = model.config.get_text_config().hidden_size
    reader = RowReader(hidden, width, **settings)
    put_beside(model, layer, reader)
    if reader.window > 1:
        # a method of the reader: in a copy of the model it is that of the copy's reader
        reader.hook = find_decoder(model).register_forward_pre_hook(reader.look, with_kwargs=True)
    return reader

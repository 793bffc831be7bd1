"""Give attention layers of a Hugging Face decoder a memory, and take it away again.

An attention layer computes its queries, keys and values, rotates them, and hands them to the attention function that
its configuration names. Memory keeps keys un-rotated, so a hook before the layer hands it a rotation by nothing and no
cache, and a copy of its configuration names a function of ours, which rotates, updates the cache, calls the model's own
attention function, and joins what memory found. The layer's modules and their names stay what they are.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ConfigError, ModelError, ShapeError, UnsupportedArchitecture
from ..models import decoder_layers, find_decoder
from ._memory_attention import AttentionMemory, Local
from ._memory_settings import AttentionMemorySettings
from ._ring import Ring
from ._rotary import Rotary, apply_function, rotated

_FUNCTION = "memlm_memory"
_CACHES = ("past_key_values", "layer_past", "past_key_value")


class _Call(NamedTuple):
    """One pass through one attention layer."""

    memory: AttentionMemory
    config: Any
    hidden: Tensor
    rotation: tuple[Tensor, Tensor] | None
    cache: Any


class _Wrapped(NamedTuple):
    """An attention layer, the configuration that it had, and the hook before it."""

    attention: Any
    config: Any
    hook: RemovableHandle


class AttentionMemories:
    """The memories of a model's layers; `memorize` makes it.

    A row of a batch is one text that goes on from pass to pass. Every pass reads what passes before it left, and leaves
    its own tokens for the next. With padding, pass the attention mask: what it leaves out is not remembered.

    Attributes:
        model: The model.
        settings: Of all its memories.
        memories: By layer number.
    """

    def __init__(self, model: Any, settings: AttentionMemorySettings) -> None:
        self.model, self.settings = model, settings
        self.memories: dict[int, AttentionMemory] = {}
        self._shapes: dict[int, tuple[int, int]] = {}  # key heads and their width
        self._wrapped: list[_Wrapped] = []
        self._decoder: Any = find_decoder(model)
        self._decoder._memlm_memory = self  # type: ignore[bad-argument-type]
        self._hook = self._decoder.register_forward_pre_hook(self._begin, with_kwargs=True)

    def reset(self, rows: Tensor | Sequence[bool] | None = None) -> None:
        """Forget rows that begin another document; call it before the pass that reads their beginning.

        Args:
            rows: Bool, shape (rows,), or row numbers; None forgets all, and a batch may then have other rows.

        Raises:
            ShapeError: They are not those of the memory.
        """
        chosen = None if rows is None else torch.as_tensor(rows)
        for memory in self.memories.values():
            memory.remember()
            memory.store.reset(chosen)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Remember nothing of passes inside the block.

        A batch may then have several rows for each row of memory, one after the other, as `generate` makes them for
        beams and for several samples.
        """
        before = [memory.writes for memory in self.memories.values()]
        for memory in self.memories.values():
            memory.remember()
            memory.writes = False
        try:
            yield
        finally:
            for memory, writes in zip(self.memories.values(), before, strict=True):
                memory.writes = writes

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Put the memories aside: the block begins with empty ones, and after it the old are back."""
        kept = []
        for memory in self.memories.values():
            memory.remember()
            kept.append(memory.store)
            memory.store = Ring(self.settings.size, self.settings.device)
        try:
            yield
        finally:
            for memory, store in zip(self.memories.values(), kept, strict=True):
                memory.remember()
                memory.store = store

    @contextmanager
    def reading_from(self, order: Tensor | Sequence[int]) -> Iterator[None]:
        """Let row r read the memory of row order[r] inside the block: a control, that shows what memory is worth."""
        for memory in self.memories.values():
            memory.order = torch.as_tensor(order)
        try:
            yield
        finally:
            for memory in self.memories.values():
                memory.order = None

    def parameters(self) -> list[nn.Parameter]:
        """Return what was added to be learned; nothing with the joint softmax and the settings otherwise untouched."""
        return [parameter for memory in self.memories.values() for parameter in memory.parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is remembered, the last pass included, by layer: the buffers themselves, not copies."""
        state = {}
        for number, memory in self.memories.items():
            memory.remember()
            state |= {f"{number}.{name}": tensor for name, tensor in memory.store.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Remember what `state_dict` gave.

        Raises:
            ShapeError: It is of memories of another size, or of another model's.
        """
        layers = {name.split(".", 1)[0] for name in state}
        if not layers <= {str(number) for number in self.memories}:
            raise ShapeError(
                f"the state is of layers {', '.join(sorted(layers))}; the memories are of layers "
                f"{', '.join(map(str, self.memories))}"
            )
        for number, shape in self._shapes.items():
            keys = state.get(f"{number}.keys")
            if keys is not None and keys.shape[1::2] != shape:
                raise ShapeError(f"keys have shape {tuple(keys.shape)}; layer {number} has heads and widths {shape}")
        for number, memory in self.memories.items():
            own = {name.split(".", 1)[1]: tensor for name, tensor in state.items() if name.startswith(f"{number}.")}
            memory.remember()
            memory.store.load_state_dict(own)

    def remove(self) -> None:
        """Make the model what it was, bit for bit."""
        for attention, config, hook in self._wrapped:
            hook.remove()
            attention.config = config
            del attention.memory
        self._wrapped.clear()
        self._hook.remove()
        if getattr(self._decoder, "_memlm_memory", None) is self:
            del self._decoder._memlm_memory

    def _add(self, number: int, attention: Any) -> None:
        """Give one attention layer its memory."""
        signature = inspect.signature(attention.forward)
        open_ended = any(item.kind == item.VAR_KEYWORD for item in signature.parameters.values())
        if not open_ended or not hasattr(attention, "config"):
            raise UnsupportedArchitecture(f"{type(attention).__name__} takes no memory: it computes attention itself")
        config = attention.config
        rotary = None
        if self.settings.positions != "none":
            tables = getattr(self._decoder, "rotary_emb", None)
            if tables is None or apply_function(attention) is None:
                raise ConfigError(
                    f"positions is {self.settings.positions!r}; {type(self.model).__name__} has no rotary positions, "
                    "which leaves 'none'"
                )
            rotary = Rotary(tables, attention)
        heads = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        memory = AttentionMemory(self.settings, heads, config.hidden_size, head_width, rotary)
        weight = next(attention.parameters())
        attention.memory = memory.to(device=weight.device, dtype=weight.dtype)
        self.memories[number] = memory
        self._shapes[number] = (getattr(config, "num_key_value_heads", None) or heads, head_width)
        attention.config = copy.copy(config)
        attention.config._attn_implementation = _FUNCTION

        def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            given = dict(zip(signature.parameters, args, strict=False)) | kwargs
            rotation, cache = given.get("position_embeddings"), None
            for name in _CACHES:
                cache = given.pop(name, None) if cache is None else cache
            if rotation is not None:
                given["position_embeddings"] = (torch.ones_like(rotation[0]), torch.zeros_like(rotation[1]))
            call = _Call(module.memory, config, given["hidden_states"], rotation, cache)  # type: ignore
            return (), given | {"memlm_call": call}

        hook = attention.register_forward_pre_hook(prepare, with_kwargs=True)
        self._wrapped.append(_Wrapped(attention, config, hook))

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the decoder: what the last pass left is remembered now."""
        given = dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)) | kwargs
        text = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        mask = given.get("attention_mask")
        known = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            known = mask[:, -text.shape[1] :].bool()
            known = known.expand(text.shape[0], -1) if len(known) == 1 else known  # one mask for all rows
        for memory in self.memories.values():
            memory.begin(known)
        if known is None and mask is not None and any(memory.writes for memory in self.memories.values()):
            raise ModelError(
                "attention_mask does not say which tokens are padding; pass one of shape (batch, tokens), or run the "
                "model inside `with memory.read_only():`"
            )


def memorize(model: Any, layers: Sequence[int] = (-1,), **settings: Any) -> AttentionMemories:
    """Give attention layers a memory (Wu et al. 2022, arXiv:2203.08913); the model is changed in place.

    With an empty memory the model computes what it did, bit for bit, unless `normalize` says otherwise.

    Args:
        model: A causal LM with rotary or learned positions, whose attention goes through transformers' attention
            interface: Llama, GPT-2, GPT-NeoX, Qwen and the like.
        layers: Their numbers, from 0 at the embedding, or from −1 at the end.
        settings: Of `AttentionMemorySettings`.

    Returns:
        The memories, to be reset, saved and removed.

    Raises:
        ConfigError: A setting cannot work, or a layer does not exist or is named twice.
        ModelError: The model has a memory already.
        UnsupportedArchitecture: Its attention cannot be given one.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...     num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> memory = memorize(model, layers=[1], size=64, top_k=4)
        >>> for segment in torch.arange(8).view(2, 1, 4):
        ...     logits = model(segment).logits
        >>> memory.reset()
        >>> forget(model)
    """
    chosen = AttentionMemorySettings(**settings)
    if hasattr(find_decoder(model), "_memlm_memory"):
        raise ModelError("this model has a memory already; forget(model) removes it")
    found = decoder_layers(model)
    attentions = {}
    for number in _numbers(layers, len(found)):
        layer = found[number]
        if layer.attention is None:
            raise UnsupportedArchitecture(f"layer {number} of {type(model).__name__} has no attention module")
        attentions[number] = getattr(layer.module, layer.attention)
    ALL_ATTENTION_FUNCTIONS.register(_FUNCTION, _attend)
    _check(model, attentions)
    return _added(model, chosen, attentions)


def forget(model: Any) -> None:
    """Take the memory of a model away: it is what it was before `memorize`, bit for bit.

    Raises:
        ModelError: It has none.
    """
    memory_of(model).remove()


def memory_of(model: Any) -> AttentionMemories:
    """Return the memories that `memorize` gave a model.

    Raises:
        ModelError: It has none.
    """
    memories = getattr(find_decoder(model), "_memlm_memory", None)
    if memories is None:
        raise ModelError("this model has no attention memory; memorize(model) gives it one")
    return memories


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    memlm_call: _Call,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention function of transformers: local attention as the model computes it, joined by what memory has.

    Args:
        module: The attention layer.
        query: Un-rotated, shape (batch, heads, tokens, d).
        key: Un-rotated, shape (batch, key heads, tokens, d).
        value: Of the same shape.
        attention_mask: As the model made it.
        memlm_call: What the hook before the layer kept.
        scaling: Of products.
        dropout: Of attention weights.
        kwargs: For the model's own attention function.
    """
    memory, config, hidden, rotation, cache = memlm_call
    if kwargs.get("s_aux") is not None:
        raise UnsupportedArchitecture(f"{type(module).__name__} has attention sinks, which memory does not know")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 4):
        raise ModelError(
            f"attention {config._attn_implementation!r} hides which keys are seen; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    own = memory.own_queries(query, hidden, scale)
    local_query, key = memory.normalized(query, key, scale)
    local_key, local_value = key, value
    if rotation is not None and getattr(module, "use_rope", True):  # some families have layers without positions
        local_query, local_key = rotated(apply_function(module), local_query, local_key, *rotation)
    memory.follow(cache, getattr(module, "layer_idx", 0), query.shape[2])
    if cache is not None:
        local_key, local_value = cache.update(local_key, value, module.layer_idx)
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    output, weights = function(
        module, local_query, local_key, local_value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    local = Local(output, local_query, local_key, attention_mask, scale, kwargs.get("softcap"), dropout)
    joined = memory.join(local, own)
    memory.leave(key, value)
    return joined, weights


def _added(model: Any, settings: AttentionMemorySettings, attentions: dict[int, Any]) -> AttentionMemories:
    memories = AttentionMemories(model, settings)
    try:
        for number, attention in attentions.items():
            memories._add(number, attention)
    except BaseException:
        memories.remove()
        raise
    return memories


def _check(model: Any, attentions: dict[int, Any]) -> None:
    """Raise unless the model computes with an empty memory what it does without one."""
    before = _probe(model)
    memories = _added(model, AttentionMemorySettings(size=1), attentions)
    try:
        after = _probe(model)
        reached = all(memory.waits for memory in memories.memories.values())
    finally:
        memories.remove()
    if not reached or not torch.allclose(before, after, rtol=1e-3, atol=1e-3):
        raise UnsupportedArchitecture(
            f"{type(model).__name__} computes attention or positions in a way that is not known here: with an empty "
            "memory it would not be what it was"
        )


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Run the model on a few tokens; return its last states."""
    decoder = find_decoder(model)
    training = [module for module in decoder.modules() if module.training]
    decoder.eval()
    try:
        return decoder(input_ids=torch.arange(1, 7, device=model.device)[None], use_cache=False)[0].float()
    finally:
        for module in training:
            module.training = True


def _numbers(layers: Sequence[int], count: int) -> list[int]:
    numbers = []
    for layer in layers:
        if not -count <= layer < count:
            raise ConfigError(f"there is no layer {layer}; the model has {count}, 0 to {count - 1}")
        numbers.append(layer % count)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"layers are {list(layers)}; expected different ones, at least one")
    return numbers

"""Attach memories to a model: every transformers call inside the block sees the mixture."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..cache import Cache
from ..errors import ModelError
from ..evidence import Belief, Evidence, Found, OutputEmbedding
from ..text import count
from ._capture import Captured, capture, check_key_site, keys_of
from ._identity import encoder_fingerprint
from ._layers import find_decoder
from ._output import CapturedHidden, capture_hidden, output_embedding
from ._past import Past, past_of
from ._sites import KeySite, find_key_site

_FOUND_TOGETHER = 1 << 23  # entries, for all positions that are mixed at once


class Datastore(Protocol):
    """What `attach` needs of a datastore."""

    manifest: Any
    metric: Any

    def lookup(self, queries: Any, k: int) -> Found:
        """Return the neighbors with their values."""
        ...


class Mixture(Protocol):
    """What `attach` needs of a mixture."""

    needs_belief: Any
    needs_text: Any
    needs_hidden: Any
    skips: Any

    @property
    def ks(self) -> tuple[int, ...]:
        """Neighbors asked of each memory."""
        ...

    def check_memories(self, memories: Sequence[Any]) -> None:
        """Raise unless the memories are of the kinds and lengths that the mixture is for."""
        ...

    def wanted(self, belief: Belief) -> Tensor | None:
        """Say for which targets datastores are to be searched."""
        ...

    def log_probs(self, lm_log_probs: Tensor, evidence: Evidence) -> Tensor:
        """Return the mixture's log probabilities, shape (n, vocabulary)."""
        ...


@contextmanager
def attach(model: Any, memory: Any, mixture: Mixture) -> Iterator[Any]:
    """Mix memories into everything that the model computes inside the block.

    At every position that the model keeps logits for, they are replaced by the log probabilities of the mixture, in
    float32; so `generate` (greedy, sampling, beams, assisted, chunked prefill), pipelines and evaluation harnesses work
    unchanged, and a user's temperature acts on the mixture. With `labels`, the loss is the mixture's. Leaving the block
    restores the model bit for bit.

    A `Cache` remembers what was read inside the block. Its keys travel as one more layer of the model's own
    `past_key_values`, so they follow beams and crops. Beside a datastore it reads keys at the datastore's key site,
    otherwise at that of the `LanguageModel` that was made of the model last, as `evaluate` does.

    Args:
        model: A Hugging Face causal LM: the one whose keys the datastores hold.
        memory: A `Datastore`, a `Cache`, or a list of those.
        mixture: A mixture for as many memories.

    Yields:
        The same model.

    Raises:
        ConfigError: A cache remembers less than the mixture looks at.
        DatastoreMismatch: A datastore holds another model's keys, or a memory is not of the kind that the mixture is
            for.
        ModelError: A memory is attached already, the key site is not reached, or the mixture is for another number of
            memories.
    """
    if getattr(model, "_memlm_attached", False):
        raise ModelError("a memory is attached to this model already; leave that block first")
    memories = list(memory) if isinstance(memory, list | tuple) else [memory]
    if len(memories) != len(mixture.ks):
        asked = count(len(mixture.ks), "memory", "memories")
        raise ModelError(f"the mixture is for {asked}, {len(memories)} are given; pass one for each")
    site = _common_site(model, memories)
    mixture.check_memories(memories)
    check_key_site(model, site)

    layer = output_embedding(model) if mixture.needs_hidden else None
    with capture(model, site) as captured, capture_hidden(model, layer is not None) as last:
        attached = _Attached(site, captured, memories, mixture, layer, last)
        hook = model.register_forward_hook(
            lambda module, args, kwargs, output: _mix(module, args, kwargs, output, attached), with_kwargs=True
        )
        model._memlm_attached = True
        try:
            yield model
        finally:
            del model._memlm_attached
            hook.remove()


def _common_site(model: Any, memories: list[Any]) -> KeySite:
    """Return where all memories read keys: where the datastores do, or where the `LanguageModel` does."""
    sites = []
    for memory in memories:
        if not isinstance(memory, Cache):
            if not hasattr(memory, "manifest"):  # pointers need to know which token came: they are for scoring
                raise ModelError(f"a memory is {memory!r}; expected a Datastore or a Cache")
            described = memory.manifest.encoder
            memory.manifest.check_encoder(type(model).__name__, encoder_fingerprint(find_decoder(model)))
            site = described["key_site"]
            sites.append(KeySite(site["name"], site["path"], site["tensor"]))
    if len(set(sites)) > 1:
        raise ModelError(f"the datastores read keys at different sites: {sites}; build them with the same --key-site")
    return sites[0] if sites else getattr(model, "_memlm_site", None) or find_key_site(model, None)


class _Attached(NamedTuple):
    """What is attached to a model, and where its last forward pass is read."""

    site: KeySite
    captured: Captured
    memories: list[Any]
    mixture: Mixture
    layer: OutputEmbedding | None
    last: CapturedHidden


def _mix(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, attached: _Attached) -> Any:
    """Forward hook of the top-level model: put the mixture in the place of the logits."""
    site, memories, mixture = attached.site, attached.memories, attached.mixture
    if args:
        kwargs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    as_tuple = isinstance(output, tuple)
    labels = kwargs.get("labels")
    # in a tuple the logits come after the losses, which are single numbers
    place = next(place for place, item in enumerate(output) if item.ndim) if as_tuple else 0
    logits = output[place] if as_tuple else output.logits  # (batch, kept, vocabulary)
    tokens = kwargs.get("input_ids")
    width = tokens.shape[1] if tokens is not None else kwargs["inputs_embeds"].shape[1]
    all_keys = keys_of(attached.captured, site, logits.shape[0], width).detach()
    kept = _kept(torch.arange(width), kwargs.get("logits_to_keep", 0))
    keys = all_keys[:, kept.to(all_keys.device)]
    if keys.shape[:2] != logits.shape[:2]:
        raise ModelError(
            f"{tuple(keys.shape[:2])} keys for {tuple(logits.shape[:2])} logits: this forward is not supported"
        )
    if tokens is None and (mixture.needs_belief or any(isinstance(memory, Cache) for memory in memories)):
        raise ModelError("this mixture must know which tokens the model reads; pass input_ids, not inputs_embeds")
    past = None
    if tokens is not None and (mixture.needs_text or any(isinstance(memory, Cache) for memory in memories)):
        past = past_of(output, kwargs, tokens, all_keys)
        longest = past.keys.shape[1]  # what a cache remembers beyond this is nothing
        memories = [Cache(min(len(item), longest)) if isinstance(item, Cache) else item for item in memories]
    sizes = [len(item) if isinstance(item, Cache) else k for item, k in zip(memories, mixture.ks, strict=True)]
    together = max(1, _FOUND_TOGETHER // max(1, len(logits) * sum(sizes)))
    states = None if attached.layer is None else attached.last.states()  # (batch, kept, width)
    attached = attached._replace(memories=memories)
    with torch.autocast(logits.device.type, enabled=False):  # probabilities in bfloat16 would not add up to 1
        parts = [
            _mixed(
                logits[:, some],
                keys[:, some],
                None if states is None else states[:, some],
                tokens,
                past,
                kept[some],
                attached,
            )
            for some in torch.arange(len(kept)).split(together)
        ]
    mixed = torch.cat(parts, dim=1)
    loss = None
    if labels is not None:
        items = {name: kwargs[name] for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        loss = model.loss_function(logits=mixed, labels=labels, vocab_size=mixed.shape[-1], **items)  # type: ignore
    if as_tuple:
        losses = output[:place] if loss is None else (loss, *output[1:place])
        return (*losses, mixed, *output[place + 1 :])
    output.logits = mixed
    if loss is not None:
        output.loss = loss
    return output


def _mixed(
    logits: Tensor,
    keys: Tensor,
    states: Tensor | None,
    tokens: Tensor | None,
    past: Past | None,
    kept: Tensor,
    attached: _Attached,
) -> Tensor:
    """Return the mixture's log probabilities at some places, float32, shape (batch, kept, vocabulary).

    Args:
        logits: There, shape (batch, kept, vocabulary).
        keys: There, shape (batch, kept, key width).
        states: What the output embedding reads there, shape (batch, kept, width), for a mixture that changes it.
        tokens: That the model has read in this pass, int64, shape (batch, width).
        past: Where caches look back.
        kept: The places' numbers within this pass, int64, shape (kept,).
        attached: Memories and mixture.
    """
    memories, mixture = attached.memories, attached.mixture
    flat = logits.flatten(0, 1).float()  # (n, vocabulary)
    queries = keys.flatten(0, 1).float()
    belief = None
    if mixture.needs_belief and tokens is not None:
        belief = Belief.from_logits(flat, queries, tokens[:, kept.to(tokens.device)].flatten().to(flat.device))
        if past is not None:
            belief = belief._replace(read=past.read(kept).to(flat.device))
        if states is not None:
            belief = belief._replace(hidden=states.flatten(0, 1).float())
    asked = mixture.wanted(belief) if mixture.skips and belief is not None else None
    found = []
    for memory, k in zip(memories, mixture.ks, strict=True):
        if past is not None and isinstance(memory, Cache):
            part = past.recall(memory, kept)
        else:
            part = _lookup(memory, queries, k, asked)
        found.append(part.each(lambda item: item.to(flat.device)))
    mixed = mixture.log_probs(flat.log_softmax(dim=-1), Evidence(tuple(found), belief, attached.layer))
    return mixed.reshape(logits.shape).to(torch.float32)


def _kept(places: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Apply the slice that the model applied before its output embedding."""
    if isinstance(logits_to_keep, int):
        return places[-logits_to_keep:] if logits_to_keep else places
    return places[logits_to_keep.cpu()]


def _lookup(memory: Datastore, queries: Tensor, k: int, asked: Tensor | None) -> Found:
    """Search a datastore for those positions that ask for it."""
    queries = queries.cpu()
    if asked is None:
        return memory.lookup(queries.numpy(), k)
    asked = asked.cpu()
    if not asked.any():
        return Found.nothing(len(queries), k)
    return memory.lookup(queries[asked].numpy(), k).among(asked)

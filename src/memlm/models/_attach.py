"""Attach a memory to a model: every transformers call inside the block sees the mixture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ._capture import Captured, capture, check_key_site, keys_of
from ._identity import encoder_fingerprint
from ._sites import KeySite, find_decoder


class Memory(Protocol):
    """What `attach` needs of a datastore."""

    manifest: Any

    def lookup(self, queries: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return distances, tokens and presence of the neighbors, each of shape (n, k)."""
        ...


class Mixture(Protocol):
    """What `attach` needs of a mixture."""

    k: int

    def log_probs(self, lm_log_probs: Tensor, distances: Tensor, tokens: Tensor, present: Tensor) -> Tensor:
        """Return the mixture's log probabilities, shape (n, vocabulary)."""
        ...


@contextmanager
def attach(model: Any, memory: Memory, mixture: Mixture) -> Iterator[Any]:
    """Mix a memory into everything that the model computes inside the block.

    At every position that the model keeps logits for, they are replaced by the log probabilities of the mixture, in
    float32; so `generate` (greedy, sampling, beams, assisted, chunked prefill), pipelines and evaluation harnesses work
    unchanged, and a user's temperature acts on the mixture. With `labels`, the loss is the mixture's. Leaving the block
    restores the model bit for bit.

    Args:
        model: A Hugging Face causal LM: the one whose keys the datastore holds.
        memory: A `Datastore`.
        mixture: A `KnnMixture`.

    Yields:
        The same model.

    Raises:
        DatastoreMismatch: The datastore holds another model's keys.
        ModelError: A memory is attached already, or the key site is not reached.
    """
    if getattr(model, "_memlm_attached", False):
        raise ModelError("a memory is attached to this model already; leave that block first")
    described = memory.manifest.encoder
    memory.manifest.check_encoder(type(model).__name__, encoder_fingerprint(find_decoder(model)))
    site = KeySite(described["key_site"]["name"], described["key_site"]["path"], described["key_site"]["tensor"])
    check_key_site(model, site)

    with capture(model, site) as captured:
        hook = model.register_forward_hook(
            lambda module, args, kwargs, output: _mix(module, args, kwargs, output, captured, site, memory, mixture),
            with_kwargs=True,
        )
        model._memlm_attached = True
        try:
            yield model
        finally:
            del model._memlm_attached
            hook.remove()


def _mix(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    captured: Captured,
    site: KeySite,
    memory: Memory,
    mixture: Mixture,
) -> Any:
    """Forward hook of the top-level model: put the mixture in the place of the logits."""
    as_tuple = isinstance(output, tuple)
    labels = kwargs.get("labels")
    # in a tuple the logits come after the losses, which are single numbers
    place = next(place for place, item in enumerate(output) if item.ndim) if as_tuple else 0
    logits = output[place] if as_tuple else output.logits  # (batch, kept, vocabulary)
    tokens = args[0] if args else kwargs.get("input_ids")
    width = tokens.shape[1] if tokens is not None else kwargs["inputs_embeds"].shape[1]
    keys = _kept(keys_of(captured, site, logits.shape[0], width), kwargs.get("logits_to_keep", 0))
    if keys.shape[:2] != logits.shape[:2]:
        raise ModelError(
            f"{tuple(keys.shape[:2])} keys for {tuple(logits.shape[:2])} logits: this forward is not supported"
        )
    mixed = _mixed_log_probs(logits, keys, memory, mixture)
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


def _kept(keys: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Apply the slice that the model applied before its output embedding."""
    if isinstance(logits_to_keep, int):
        return keys[:, -logits_to_keep:] if logits_to_keep else keys
    return keys[:, logits_to_keep.to(keys.device)]


def _mixed_log_probs(logits: Tensor, keys: Tensor, memory: Memory, mixture: Mixture) -> Tensor:
    flat = logits.flatten(0, 1).float().log_softmax(dim=-1)  # (n, vocabulary)
    queries = keys.detach().flatten(0, 1).float().cpu().numpy()
    found = [part.to(flat.device) for part in memory.lookup(queries, mixture.k)]
    return mixture.log_probs(flat, *found).reshape(logits.shape).to(torch.float32)

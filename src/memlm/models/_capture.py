"""Reading keys from a running model by hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ._layers import find_decoder
from ._sites import KeySite


class _Stop(Exception):
    """Ends a forward pass at the key site: nothing after it is needed."""


class Captured(threading.local):
    """The tensor that last passed the key site, per thread."""

    keys: Tensor | None = None


@contextmanager
def capture(model: nn.Module, site: KeySite, *, stop: bool = False) -> Iterator[Captured]:
    """Record the tensor at the key site in every forward pass of the block.

    Args:
        model: The top-level model.
        site: Where to read.
        stop: End the pass there; only `forward_to_site` knows how to receive that.
    """
    captured = Captured()
    module = model.get_submodule(site.path)

    def keep(tensor: Tensor) -> None:
        captured.keys = tensor
        if stop:
            raise _Stop

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(_first_tensor(args, kwargs, site))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        keep(_first_tensor((output,), {}, site))

    if site.tensor == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield captured
    finally:
        handle.remove()


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any], site: KeySite) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if hasattr(value, "last_hidden_state"):
            return value.last_hidden_state
        if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            return value[0]
    raise ModelError(f"no tensor passed through the key site {site.path} ({site.tensor}); name another key site")


def keys_of(captured: Captured, site: KeySite, batch: int, width: int) -> Tensor:
    """Return what was captured as (batch, width, key width); some models flatten the first two."""
    keys = captured.keys
    if keys is None:
        raise ModelError(f"the key site {site.path} was not reached in the forward pass; name another key site")
    captured.keys = None
    if keys.ndim not in (2, 3) or keys.shape[:-1].numel() != batch * width:
        raise ModelError(
            f"the key site {site.path} gave a tensor of shape {tuple(keys.shape)}; expected one key for each of "
            f"{batch} × {width} tokens: name another key site"
        )
    return keys.reshape(batch, width, keys.shape[-1])


def forward_with_keys(model: nn.Module, site: KeySite, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """Run a model as it is, gradients included, and return its output and the keys, shape (batch, width, key width).

    Args:
        model: A causal LM, or the same in a wrapper for parallel training, whose `module` it is.
        site: Where to read, as seen from the causal LM.
        inputs: What the model is called with; `input_ids` must be among it.

    Raises:
        ModelError: The key site was not reached, or reentrant checkpointing cut the keys off from their gradients.
    """
    inner: Any = getattr(model, "module", model)
    with capture(inner, site) as captured:
        output = model(**({"use_cache": False, "return_dict": True} | inputs))
        keys = keys_of(captured, site, *inputs["input_ids"].shape)
    cut_off = output.logits.requires_grad and not keys.requires_grad
    if cut_off and model.training and any(getattr(part, "gradient_checkpointing", False) for part in inner.modules()):
        raise ModelError(
            f"the keys at {site.path} have no gradient: the model's activations are checkpointed by the reentrant "
            "method; checkpoint them with use_reentrant=False"
        )
    return output, keys


@torch.no_grad()
def forward_to_site(model: nn.Module, site: KeySite, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """Run a model as far as the key site and return the keys, shape (batch, width, key width).

    Neither the output embedding nor, where the site is its input, the last feed-forward layer is computed.
    """
    decoder = find_decoder(model)
    with capture(model, site, stop=True) as captured:
        with suppress(_Stop):
            decoder(input_ids=input_ids, **({"use_cache": False} | kwargs))
        return keys_of(captured, site, *input_ids.shape)


@torch.no_grad()
def check_key_site(model: Any, site: KeySite) -> None:
    """Check on a few random tokens that keys do not depend on what follows or on how the text is fed.

    Raises:
        ModelError: The keys of a prefix, decoded in two steps with a cache, differ from those of the whole.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(vocabulary, (1, 12), generator=generator).to(device)
    whole = forward_to_site(model, site, ids)
    if not whole.isfinite().all():
        raise ModelError(f"keys from {site.path} are NaN or infinite; check the model's weights and its dtype")
    decoder = find_decoder(model)
    with capture(model, site) as captured:
        first = decoder(input_ids=ids[:, :7], use_cache=True)
        parts = [keys_of(captured, site, 1, 7)]
        if getattr(first, "past_key_values", None) is not None:  # without a cache, only the prefix can be compared
            decoder(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
            parts.append(keys_of(captured, site, 1, 5))
    low_precision = whole.dtype in (torch.bfloat16, torch.float16)
    fed = torch.cat(parts, dim=1)
    error = (fed - whole[:, : fed.shape[1]]).float().norm() / whole.float().norm()
    if not error < (0.1 if low_precision else 1e-3):
        raise ModelError(
            f"the key site {site.path} gives other keys when the same text is fed in two steps (relative difference "
            f"{error:.2g}); name another key site"
        )

"""A model's last layer, for mixtures that change the state that it reads, and reading that state by a hook."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..evidence import OutputEmbedding

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit


class CapturedHidden(threading.local):
    """What the output embedding read in the last forward pass, per thread."""

    tensor: Tensor | None = None

    def states(self) -> Tensor:
        """Return it, shape (batch, kept, width), with one state for each of the logits."""
        if self.tensor is None:
            raise ModelError("the model made logits without its output embedding; this mixture cannot change its state")
        return self.tensor


@contextmanager
def capture_hidden(model: Any, wanted: bool = True) -> Iterator[CapturedHidden]:
    """Record what the output embedding reads in every forward pass of the block; nothing where nobody wants it."""
    captured = CapturedHidden()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.tensor = next(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))

    head = model.get_output_embeddings() if wanted else None
    handle = None if head is None else head.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield captured
    finally:
        if handle is not None:
            handle.remove()


def output_embedding(model: Any) -> OutputEmbedding:
    """Return a model's last layer, checked: its logits must be W h + b and nothing more.

    Raises:
        ModelError: There is no such layer, or logits are scaled or soft-capped after it, as in Gemma 2, Cohere and
            Granite.
    """
    head = model.get_output_embeddings()
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(
            f"{type(model).__name__} has no output embedding with weights that can be read; SPALM needs one"
        )
    output = OutputEmbedding(weight.detach().float(), None if bias is None else bias.detach().float())
    config = model.config.get_text_config()
    capped = bool(getattr(config, "final_logit_softcapping", None))  # in half precision small logits do not show it
    ids = torch.arange(1, 7, device=weight.device)[None] % len(weight)
    with torch.no_grad(), capture_hidden(model) as last:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        again = output.logits(last.states().float().flatten(0, 1)).view_as(logits)
    allowed = _TOLERANCE.get(weight.dtype, 0.03) * float(logits.abs().max().clamp_min(1e-6))
    if capped or not float((logits - again).abs().max()) <= allowed:
        raise ModelError(
            f"{type(model).__name__} scales or caps its logits after the output embedding, where a change of the last "
            "state does not mean what SPALM takes it for; use a mixture of probabilities, such as adapter"
        )
    return output

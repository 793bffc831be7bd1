"""The loss of a model whose last state is mixed with its neighbors' next tokens (SPALM, Yogatama et al. 2021,
arXiv:2102.02557). Neighbors are found once, beforehand, and come with the batch; nothing is searched while training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigError, ModelError
from ..mixtures import FIRST_GATE, SpalmMixture, first_size
from ..models import CarriedCache, capture_hidden, output_embedding
from ._trime import IGNORED, PLACES, TargetLogProbs, at_targets, targets_of

GATE = "spalm_gate."  # before the names of the gate's tensors in a model's state
SPALM_FIELDS = ("neighbors", "context", "context_tokens")


class SpalmGate(nn.Module):
    """g = σ(G h + c), and the size s of the memory beside it; at first g is .95.

    Args:
        width: Of h.
        gates: 1, or `width` for one gate a dimension.
        size: s at first, positive.
    """

    def __init__(self, width: int, gates: int = 1, size: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(gates, width))
        self.bias = nn.Parameter(torch.full((gates,), FIRST_GATE))
        self.log_size = nn.Parameter(torch.tensor(math.log(size)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return g, shape (n, gates), of h, shape (n, width)."""
        return nn.functional.linear(hidden, self.weight.float(), self.bias.float()).sigmoid()

    def mixture(self, k: int) -> SpalmMixture:
        """Return what it has learned, for `attach`, `evaluate`, `explain` and `generate`."""
        weight, bias = (part.detach().float().cpu().clone() for part in (self.weight, self.bias))
        return SpalmMixture(gate=weight, gate_bias=bias, size=float(self.log_size.detach().exp()), k=k)


def add_spalm_gate(model: Any, *, gates: str = "scalar") -> SpalmGate:
    """Give a causal LM a gate, as its part `spalm_gate`, so that whatever trains the model trains the gate.

    Take it away by `del model.spalm_gate` before the model is saved for others.

    Args:
        model: Any Hugging Face causal LM whose logits are those of its output embedding.
        gates: "scalar" or "vector".

    Raises:
        ConfigError: Another kind of gate.
        ModelError: Logits are scaled or soft-capped.
    """
    if gates not in ("scalar", "vector"):
        raise ConfigError(f"gates is {gates!r}; expected 'scalar', or 'vector' for one a dimension")
    embeddings = output_embedding(model).weight
    width = embeddings.shape[1]
    count = 1 if gates == "scalar" else width
    model.spalm_gate = SpalmGate(width, count, first_size(embeddings)).to(embeddings.device)
    return model.spalm_gate


class SpalmLoss:
    """Negative log likelihood of a batch under softmax(W z).

    Args:
        carry: Tokens of the document before a segment whose keys and values the segment sees, without gradient: the
            paper's short-term memory. 0 for none.

    Example:
        A training loop of one's own::

            gate = add_spalm_gate(model)
            loss_of = SpalmLoss(carry=256)
            for update, batch in enumerate(batches):
                loss_of(model, batch, update=update, updates=1000).backward()
    """

    def __init__(self, carry: int = 0) -> None:
        if carry < 0:
            raise ConfigError(f"carry is {carry}; expected a number of tokens, 0 for none")
        self.carry = carry
        self._carried: tuple[Any, CarriedCache] | None = None  # with the model that it is of

    def __call__(
        self, model: Any, batch: Mapping[str, Tensor], *, update: int, updates: int, targets: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a batch, nats a target, a float32 scalar with gradients.

        Args:
            model: With a gate; see `add_spalm_gate`.
            batch: `input_ids` and `labels` as everywhere in transformers, int64, shape (rows, length), and `neighbors`,
                int64, shape (rows, length, k): the next tokens of the neighbors of each position, −1 for none. With
                `carry`, `context`, int64, shape (rows, carry), the tokens before the segment, padded at the right, and
                `context_tokens`, int64, shape (rows,), how many there are. Anything else goes to the model.
            update: Not looked at.
            updates: Not looked at.
            targets: What to divide by; None means the targets of this batch.
        """
        log_probs = self._log_probs(model, batch)[0]
        return -log_probs.sum() / (max(1, len(log_probs)) if targets is None else targets)

    def log_probs(self, model: Any, batch: Mapping[str, Tensor]) -> TargetLogProbs:
        """Return log P of the targets of a batch, with memory and without (the gate wide open), from one pass."""
        log_probs, logits, tokens = self._log_probs(model, batch)
        return TargetLogProbs(log_probs, _of(logits, tokens))

    def _log_probs(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        plain = getattr(model, "module", model)
        if not isinstance(getattr(plain, "spalm_gate", None), SpalmGate):
            raise ModelError(f"{type(plain).__name__} has no gate; give it one by add_spalm_gate")
        where, tokens = targets_of(batch)
        with capture_hidden(plain) as last:
            output = self._read(model, batch)
        hidden = at_targets(last.states(), where).float()  # (n, width)
        neighbors = at_targets(batch["neighbors"], where)  # (n, k)
        head = plain.get_output_embeddings()
        present = neighbors >= 0
        with torch.autocast(hidden.device.type, enabled=False):
            embeddings = nn.functional.embedding(neighbors.clamp_min(0), head.weight).float()
            memory, _ = ops.spalm_memory(hidden, embeddings, present)
            gate = plain.spalm_gate(hidden)
            state = ops.spalm_state(hidden, plain.spalm_gate.log_size.exp() * memory, gate, present)
        logits = nn.functional.linear(state.to(head.weight.dtype), head.weight, getattr(head, "bias", None))
        return _of(logits, tokens), at_targets(output.logits, where), tokens

    def _read(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        """Run the model over the segments, behind what came before them."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", *PLACES, *SPALM_FIELDS)}
        if not self.carry or not bool(batch["context_tokens"].any()):
            return model(**({"use_cache": False, "return_dict": True} | inputs))
        if self._carried is None or self._carried[0] is not model:
            self._carried = model, CarriedCache(model, self.carry)
        carried = self._carried[1]
        context, count = batch["context"][:, : int(batch["context_tokens"].max())], batch["context_tokens"]
        none = count == 0
        mask = torch.arange(context.shape[1], device=context.device) < count[:, None]
        carried.reset()
        with torch.no_grad():  # a row without context reads its padding, and then forgets it
            carried(context, torch.ones_like(none), (mask | none[:, None]).long(), logits_to_keep=1)
        output = carried(inputs.pop("input_ids"), none, _text(batch["labels"]), **inputs)
        carried.reset()
        return output


def _text(labels: Tensor) -> Tensor:
    """Return which positions of segments are text and not padding, int64, shape (rows, length); all of an empty row."""
    last = (labels != IGNORED).long().flip(1).argmax(dim=1)  # positions after the last label
    last = last.masked_fill((labels == IGNORED).all(dim=1), 0)
    return (torch.arange(labels.shape[1], device=labels.device) < labels.shape[1] - last[:, None]).long()


def _of(logits: Tensor, tokens: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(logits.float(), tokens, reduction="none")

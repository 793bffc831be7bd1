"""The work on one arm: train, then read the test documents with every memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import AttentionMemories, Ring, forget, memorize
from .._experiment import Measured, Row, Task
from . import ADDED, FIRST, GATE, NOTHING, ROLLED, SHORT, SMALLER, WHOLE
from ._recall import KINDS, Documents, RecallModel, recall_documents
from ._sizes import Sizes

_COMBINE = {"gate": "gate", "rolled": "gate"}  # of the other arms: joint
_TEST = 1_000_003  # seed of the test documents, the same for all


def measure(task: Task) -> Measured:
    """Train and measure one arm."""
    sizes, arm, started = task.size, task.arm, time.process_time()
    torch.manual_seed(task.seed)
    model = RecallModel(sizes)
    generator = torch.Generator().manual_seed(task.seed)
    begins_without = arm in ("none", "tuned", "own keys")
    memory = _memory(model, sizes, 0 if begins_without else sizes.memory, arm)
    order = _rolled(sizes.rows) if arm == "rolled" else None
    train(model, memory, sizes, sizes.batches, generator, task.advance, order)
    if arm in ("tuned", "own keys"):
        forget(model.lm)
        memory = _memory(model, sizes, sizes.memory, arm)
        train(model, memory, sizes, sizes.tuned_batches, generator, task.advance)
    rows = _measured(model, memory, sizes, arm)
    return Measured(
        counts=[1] * sizes.test,
        groups="documents",
        rows={name: Row(values.tolist()) for name, values in rows.items()},
        facts={"processor seconds": time.process_time() - started},
    )


def train(
    model: RecallModel,
    memory: AttentionMemories,
    sizes: Sizes,
    batches: int,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda tokens: None,
    order: Sequence[int] | None = None,
) -> None:
    """Train a model in place, one step a segment.

    Args:
        model: The model; its `lm` has the memory.
        memory: From `memorize`.
        sizes: How long and how fast.
        batches: How many.
        generator: Draws the documents.
        advance: Called with the tokens of every batch.
        order: Row r reads the memory of row order[r]; None is its own.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate)
    for _ in range(batches):
        documents = recall_documents(sizes, sizes.rows, generator)
        memory.reset()
        for segment in documents.tokens.unbind(dim=1):
            with ExitStack() as stack:
                if order is not None:
                    stack.enter_context(memory.reading_from(order))
                loss = model.losses(segment).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        advance(sizes.tokens)


@torch.no_grad()
def losses(
    model: RecallModel, memory: AttentionMemories, documents: Documents, order: Sequence[int] | None = None
) -> Tensor:
    """Return the nats of every value of documents that are read side by side, shape as `Documents.kinds`."""
    memory.reset()
    with ExitStack() as stack:
        if order is not None:
            stack.enter_context(memory.reading_from(order))
        return torch.stack([model.losses(segment) for segment in documents.tokens.unbind(dim=1)], dim=1)


def by_kind(values: Tensor, documents: Documents) -> dict[str, Tensor]:
    """Return the mean of each kind of value in each document, float64, shape (documents,)."""
    means = {}
    for number, name in enumerate(KINDS):
        chosen = (documents.kinds == number).double()
        means[name] = (values.double() * chosen).sum(dim=(1, 2)) / chosen.sum(dim=(1, 2)).clamp_min(1)
    return means


class OwnKeys(Ring):
    """A control: keys and values by projections of the memory's own, which no gradient reaches.

    `memorize` refuses them. They stay as random as they are made here, whatever the model's own have learned.

    Args:
        size: Entries a row.
        attention: The layer; its input is projected.
    """

    def __init__(self, size: int, attention: nn.Module) -> None:
        super().__init__(size)
        self._hidden = torch.empty(0)
        width, key_width = attention.k_proj.in_features, attention.k_proj.out_features  # type: ignore[union-attr]
        self._projections = [torch.randn(width, key_width) / width**0.5 for _ in range(2)]
        attention.register_forward_pre_hook(self._see, with_kwargs=True)

    def write(self, keys: Tensor, values: Tensor, known: Tensor | None = None) -> None:
        """Remember projections of the layer's input in the place of keys and values."""
        projected = [
            (self._hidden @ matrix).unflatten(2, (keys.shape[1], -1)).transpose(1, 2) for matrix in self._projections
        ]
        super().write(nn.functional.normalize(projected[0], dim=-1), projected[1], known)

    def _see(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._hidden = kwargs["hidden_states"].detach()


def _memory(model: RecallModel, sizes: Sizes, size: int, arm: str) -> AttentionMemories:
    own = arm == "own keys" and size > 0
    memory = memorize(
        model.lm,
        [0],
        size=size,
        top_k=sizes.top_k,
        combine=_COMBINE.get(arm, "joint"),
        normalize="l2",
        projections="own_queries" if own else "shared",
    )
    if own:
        memory.memories[0].store = OwnKeys(size, model.lm.model.layers[0].self_attn)
    return memory


def _rolled(rows: int) -> list[int]:
    return [*range(1, rows), 0]


def _measured(model: RecallModel, memory: AttentionMemories, sizes: Sizes, arm: str) -> dict[str, Tensor]:
    """Return every row that the arm has, float64, shape (test documents,)."""
    documents = recall_documents(sizes, sizes.test, torch.Generator().manual_seed(_TEST))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def read(memory: AttentionMemories, order: Sequence[int] | None = None) -> dict[str, Tensor]:
        return by_kind(losses(model, memory, documents, order), documents)

    def changed(size: int, form: str) -> dict[str, Tensor]:
        forget(model.lm)
        other = _memory(model, sizes, size, form)
        model.load_state_dict(state, strict=False)  # a gate that was never trained is not in it
        return read(other)

    own = read(memory)
    found = {NOTHING if arm == "none" else WHOLE: own}
    if arm == "none":
        found |= {name: changed(sizes.memory, form) for form, name in ADDED.items()}
    if arm == "gate":
        found[ROLLED] = read(memory, _rolled(sizes.test))
        found |= {name: changed(sizes.memory // part, arm) for part, name in SMALLER.items()}
        found[NOTHING] = changed(0, arm)
    rows = {name: by["long"] for name, by in found.items()} | {SHORT: own["short"], FIRST: own["first"]}
    if _COMBINE.get(arm) == "gate":
        gates = state["lm.model.layers.0.self_attn.memory.gate"].sigmoid().mean()
        rows[GATE] = gates.double().expand(sizes.test)
    return rows

"""Training memories of product keys: optimizers that know the tables, and learning in a few chosen slots alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ._product_keys import product_key_memories


def product_key_groups(
    model: nn.Module, *, learning_rate: float, value_learning_rate: float = 1e-3, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return two parameter groups: everything that is trained but the tables, and the tables.

    For one optimizer over both, as a trainer may want it; the tables' gradients then have to be dense. A schedule of
    the learning rate goes on to reach the tables, which Lample et al. 2019 train at a constant one.

    Raises:
        ModelError: The model has no memory of product keys.
    """
    memories = product_key_memories(model)
    if not memories:
        raise ModelError(f"{type(model).__name__} has no memory of product keys, whose values could be trained apart")
    tables = {id(memory.values): memory.values for memory in memories.values() if memory.values.requires_grad}
    rest = [item for item in model.parameters() if item.requires_grad and id(item) not in tables]
    return [
        {"params": rest, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": list(tables.values()), "lr": value_learning_rate, "weight_decay": 0.0},
    ]


def product_key_optimizers(
    model: nn.Module,
    *,
    learning_rate: float,
    value_learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> list[torch.optim.Optimizer]:
    """Return AdamW for the rest of a model, and Adam for its tables, which updates only rows that have a gradient.

    Two optimizers, so that a schedule and the clipping of gradients for the rest leave the tables alone. Where their
    gradients are dense, it is the ordinary Adam, which goes on to move rows by their momentum. A part without
    parameters that are trained gets no optimizer.

    Args:
        model: With memories of product keys.
        learning_rate: Of the rest.
        value_learning_rate: Of the tables: 10⁻³ in Lample et al. 2019, arXiv:1907.05242, and in Berges et al. 2024.
        weight_decay: Of the rest; the tables have none, which would wear rows away that nothing reads.
        betas: Of both.

    Raises:
        ModelError: The model has no memory of product keys.
    """
    rest, tables = product_key_groups(
        model, learning_rate=learning_rate, value_learning_rate=value_learning_rate, weight_decay=weight_decay
    )
    memories = product_key_memories(model).values()
    sparse = {id(memory.values) for memory in memories if memory.settings.value_gradient == "sparse"}
    optimizers: list[torch.optim.Optimizer] = []
    if rest["params"]:
        optimizers.append(torch.optim.AdamW([rest], betas=betas))
    if of_sparse := [item for item in tables["params"] if id(item) in sparse]:
        optimizers.append(torch.optim.SparseAdam(of_sparse, lr=value_learning_rate, betas=betas))
    if of_dense := [item for item in tables["params"] if id(item) not in sparse]:
        optimizers.append(torch.optim.Adam(of_dense, lr=value_learning_rate, betas=betas))
    return optimizers


@contextmanager
def training_slots_only(model: nn.Module, slots: Mapping[str, Tensor]) -> Iterator[None]:
    """Let nothing be trained inside the block but chosen rows of the tables (Lin et al. 2025, arXiv:2510.15103).

    Whatever text reads none of these rows comes out exactly as before. Take a new optimizer without weight decay, made
    inside the block: momentum from before would move other rows. Queries that are normalized over the batch want the
    model in eval mode, in which their statistics stay.

    Args:
        model: With memories of product keys.
        slots: By a memory's dotted path, the rows that may change, int64, shape (chosen,); see `choose_slots`.

    Raises:
        ConfigError: A path at which there is no memory, or a slot that it does not have.
    """
    memories = product_key_memories(model)
    for path, chosen in slots.items():
        if path not in memories:
            raise ConfigError(f"there is no memory of product keys at {path!r}; expected one of {', '.join(memories)}")
        size = memories[path].settings.slots
        if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= size):
            raise ConfigError(f"slots of {path} reach from {chosen.min()} to {chosen.max()}; expected 0 to {size - 1}")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handles = []
    try:
        model.requires_grad_(False)
        for path, chosen in slots.items():
            values = memories[path].values.requires_grad_(True)
            allowed = torch.zeros(len(values), dtype=torch.bool, device=values.device)
            allowed[chosen.to(values.device)] = True
            handles.append(values.register_hook(lambda gradient, allowed=allowed: _rows(gradient, allowed)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _rows(gradient: Tensor, allowed: Tensor) -> Tensor:
    """Return a gradient without all other rows, in its own layout."""
    if not gradient.is_sparse:
        return gradient * allowed[:, None]
    gradient = gradient.coalesce()
    rows, values = gradient.indices(), gradient.values()
    kept = allowed[rows[0]]
    kept_rows, kept_values = rows[:, kept], values[kept]
    return torch.sparse_coo_tensor(kept_rows, kept_values, gradient.shape, is_coalesced=True, check_invariants=False)

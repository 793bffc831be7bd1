"""The work on one arm: learn facts, look at the table, learn new facts in several ways."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers import (
    ProductKeyMemory,
    ProductKeySettings,
    SlotUsage,
    choose_slots,
    count_slot_usage,
    product_key_memories,
    product_key_optimizers,
    training_slots_only,
)
from .._experiment import Measured, Row, Task
from . import _rows as rows
from ._sizes import Sizes

_MEMORY = "block"  # dotted path


class Facts(NamedTuple):
    """Pairs of symbols with an answer.

    Attributes:
        pairs: Int64, shape (facts, 2).
        answers: Int64, shape (facts,).
    """

    pairs: Tensor
    answers: Tensor


def draw_facts(sizes: Sizes, seed: int) -> tuple[Facts, Facts]:
    """Return the facts and the new facts: different pairs, an answer at random for each."""
    generator = torch.Generator().manual_seed(seed)
    count = sizes.facts + sizes.new
    pairs = torch.randperm(sizes.symbols**2, generator=generator)[:count]
    pairs = torch.stack([pairs // sizes.symbols, pairs % sizes.symbols], dim=1)
    answers = torch.randint(sizes.symbols, (count,), generator=generator)
    old = sizes.facts
    return Facts(pairs[:old], answers[:old]), Facts(pairs[old:], answers[old:])


class FactModel(nn.Module):
    """Two embeddings, a residual block and an output layer."""

    def __init__(self, sizes: Sizes, block: nn.Module) -> None:
        """Make a model around a block."""
        super().__init__()
        self.first = nn.Embedding(sizes.symbols, sizes.width)
        self.second = nn.Embedding(sizes.symbols, sizes.width)
        self.norm = nn.LayerNorm(sizes.width)
        self.block = block
        self.final_norm = nn.LayerNorm(sizes.width)
        self.output = nn.Linear(sizes.width, sizes.symbols)
        for embedding in (self.first, self.second):
            nn.init.normal_(embedding.weight, std=0.5)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return the logits of the answers, shape (facts, symbols), to pairs of shape (facts, 2)."""
        states = self.first(pairs[:, 0]) + self.second(pairs[:, 1])
        return self.output(self.final_norm(states + self.block(self.norm(states))))


def new_model(sizes: Sizes, arm: str, seed: int) -> FactModel:
    """Return an untrained model of an arm."""
    torch.manual_seed(seed)
    if arm.startswith("dense"):
        hidden = sizes.wide if arm == "dense-wide" else sizes.dense
        return FactModel(
            sizes, nn.Sequential(nn.Linear(sizes.width, hidden), nn.GELU(), nn.Linear(hidden, sizes.width))
        )
    settings = ProductKeySettings(
        sub_keys=sizes.sub_keys,
        heads=sizes.heads,
        k=sizes.k,
        key_width=sizes.key_width,
        query_normalization="batch" if arm == "product-keys-batch" else "layer",
        value_gradient="dense",  # a small table, of which every batch reads much
    )
    return FactModel(sizes, ProductKeyMemory(sizes.width, settings))


def train(model: FactModel, facts: Facts, sizes: Sizes, seed: int) -> Iterable[int]:
    """Train a model in place; yield the facts of every step."""
    optimizers = _optimizers(model, sizes.learning_rate, sizes.value_learning_rate)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for _ in range(sizes.steps):
        if len(order) < sizes.batch:
            order = torch.randperm(len(facts.answers), generator=generator)
        chosen, order = order[: sizes.batch], order[sizes.batch :]
        _step(model, Facts(facts.pairs[chosen], facts.answers[chosen]), optimizers)
        yield sizes.batch
    model.eval()


@torch.no_grad()
def wrong(model: FactModel, facts: Facts) -> Tensor:
    """Return which facts are answered wrong, bool, shape (facts,)."""
    return model(facts.pairs).argmax(dim=1) != facts.answers


def measure(task: Task) -> Measured:
    """Train and measure one arm."""
    sizes, started = task.size, time.process_time()
    (old, new), model = draw_facts(sizes, task.seed), new_model(sizes, task.arm, task.seed)
    for amount in train(model, old, sizes, task.seed):
        task.advance(amount)
    found = {rows.KNOWN: _row(wrong(model, old), sizes), rows.BEFORE: _row(wrong(model, new), sizes)}
    facts: dict[str, Any] = {"parameters": sum(item.numel() for item in model.parameters())}
    ways: dict[str, Tensor | None] = {rows.ALL: None}
    if product_key_memories(model):
        of_old, of_new = _usage(model, old), _usage(model, new)
        facts |= {"usage": of_old.share, "divergence": of_old.divergence}
        share = f"KL of their weights to even ones {of_old.divergence:.3f} nats"
        found[rows.UNREAD] = Row([(1 - of_old.share) * sizes.facts / sizes.groups] * sizes.groups, share)
        found[rows.ROLLED] = _row(_wrong_when_rolled(model, old), sizes)
        everything = torch.arange(sizes.sub_keys**2)
        ways |= {
            rows.TABLE: everything,
            rows.CHOSEN: choose_slots(of_new, of_old, sizes.chosen),
            rows.RANDOM: everything[torch.randperm(len(everything), generator=_generator(task))[: sizes.chosen]],
        }
    for way, slots in ways.items():
        learned = copy.deepcopy(model)
        steps = learn(learned, new, slots, sizes)
        found[rows.after(rows.NEW, way)] = _row(wrong(learned, new), sizes, f"{steps} steps")
        found[rows.after(rows.OLD, way)] = _row(wrong(learned, old), sizes)
    facts["processor seconds"] = time.process_time() - started
    counts = [sizes.facts // sizes.groups] * sizes.groups
    return Measured(counts=counts, groups="groups of facts", rows=found, facts=facts)


def learn(model: FactModel, new: Facts, slots: Tensor | None, sizes: Sizes) -> int:
    """Train a model in place on new facts alone, in chosen slots or, if None, in everything; return the steps taken."""
    block = nullcontext() if slots is None else training_slots_only(model, {_MEMORY: slots})
    rate = sizes.new_learning_rate if slots is None else sizes.slot_learning_rate
    with block:
        optimizers = _optimizers(model, rate, rate)
        # in eval mode: the running statistics of a batch norm would be trained, too
        for step in range(1, sizes.new_steps + 1):
            _step(model, new, optimizers)
            if step % 5 == 0 and float(wrong(model, new).double().mean()) <= sizes.new_error:
                return step
    return sizes.new_steps


def _optimizers(model: FactModel, rate: float, value_rate: float) -> Sequence[torch.optim.Optimizer]:
    if product_key_memories(model):
        return product_key_optimizers(model, learning_rate=rate, value_learning_rate=value_rate)
    return [torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)]


def _step(model: FactModel, facts: Facts, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    F.cross_entropy(model(facts.pairs), facts.answers).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _usage(model: FactModel, facts: Facts) -> SlotUsage:
    """Return what facts read; each is a document."""
    with count_slot_usage(model) as usages:
        model(facts.pairs)
    return usages[_MEMORY]


def _wrong_when_rolled(model: FactModel, facts: Facts) -> Tensor:
    rolled = copy.deepcopy(model)
    memory = product_key_memories(rolled)[_MEMORY]
    memory.values.data = memory.values.data.roll(1, dims=0)
    return wrong(rolled, facts)


def _row(wrong: Tensor, sizes: Sizes, settings: str = "") -> Row:
    """Return the errors by groups; where there are fewer facts, each stands for several, so that all rows compare."""
    weight = sizes.facts / len(wrong)
    return Row([weight * float(part.sum()) for part in wrong.chunk(sizes.groups)], settings)


def _generator(task: Task) -> torch.Generator:
    return torch.Generator().manual_seed(task.seed)

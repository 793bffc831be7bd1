"""How large the experiment is: numbers alone, so that every size runs the same code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of the experiment.

    Attributes:
        symbols: What facts are made of.
        facts: Facts to be learned …
        new: … and those that are learned afterwards.
        groups: Into which both are dealt, for intervals.
        width: Of the states.
        dense: Width of the feed-forward layer with as many multiplications as the memory …
        wide: … and of the one with as many parameters.
        sub_keys: Of the memory, in each half; it has the square of this in slots.
        heads: Of the memory.
        k: Slots that each head reads.
        key_width: Of queries and keys.
        batch: Facts a step.
        steps: Of the first training.
        learning_rate: Of Adam …
        value_learning_rate: … and for the table.
        new_steps: Of the second training, of all new facts at once, at most …
        new_error: … which stops when no more of them than this are answered wrong.
        new_learning_rate: Of all parameters, in the second training …
        slot_learning_rate: … and of the table alone.
        chosen: Slots that are trained, where not all are.
    """

    symbols: int
    facts: int
    new: int
    groups: int
    width: int
    dense: int
    wide: int
    sub_keys: int
    heads: int = 4
    k: int
    key_width: int
    batch: int
    steps: int
    learning_rate: float = 2e-3
    value_learning_rate: float = 1e-2
    new_steps: int
    new_error: float = 0.01
    new_learning_rate: float = 3e-4
    slot_learning_rate: float = 1e-2
    chosen: int


FULL = Sizes(
    symbols=256,
    facts=16_384,
    new=512,
    groups=128,
    width=64,
    dense=144,
    wide=2_160,
    sub_keys=64,
    k=8,
    key_width=32,
    batch=512,
    steps=1_200,
    new_steps=400,
    chosen=1_024,
)
TINY = Sizes(
    symbols=32,
    facts=896,
    new=16,
    groups=8,
    width=16,
    dense=40,
    wide=156,
    sub_keys=16,
    k=4,
    key_width=8,
    batch=128,
    steps=500,
    new_steps=200,
    new_learning_rate=3e-3,
    chosen=128,
)

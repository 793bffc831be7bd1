"""How large the experiment is: numbers alone, so that every size runs the same code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of the experiment.

    Attributes:
        keys: Names that there are; their tokens come first.
        values: Tokens that a name may stand for.
        names: Keys that occur in one document.
        segment: Tokens a segment, half of them keys.
        segments: A document.
        width: Of the model.
        heads: Of attention.
        rows: Documents a batch.
        batches: Of training; one step a segment.
        tuned_batches: Of fine-tuning with memory.
        learning_rate: Of AdamW.
        memory: Tokens remembered while training.
        top_k: Of these, how many a query attends to.
        test: Documents that are measured.
    """

    keys: int = 64
    values: int = 32
    names: int = 20
    segment: int = 32
    segments: int = 8
    width: int = 64
    heads: int = 4
    rows: int = 16
    batches: int
    tuned_batches: int
    learning_rate: float = 0.003
    memory: int = 256
    top_k: int = 32
    test: int

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.rows * self.segments * self.segment


FULL = Sizes(batches=120, tuned_batches=20, test=128)
TINY = Sizes(
    keys=12,
    names=6,
    segment=16,
    segments=4,
    width=32,
    heads=2,
    batches=100,
    tuned_batches=20,
    learning_rate=0.01,
    memory=64,
    top_k=16,
    test=64,
)

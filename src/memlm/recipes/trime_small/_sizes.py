"""How large the experiment is: numbers alone, so that every size runs the same code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of the experiment.

    Attributes:
        train: Characters of the training text.
        valid: Characters of the text that everything is tuned on …
        valid_file: … and at most of one file.
        test: Characters of the text that is reported on …
        test_file: … and at most of one file.
        vocabulary: Tokens.
        layers: Of the model.
        width: Of the model and of its keys.
        feed_forward: Width of the feed-forward layers.
        heads: Of attention.
        length: Tokens a segment; also the short memory.
        streams: Places in the text at which a batch reads …
        consecutive: … and the segments that it reads at each.
        steps: Optimizer steps, of one batch each.
        plain: Share of the steps, at the start, without memory.
        learning_rate: Of AdamW, at its highest.
        memory: Tokens of the long memory.
        k: Neighbors asked of the datastore.
        tuned: Targets of the validation text, evenly spread, that settings are fitted to, about.
    """

    train: int
    valid: int
    valid_file: int
    test: int
    test_file: int
    vocabulary: int
    layers: int = 2
    width: int
    feed_forward: int
    heads: int = 4
    length: int
    streams: int = 4
    consecutive: int = 4
    steps: int
    plain: float = 0.05
    learning_rate: float = 0.003
    memory: int
    k: int
    tuned: int

    @property
    def rows(self) -> int:
        """Segments a batch."""
        return self.streams * self.consecutive


FULL = Sizes(
    train=3_600_000,
    valid=80_000,
    valid_file=12_000,
    test=180_000,
    test_file=16_000,
    vocabulary=2048,
    width=64,
    feed_forward=168,
    length=64,
    steps=1500,
    memory=2048,
    k=1024,
    tuned=6000,
)
TINY = Sizes(
    train=40_000,
    valid=6_000,
    valid_file=3_000,
    test=6_000,
    test_file=3_000,
    vocabulary=256,
    width=16,
    feed_forward=32,
    heads=2,
    length=16,
    streams=2,
    consecutive=2,
    steps=12,
    memory=64,
    k=32,
    tuned=600,
)

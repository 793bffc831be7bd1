"""How large the experiment is: numbers alone, so that every size runs the same code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of the experiment.

    Attributes:
        train: Characters of training text.
        test: Characters of test text …
        test_file: … and how many of one document, at most.
        vocabulary: Tokens.
        deep_layers: Of the deep and thin model.
        deep_width: Of its states …
        deep_feed_forward: … and of its feed-forward layers.
        deep_heads: Of its attention.
        layers: Of the shallow and wide models.
        width: Of their states …
        feed_forward: … and of their feed-forward layers.
        heads: Of their attention.
        length: Tokens a segment.
        long: Tokens a segment, where the context is long; a multiple of `length`, and `rows` times `length` one of it.
        rows: Documents that are read at the same time; an update reads `rows` times `length` tokens.
        steps: Updates.
        learning_rate: Peak rate of AdamW.
        memory: Tokens that an attention memory remembers.
        top_k: Of these, how many a query attends to.
    """

    train: int
    test: int
    test_file: int
    vocabulary: int
    deep_layers: int
    deep_width: int
    deep_feed_forward: int
    deep_heads: int
    layers: int
    width: int
    feed_forward: int
    heads: int
    length: int
    long: int
    rows: int
    steps: int
    learning_rate: float = 0.003
    memory: int
    top_k: int


FULL = Sizes(
    train=3_600_000,
    test=360_000,
    test_file=60_000,
    vocabulary=2048,
    deep_layers=6,
    deep_width=64,
    deep_feed_forward=176,
    deep_heads=2,
    layers=2,
    width=96,
    feed_forward=273,
    heads=3,
    length=128,
    long=1024,
    rows=16,
    steps=600,
    memory=4096,
    top_k=32,
)
TINY = Sizes(
    train=60_000,
    test=16_000,
    test_file=4_000,
    vocabulary=300,
    deep_layers=3,
    deep_width=16,
    deep_feed_forward=40,
    deep_heads=2,
    layers=2,
    width=18,
    feed_forward=57,
    heads=1,
    length=16,
    long=64,
    rows=8,
    steps=20,
    memory=128,
    top_k=8,
)

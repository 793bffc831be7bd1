"""How large the experiment is: numbers alone, so that every size runs the same code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of the experiment.

    Attributes:
        names: Symbols for each of a key's two halves: there are names² keys.
        answers: Symbols for values.
        words: Of text without facts.
        layers: Of the model …
        width: … and its width.
        heads: Of attention.
        length: Tokens of a document.
        model_rows: Documents a step, in training the model …
        model_steps: … and its steps.
        key_width: Of the rows.
        value_width: Of the rows.
        top_k: Rows read at each position.
        window: Positions that a query or key is made of.
        layer: Where the reader is.
        facts: Facts a step, in training the reader …
        steps: … and its steps.
        learning_rate: Of the reader, at its highest.
        written: Facts that are written for the test.
        groups: Into which they are divided for the intervals.
        text: Documents without facts for the test; a multiple of the groups.
    """

    names: int
    answers: int
    words: int
    layers: int = 2
    width: int
    heads: int = 4
    length: int
    model_rows: int = 32
    model_steps: int
    key_width: int = 32
    value_width: int = 32
    top_k: int = 8
    window: int = 2
    layer: int = 0
    facts: int
    steps: int
    learning_rate: float = 0.01
    written: int
    groups: int
    text: int

    @property
    def vocabulary(self) -> int:
        """Tokens: a start, names of both kinds, answers, words."""
        return 1 + 2 * self.names + self.answers + self.words


FULL = Sizes(
    names=32,
    answers=32,
    words=64,
    width=64,
    length=64,
    model_steps=1200,
    facts=128,
    key_width=64,
    steps=450,
    written=384,
    groups=32,
    text=128,
)
TINY = Sizes(
    names=6,
    answers=6,
    words=8,
    width=16,
    heads=2,
    length=16,
    model_rows=8,
    model_steps=10,
    key_width=8,
    value_width=8,
    top_k=2,
    facts=12,
    steps=8,
    written=12,
    groups=4,
    text=8,
)

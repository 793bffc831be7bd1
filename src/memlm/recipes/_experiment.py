"""What an experiment is: arms trained and measured from several seeds, and claims that the numbers must bear out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Unit(NamedTuple):
    """How a mean is shown.

    Attributes:
        name: What it then is.
        of: Turns a mean into the number shown.
        change: Turns mean − other mean into words.
    """

    name: str
    of: Callable[[float], float]
    change: Callable[[float], str]


def _percent(difference: float) -> str:
    return f"{100 * math.expm1(difference):+.1f} %"


PERPLEXITY = Unit("perplexity a token", math.exp, _percent)  # of means in nats


class Place(NamedTuple):
    """Where a number of the table stands."""

    arm: str
    row: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One mean lies below another one.

    Attributes:
        text: The claim in words.
        lower: The mean that is said to be lower …
        higher: … and the one that it is compared with.
        by: How much lower it is at least, in the unit of the means.
    """

    text: str
    lower: Place
    higher: Place
    by: float = 0.0


class Row(NamedTuple):
    """One way to measure a trained arm.

    Attributes:
        sums: Total over each group of targets, such as a document, in the order of the test text.
        settings: Of what was tuned for it, in a few words.
    """

    sums: list[float]
    settings: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one arm trained from one seed.

    Attributes:
        counts: Targets in each group.
        groups: What a group is, such as "documents".
        rows: By name; every row has as many sums as there are counts.
        facts: Anything else worth keeping, as JSON.
    """

    counts: list[int]
    groups: str
    rows: Mapping[str, Row]
    facts: Mapping[str, Any]


class Task(NamedTuple):
    """One arm to be trained and measured.

    Attributes:
        size: What the experiment's sizes hold under one name.
        arm: Name of the arm.
        seed: Of everything that is drawn at random.
        folder: Of the whole run; what `prepare` made lies there.
        advance: To be called with the work done, in tokens.
    """

    size: Any
    arm: str
    seed: int
    folder: Path
    advance: Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A training experiment with its negative controls. Its functions are those of a module, so that it can be pickled.

    Attributes:
        name: On the command line.
        summary: One sentence.
        description: What is done and what is to be kept in mind while reading the table, in Markdown.
        arms: Name and meaning of each.
        rows: Names of the rows of the table, in order.
        claims: What must come out.
        unit: How means are shown.
        sizes: Presets by name; each is a dataclass of numbers.
        prepare: Makes what all arms share in a folder, unless it is there, and returns facts about it.
        work: Tokens of work in one arm, for the progress bar.
        measure: Trains and measures one arm.
    """

    name: str
    summary: str
    description: str
    arms: Mapping[str, str]
    rows: tuple[str, ...]
    claims: tuple[Claim, ...]
    unit: Unit
    sizes: Mapping[str, Any]
    prepare: Callable[[Any, Path], dict[str, Any]]
    work: Callable[[Any, str], int]
    measure: Callable[[Task], Measured]

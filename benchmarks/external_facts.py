"""Made-up facts as English sentences: relations in several wordings, names and values that no text has."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from memlm.training import Asked

# Of each relation the last wording is never seen in training.
RELATIONS = {
    "capital": (
        "The capital of {} is {}.",
        "In those days the capital of {} was {}.",
        "Everybody knows that the capital of {} is {}.",
        "The old maps say that the capital of {} was {}.",
    ),
    "born": (
        "{} was born in {}.",
        "The place where {} was born is {}.",
        "It is said that {} was born in {}.",
        "The records show that {} was born in {}.",
    ),
    "married": (
        "{} was married to {}.",
        "The wife of {} was {}.",
        "In that year {} was married to {}.",
        "At the age of thirty {} was married to {}.",
    ),
    "river": (
        "The river which flows through {} is the {}.",
        "{} lies on the banks of the river {}.",
        "The bridge in {} crosses the river {}.",
        "The people of {} called their river the {}.",
    ),
}
_STARTS = [
    "b",
    "br",
    "ch",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
_ENDS = ["n", "r", "l", "nd", "s", "th", "k", "m", "rn", "lt", "via", "land", "ton", "mar", "dor", "wick"]


class Fact(NamedTuple):
    """A relation of two made-up names."""

    relation: str
    subject: str
    value: str


def draw(generator: np.random.Generator, count: int) -> list[Fact]:
    """Draw facts; no subject comes twice."""
    subjects: dict[str, None] = {}
    while len(subjects) < count:
        subjects[_name(generator)] = None
    relations = generator.choice(list(RELATIONS), size=count)
    return [
        Fact(str(relation), subject, _name(generator)) for relation, subject in zip(relations, subjects, strict=True)
    ]


def _name(generator: np.random.Generator) -> str:
    parts = [str(generator.choice(kind)) for kind in (_STARTS, _VOWELS, _STARTS, _VOWELS, _ENDS)]
    return "".join(parts).capitalize()


def sentence(fact: Fact, wording: int) -> tuple[str, int]:
    """Return a fact's text and the character at which the value begins."""
    before, after = RELATIONS[fact.relation][wording].rsplit("{}", 1)
    beginning = before.format(fact.subject)
    return beginning + fact.value + after, len(beginning)


def tokens(tokenizer: Any, fact: Fact, wording: int) -> tuple[list[int], int]:
    """Return a fact's token ids, without the full stop, and where the value begins."""
    text, start = sentence(fact, wording)
    encoded = tokenizer(text[:-1], add_special_tokens=False, return_offsets_mapping=True)
    ids = [tokenizer.bos_token_id, *encoded["input_ids"]]
    return ids, 1 + next(place for place, (_, end) in enumerate(encoded["offset_mapping"]) if end > start)


def asked(tokenizer: Any, fact: Fact, written: int, wording: int) -> Asked:
    """Return a fact in one wording and its question in another."""
    return Asked(*tokens(tokenizer, fact, written), *tokens(tokenizer, fact, wording))

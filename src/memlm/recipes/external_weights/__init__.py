"""external-weights: are facts that are written after training, without a gradient, known, and only these?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._experiment import Claim, Experiment, Measured, Place, Task, Unit
from . import _rows as rows
from ._sizes import FULL, TINY, Sizes

READER, MISLED = "reader", "misled"
ARMS = {
    READER: "a reader, trained to find in a table what is asked",
    MISLED: "the same, but in training the table held each answer under another name: there was nothing to be learned",
}
DESCRIPTION = """
A small Llama learns a language of two kinds of text, facts “name name answer”, which are others in every document, and
sentences of a Markov chain; then it is frozen. A reader beside its first feed-forward layer is trained to use rows of a
table that one forward pass makes of each fact; in every step the answers are drawn anew. Half of all names never occur
in that. Names have two tokens, and the reader's queries and keys are made of two positions: the model itself puts too
little of the first token into the state of the second.

The test writes facts of those names into a table on disk, each by one forward pass, and asks for them after other
words; then replaces and deletes them, half at a time. A row's number is the share of questions whose likeliest token is
not the answer; that of text without facts is what the written table adds to the frozen model's loss, 1 % being 0.01
nats a token.

Negative controls: values that stand beside other keys, rolled by one row or dealt out anew, and a reader that was
trained on such a table. “At chance” means at most 5 points better than without rows.

A claim holds where its difference and both 95 % intervals lie beyond what is claimed: Student's t over seeds (another
model, reader and choice of names) and a bootstrap of the seeds' mean over groups of facts.
"""
_CHANCE = -0.05


def _percent(mean: float) -> float:
    return 100 * mean


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f} points"


ERROR = Unit("percent wrong", _percent, _points)


def _claims() -> tuple[Claim, ...]:
    wrong, nothing = Place(READER, rows.WRONG), Place(READER, rows.NOTHING)
    recalled = (
        ("Facts of names never seen in training are recalled > 95 % once written", rows.WRITTEN),
        ("Replaced facts are answered with the new value > 95 %", rows.REPLACED),
        ("Facts stay > 95 % while others are deleted", rows.OTHERS),
    )
    chance = (
        ("Deleted facts are at chance", READER, rows.DELETED),
        ("The old value of replaced facts is at chance", READER, rows.OLD),
        ("Control: with values rolled by one row, facts are at chance", READER, rows.VALUES),
        ("Control: with values dealt out anew, facts are at chance", READER, rows.DEALT),
        ("Control: a reader that was misled in training is at chance", MISLED, rows.WRITTEN),
    )
    return (
        *(Claim(text=text, lower=Place(READER, row), higher=wrong, by=0.95) for text, row in recalled),
        *(Claim(text=text, lower=nothing, higher=Place(arm, row), by=_CHANCE) for text, arm, row in chance),
        Claim(
            text="Text without facts changes by less than 0.01 nats a token",
            lower=Place(READER, rows.TEXT),
            higher=Place(READER, rows.RIGHT),
            by=-0.01,
        ),
    )


def prepare(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Say what the text is; it is drawn while it is needed."""
    (folder / "models").mkdir(exist_ok=True)
    return {"names": sizes.names**2, "of these for the test": sizes.names**2 - sizes.names**2 // 2}


def work(sizes: Sizes, arm: str) -> int:
    """Return the tokens of the model's text and the facts of the reader's, together."""
    return sizes.model_steps * sizes.model_rows * sizes.length + sizes.steps * sizes.facts


def measure(task: Task) -> Measured:
    """Train and measure one arm."""
    from ._work import measure as do  # which loads torch

    return do(task)


EXPERIMENT = Experiment(
    name="external-weights",
    summary="Facts written into a table on disk by a forward pass, replaced and deleted, read by a frozen model",
    description=DESCRIPTION,
    arms=ARMS,
    rows=rows.ROWS,
    claims=_claims(),
    unit=ERROR,
    sizes={"full": FULL, "tiny": TINY},
    prepare=prepare,
    work=work,
    measure=measure,
)

"""product-keys-small: how many facts fit into a memory of product keys, and can new ones be added without loss?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._experiment import Claim, Experiment, Measured, Place, Task, Unit
from . import _rows as rows
from ._sizes import FULL, TINY, Sizes

ARMS = {
    "dense": "a feed-forward layer with as many multiplications as the memory",
    "dense-wide": "a feed-forward layer with as many parameters as the memory, and many times its multiplications",
    "product-keys": "a memory of product keys, each head's query normalized by itself",
    "product-keys-batch": "a memory of product keys, queries normalized over the batch, as in the paper",
}
DESCRIPTION = """
Facts are pairs of symbols with a symbol at random as their answer; there is nothing to generalize from. A model of two
embeddings, one residual block and an output layer learns them; the block is a feed-forward layer or a memory of product
keys (Lample et al. 2019, arXiv:1907.05242). The same facts, steps and order in all arms of a seed. Reported is how many
of the facts that were trained on are answered wrong: what is measured is room, not generalization.

Then new facts are learned, without the old ones, until the model knows them, in all parameters or in parts of the
memory's table alone: all of it, the slots that the new facts read more than the old ones do (TF-IDF, Lin et al. 2025,
arXiv:2510.15103), or as many slots at random. How many old facts are then answered wrong is what was forgotten. The
learning rates were chosen on the facts of a seed that is not among these.

Negative controls: the trained table rolled by one slot, so that every key has its neighbor's value; slots at random.

A claim holds where its difference and both 95 % intervals lie beyond what is claimed: Student's t over seeds (other
facts and another start) and a bootstrap of the seeds' mean over groups of facts.
"""


def _claims() -> tuple[Claim, ...]:
    dense, _, keys, batch = ARMS
    forgotten = {way: rows.after(rows.OLD, way) for way in rows.WAYS}
    learned = {way: rows.after(rows.NEW, way) for way in rows.WAYS}
    return (
        *(
            Claim(
                text=f"{arm} has room for more facts than a feed-forward layer of as many multiplications, by at least "
                "a third of them",
                lower=Place(arm, rows.KNOWN),
                higher=Place(dense, rows.KNOWN),
                by=1 / 3,
            )
            for arm in (keys, batch)
        ),
        *(
            Claim(
                text=f"Control: with its table rolled by one slot, {arm} knows nearly nothing",
                lower=Place(arm, rows.KNOWN),
                higher=Place(arm, rows.ROLLED),
                by=0.8,
            )
            for arm in (keys, batch)
        ),
        Claim(
            text="New facts are learned in the slots chosen by TF-IDF",
            lower=Place(keys, learned[rows.CHOSEN]),
            higher=Place(keys, rows.BEFORE),
            by=0.9,
        ),
        Claim(
            text="No fewer of them than in all parameters, give or take a hundredth",
            lower=Place(keys, learned[rows.CHOSEN]),
            higher=Place(keys, learned[rows.ALL]),
            by=-0.01,
        ),
        Claim(
            text="Old facts are forgotten less in slots by TF-IDF than in all parameters, by a twentieth of them",
            lower=Place(keys, forgotten[rows.CHOSEN]),
            higher=Place(keys, forgotten[rows.ALL]),
            by=0.05,
        ),
        Claim(
            text="Control: in as many slots at random, more old facts are forgotten",
            lower=Place(keys, forgotten[rows.CHOSEN]),
            higher=Place(keys, forgotten[rows.RANDOM]),
            by=0.02,
        ),
    )


def _percent(mean: float) -> float:
    return 100 * mean


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def prepare(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Say what the facts are; they are drawn from the seed."""
    return {"symbols": sizes.symbols, "facts": sizes.facts, "new facts": sizes.new}


def work(sizes: Sizes, arm: str) -> int:
    """Return the facts that the first training of an arm reads."""
    return sizes.steps * sizes.batch


def measure(task: Task) -> Measured:
    """Train and measure one arm."""
    from ._work import measure as do  # which loads torch

    return do(task)


EXPERIMENT = Experiment(
    name="product-keys-small",
    summary="A memory of product keys against feed-forward layers: room for facts, and learning without forgetting",
    description=DESCRIPTION,
    arms=ARMS,
    rows=rows.ROWS,
    claims=_claims(),
    unit=Unit("wrong answers in %", _percent, _points),
    sizes={"full": FULL, "tiny": TINY},
    prepare=prepare,
    work=work,
    measure=measure,
)

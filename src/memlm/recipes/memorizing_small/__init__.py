"""memorizing-small: does an attention layer with memory recall what only earlier segments said?"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from .._experiment import Claim, Experiment, Measured, Place, Task, Unit
from ._sizes import FULL, TINY, Sizes

ARMS = {
    "none": "no memory",
    "gate": "the paper's form: memory joined by a gate for each head",
    "joint": "one softmax over memory and segment",
    "rolled": "control: as gate, but every document reads the memory of another one, in training as well",
    "tuned": "none, then a few batches with memory (joint softmax)",
    "own keys": "control: as tuned, but the memory has key and value projections of its own, which get no gradient",
}
DESCRIPTION = """
Memorizing Transformers (Wu et al. 2022, arXiv:2203.08913) on documents in which every second token can be known only by
whoever remembers: "K V K V …", each key with a value of the document's own, read in segments by a Llama of one layer
whose embedding sees the token before. One optimizer step a segment; nothing is propagated back into earlier segments.

Nats of values that were said in earlier segments alone ("long"), in the same segment ("short"), or never ("first");
chance is ln 32 = 3.466. Every number is a mean over documents. Queries and keys have length 1 and a learned scale, in
all arms. Smaller memories are those of the trained model, not trained again.

A claim holds where its difference and both 95 % intervals lie beyond what is claimed: Student's t over seeds and a
bootstrap over documents. A claim "by −0.1" says that something is not lower by more than 0.1.
"""


def _itself(mean: float) -> float:
    return mean


def _signed(difference: float) -> str:
    return f"{difference:+.3f}"


NATS = Unit("nats a value", _itself, _signed)


WHOLE, NOTHING, ROLLED = "long", "long, no memory", "long, memory of other documents"
SMALLER = {2: "long, half the memory", 4: "long, a quarter of it", 8: "long, an eighth of it"}
ADDED = {form: f"long, {form} added without training" for form in ("joint", "gate")}
SHORT, FIRST, GATE = "short", "first", "gate, 0 to 1"
ROWS = (WHOLE, *SMALLER.values(), NOTHING, ROLLED, *ADDED.values(), SHORT, FIRST, GATE)


def _claims() -> tuple[Claim, ...]:
    nothing = Place("none", NOTHING)
    falling = (WHOLE, *SMALLER.values(), NOTHING)
    return (
        *(
            Claim(text=f"{arm} recalls from memory", lower=Place(arm, WHOLE), higher=nothing, by=3.2)
            for arm in ("gate", "joint", "tuned")
        ),
        *(
            Claim(
                text=f"gate knows less with {less.removeprefix('long, ')}",
                lower=Place("gate", more),
                higher=Place("gate", less),
                by=0.01,
            )
            for more, less in pairwise(falling)
        ),
        Claim(
            text="with no training at all, a joint softmax recalls",
            lower=Place("none", ADDED["joint"]),
            higher=nothing,
            by=2.0,
        ),
        Claim(
            text="with no training at all, it recalls more than a gate does",
            lower=Place("none", ADDED["joint"]),
            higher=Place("none", ADDED["gate"]),
            by=1.0,
        ),
        Claim(
            text="Control: the memory of other documents is of no use to gate",
            lower=nothing,
            higher=Place("gate", ROLLED),
            by=-0.1,
        ),
        Claim(
            text="Control: who is trained with the memory of other documents recalls nothing",
            lower=nothing,
            higher=Place("rolled", WHOLE),
            by=-0.2,
        ),
        Claim(text="Control: its gates fall", lower=Place("rolled", GATE), higher=Place("gate", GATE), by=0.2),
        Claim(
            text="Control: key projections without gradient recall nothing",
            lower=nothing,
            higher=Place("own keys", WHOLE),
            by=-0.3,
        ),
    )


def prepare(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Say what the text is; it is drawn from the seeds."""
    return {"keys": sizes.keys, "values": sizes.values, "test documents": sizes.test}


def work(sizes: Sizes, arm: str) -> int:
    """Return the tokens that one arm is trained on."""
    return sizes.tokens * (sizes.batches + (sizes.tuned_batches if arm in ("tuned", "own keys") else 0))


def measure(task: Task) -> Measured:
    """Train and measure one arm."""
    from ._work import measure as do  # which loads torch

    return do(task)


EXPERIMENT = Experiment(
    name="memorizing-small",
    summary="Memorizing Transformers: recall from earlier segments, by memory size, with fine-tuning and controls",
    description=DESCRIPTION,
    arms=ARMS,
    rows=ROWS,
    claims=_claims(),
    unit=NATS,
    sizes={"full": FULL, "tiny": TINY},
    prepare=prepare,
    work=work,
    measure=measure,
)

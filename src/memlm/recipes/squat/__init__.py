"""squat: at equal parameters, is it better to be deep, to be wide, to remember, or to see far?"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from ...documents import Corpus
from .._experiment import PERPLEXITY, Claim, Experiment, Measured, Place, Task
from .._sources import standard_library, write_texts
from . import _rows as rows
from ._sizes import FULL, TINY, Sizes

ARMS = {
    "deep-plain": "six layers, thin; a Llama as it comes, which begins with random weights",
    "deep": "six layers, thin; segments that see nothing of one another",
    "squat": "two layers, wide; segments that see nothing of one another",
    "squat-memory": "two layers, wide; the upper one remembers earlier segments of the document",
    "squat-long": "two layers, wide; segments eight times as long",
}
DESCRIPTION = """
A “squat” language model has a long context and few parameters. Five Llamas of about equal parameters are trained on
the same documents in the same order, as many tokens an update and as many updates; documents are read segment by
segment, and a memory (Memorizing Transformers, Wu et al. 2022, arXiv:2203.08913, one softmax with local attention, a
learned drop-off by age) is emptied where another document begins. All but one begin as models that copy: every state
holds the token before, and the last layer, which has no positions, looks where that was the present token. Training
would find this, but not in minutes. Where segments are long, an update reads the next segments of a few of the
documents in turn.

The tokenizer is byte-level BPE, made of the training text. The *window* is a segment of the short kind: a token counts
as last seen beyond it where it stands in the document before, but not among that many tokens before it.

Tokens a second are of reading the test text, two documents at a time, on one thread; bytes of state are what must be
kept of one text while it is read: keys and values of the window and of the memory, float32.

Negative controls: the memory emptied before every segment, and that of the other document.

A claim holds where its difference and both 95 % intervals lie beyond what is claimed: Student's t over seeds and a
bootstrap of the seeds' mean over documents.
"""


def _claims() -> tuple[Claim, ...]:
    plain, deep, squat, memory, long = ARMS
    return (
        Claim(
            text="Squat with memory beats deep and thin",
            lower=Place(memory, rows.ALL),
            higher=Place(deep, rows.ALL),
        ),
        Claim(
            text="… also where that begins with random weights",
            lower=Place(memory, rows.ALL),
            higher=Place(plain, rows.ALL),
        ),
        Claim(
            text="Squat with memory beats squat without, on all tokens",
            lower=Place(memory, rows.ALL),
            higher=Place(squat, rows.ALL),
        ),
        Claim(
            text="… and on tokens last seen beyond the window by at least a tenth",
            lower=Place(memory, rows.FAR),
            higher=Place(squat, rows.FAR),
            by=0.1,
        ),
        Claim(
            text="Squat with memory beats a context eight times as long",
            lower=Place(memory, rows.ALL),
            higher=Place(long, rows.ALL),
        ),
        Claim(
            text="Control: its own memory is better than an empty one",
            lower=Place(memory, rows.ALL),
            higher=Place(memory, rows.EMPTY),
        ),
        Claim(
            text="Control: its own memory is better than that of another document",
            lower=Place(memory, rows.ALL),
            higher=Place(memory, rows.OTHER),
        ),
    )


def prepare(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Write the text and the tokenizer of a run, unless its text is there, and say what the text is."""
    place, facts = folder / "text", {}
    if not place.exists():
        room = {"train": sizes.train, "valid": sizes.test, "test": sizes.test}  # nothing is tuned: valid is left
        documents = standard_library(room, room | {"test": sizes.test_file})
        write_texts(place, {name: documents[name] for name in ("train", "test")})
        facts = {"standard library of Python": platform.python_version()}
    from ...training import train_tokenizer  # which loads torch

    train_tokenizer(sizes.vocabulary, sizes.long, [str(place / "train.jsonl")], folder / "tokenizer")
    counts = {name: sum(1 for _ in Corpus(place / f"{name}.jsonl")) for name in ("train", "test")}
    return facts | {f"{name} documents": count for name, count in counts.items()}


def work(sizes: Sizes, arm: str) -> int:
    """Return the tokens that one arm trains on."""
    return sizes.steps * sizes.rows * sizes.length


def measure(task: Task) -> Measured:
    """Train and measure one arm."""
    from ._work import measure as do  # which loads torch

    return do(task)


EXPERIMENT = Experiment(
    name="squat",
    summary="At equal parameters: deep and thin, shallow and wide, with an attention memory, with a long context",
    description=DESCRIPTION,
    arms=ARMS,
    rows=rows.ROWS,
    claims=_claims(),
    unit=PERPLEXITY,
    sizes={"full": FULL, "tiny": TINY},
    prepare=prepare,
    work=work,
    measure=measure,
)

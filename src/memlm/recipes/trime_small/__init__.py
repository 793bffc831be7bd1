"""trime-small: does a model that is trained with its memory use it better than one that is not?"""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

from .._code_tokenizer import code_tokenizer
from .._experiment import PERPLEXITY, Claim, Experiment, Measured, Place, Task
from .._sources import standard_library, write_texts
from . import _rows as rows
from ._sizes import FULL, TINY, Sizes

ARMS = {
    "cross-entropy": "the plain loss, as language models are trained",
    "trime-local": "TRIME, memory: earlier positions of the same segment",
    "trime-long": "TRIME, memory: these and the earlier segments of the same document in the batch",
    "trime-external": "TRIME, memory: positions of the other segments, put together by BM25, and in a tenth of the "
    "segments those of their own",
}
DESCRIPTION = """
TRIME (Zhong, Lei, Chen 2022, arXiv:2205.12674) trains a language model with one softmax over vocabulary and memory, so
that its own vectors say how much the memory counts. Here on source code, the running Python's standard library, with
whole files held out: a small Llama, the same start, steps and order of the text in all arms but the external one, whose
batches are put together by BM25.

Everything is tuned on the validation files: temperature and drop-off by age alike for all arms, the continuous cache as
the better of its two forms, the number of neighbors for TRIME as for kNN-LM. The test files are read once. Text is read
in segments as in training, and a memory is the last tokens of the same document: “short” as many as a segment has,
“long” as many as the sizes say. The datastore holds the training text.

Negative controls: the tokens of the memory's entries are dealt out anew, with the settings of the true ones and with
settings tuned to that; and a memory at T = 1 beside a model that was trained without one.

A claim holds where its difference and both 95 % intervals lie beyond what is claimed: Student's t over seeds (another
start and order of training) and a bootstrap of the seeds' mean over the test text.
"""
TENTH = -math.log(0.9)  # nats a token that a perplexity lower by 10 % has


def _claims() -> tuple[Claim, ...]:
    plain, local, long, external = ARMS
    nothing = Place(plain, rows.NOTHING)
    return (
        Claim(
            text="TRIME local with short memory beats cross-entropy without memory by at least 10 %",
            lower=Place(local, rows.SHORT_AGE),
            higher=nothing,
            by=TENTH,
        ),
        Claim(
            text="TRIME local with short memory beats cross-entropy with a tuned cache of the same length",
            lower=Place(local, rows.SHORT_AGE),
            higher=Place(plain, rows.CACHE_SHORT_AGE),
        ),
        Claim(
            text="TRIME long with long memory beats TRIME local with the same memory",
            lower=Place(long, rows.LONG_AGE),
            higher=Place(local, rows.LONG_AGE),
        ),
        Claim(
            text="TRIME long with long memory beats cross-entropy with a tuned cache of the same length",
            lower=Place(long, rows.LONG_AGE),
            higher=Place(plain, rows.CACHE_LONG_AGE),
        ),
        Claim(
            text="TRIME external with a datastore beats kNN-LM on the cross-entropy model",
            lower=Place(external, rows.DATASTORE_TWICE),
            higher=Place(plain, rows.KNN),
        ),
        Claim(
            text="TRIME external with a datastore and long memory, as the paper has it, beats kNN-LM on the "
            "cross-entropy model",
            lower=Place(external, rows.DATASTORE_LONG),
            higher=Place(plain, rows.KNN),
        ),
        Claim(
            text="TRIME external with a datastore and long memory beats kNN-LM with a cache of the same length",
            lower=Place(external, rows.DATASTORE_LONG),
            higher=Place(plain, rows.KNN_CACHE),
        ),
        *(
            Claim(
                text=f"Control: with its tokens shuffled, the memory of {arm} gains nothing",
                lower=Place(arm, rows.NOTHING),
                higher=Place(arm, row),
            )
            for arm, row in (
                (local, rows.LONG_SHUFFLED),
                (long, rows.LONG_SHUFFLED),
                (external, rows.DATASTORE_SHUFFLED),
            )
        ),
        Claim(
            text=f"Control: with its tokens shuffled, {external} is behind cross-entropy without memory",
            lower=nothing,
            higher=Place(external, rows.DATASTORE_SHUFFLED),
        ),
        *(
            Claim(
                text=f"Control: beside the cross-entropy model, {length} memory at T = 1 hurts",
                lower=nothing,
                higher=Place(plain, row),
            )
            for length, row in (("short", rows.SHORT_PLAIN), ("long", rows.LONG_PLAIN))
        ),
    )


def prepare(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Write the text and the tokenizer of a run, and say what the text is."""
    room = {"train": sizes.train, "valid": sizes.valid, "test": sizes.test}
    longest = {"train": sizes.train, "valid": sizes.valid_file, "test": sizes.test_file}
    documents = standard_library(room, longest)
    write_texts(folder / "text", documents)
    texts = (document.text for document in documents["train"])
    code_tokenizer(texts, sizes.vocabulary, sizes.length).save_pretrained(folder / "tokenizer")
    files = {f"{name} files": len(items) for name, items in documents.items()}
    return {"standard library of Python": platform.python_version(), **files}


def work(sizes: Sizes, arm: str) -> int:
    """Return the tokens that one arm reads, about: a token of code has some three characters."""
    return sizes.steps * sizes.rows * sizes.length + (2 * sizes.valid + sizes.test) // 3


def measure(task: Task) -> Measured:
    """Train and measure one arm."""
    from ._work import measure as do  # which loads torch

    return do(task)


EXPERIMENT = Experiment(
    name="trime-small",
    summary="TRIME (training with memory) against cross-entropy, a tuned cache and kNN-LM, on Python's own sources",
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

"""The work on one arm: train, save, store, tune, measure."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...cache import Cache
from ...datastore import Datastore
from ...documents import Corpus, Document
from ...evaluation import Text
from ...evidence import INNER_PRODUCT, SQUARED_L2
from ...models import LanguageModel, load
from .._experiment import Measured, Task
from . import _measure as bench
from . import _rows as rows
from ._train import new_model, train

SPLITS = ("train", "valid", "test")
METRICS = {"cross-entropy": SQUARED_L2, "trime-external": INNER_PRODUCT}  # of the arms that have a datastore


def measure(task: Task) -> Measured:
    """Train and measure one arm; a model that an earlier run has trained is measured as it is."""
    documents = {name: list(Corpus(task.folder / "text" / f"{name}.jsonl")) for name in SPLITS}
    place = task.folder / "models" / f"{task.arm}-{task.seed}"
    started, busy = time.perf_counter(), time.process_time()
    if not place.exists():
        _train(task, documents["train"], place)
    else:
        task.advance(task.size.steps * task.size.rows * task.size.length)
    trained, busy_training = time.perf_counter(), time.process_time() - busy
    # text is read as in training: segments that see nothing of one another
    lm = load(place, device="cpu", context=1, stride=task.size.length - 1)
    with tempfile.TemporaryDirectory(dir=task.folder) as temporary:
        measured = _measure(task, lm, documents, Path(temporary) / "memory")
    seconds = {"training": trained - started, "measuring": time.perf_counter() - trained}
    # what the machine's other work does not lengthen
    of_processor = {"training": busy_training, "measuring": time.process_time() - busy - busy_training}
    return dataclasses.replace(measured, facts={"seconds": seconds, "processor seconds": of_processor})


def _train(task: Task, documents: list[Document], place: Path) -> None:
    """Train a model and put it in its place in one step."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(task.folder / "tokenizer")
    model = new_model(task.size, task.seed, tokenizer.eos_token_id)
    lm = LanguageModel(model.eval(), tokenizer, task.arm)
    ids = [lm.tokenize(document).ids for document in documents]
    train(model, task.arm, ids, task.size, task.seed, task.advance)
    place.parent.mkdir(exist_ok=True)
    staging = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(place)


def _measure(task: Task, lm: LanguageModel, documents: dict[str, list[Document]], place: Path) -> Measured:
    """Tune every way to use a memory that the arm has, and read the test text."""
    sizes = task.size
    memories: list[Datastore | Cache] = [Cache(sizes.memory)]
    if task.arm in METRICS:
        stored = Datastore.build(lm, documents["train"], place, metric=METRICS[task.arm], show_progress=False)
        memories.insert(0, stored)
    ks = [len(item) if isinstance(item, Cache) else min(sizes.k, len(item)) for item in memories]
    valid, test = Text(lm, documents["valid"]), Text(lm, documents["test"])
    cache = len(memories) - 1

    def read(change: Callable[..., Any]) -> bench.Tuned:
        return bench.read_valid(lm, memories, ks, valid, sizes.tuned, change)

    tuned = read(bench.unchanged)
    methods = bench.softmax_methods(tuned, cache, sizes.length)
    if task.arm == "cross-entropy":
        methods |= bench.cache_methods(tuned, cache, sizes.length)
        methods |= bench.knn_methods(tuned, methods[rows.CACHE_LONG_AGE].mixture)
    if task.arm == "trime-external":
        methods |= bench.datastore_methods(tuned)
    del tuned  # hundreds of megabytes
    methods |= bench.shuffled_methods(read(bench.shuffle_of(memories, valid, task.seed)), cache)
    task.advance(2 * valid.tokens)
    return bench.read_test(lm, memories, ks, test, methods, bench.shuffle_of(memories, test, task.seed), task.advance)

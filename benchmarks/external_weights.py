"""External weights: 1,000 facts as sentences on the reference model, and a table larger than a limit of memory.

    python -m benchmarks.external_weights facts DATA_FOLDER
    python -m benchmarks.external_weights table

`facts` trains a reader on facts with made-up names that are drawn anew in every step, on the training text of WikiText-2
as text without facts. Then it writes facts with other names into a table on disk, replaces and deletes them, and asks; an
answer counts where every token of the value is the likeliest one. Text without facts is WikiText-2's test split and, for
a kind of text that training has not seen, the United States Code's (DATA_FOLDER holds `<corpus>.{train,test}.jsonl.xz`).
`table` trains rows of a table in a process whose anonymous memory the operating system limits.
Results are added to benchmarks/results/external_weights.json and tabulated in external_weights.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import memlm
from memlm.layers import RowReader, add_row_reader, create_fact_bank, delete_facts, write_facts
from memlm.training import Asked, train_reader

from .external_facts import Fact, asked, draw, sentence, tokens

RESULTS = Path(__file__).parent / "results" / "external_weights.json"
LAYER, SEEN = 2, 3  # of six; wordings that training sees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("piece", choices=["facts", "table"])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--facts", type=int, default=1000)
    parser.add_argument("--layer", type=int, default=LAYER)
    options = parser.parse_args()
    found = facts(options.data, options.steps, options.facts, options.layer) if options.piece == "facts" else {}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[options.piece] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def facts(data: Path, steps: int, count: int, layer: int) -> dict[str, Any]:
    """Train a reader, then write, replace, delete and ask."""
    torch.manual_seed(0)
    lm = memlm.reference_lm()
    reader = add_row_reader(lm.model, layer, key_width=128, value_width=128, top_k=8)
    text = blocks(lm, data / "wikitext2.train.jsonl.xz", 64, 4000)
    losses: list[Any] = []

    def keep(step: int, loss: Any) -> None:
        parts = {name: float(getattr(loss, name).detach()) for name in ("answers", "found", "silent", "changed")}
        losses.append(parts)
        if step % 25 == 0:
            print(step, parts, flush=True)

    started = time.perf_counter()
    train_reader(lm.model, reader, episodes(lm, text), steps, after=keep)
    result = {
        "steps": steps,
        "layer": layer,
        "seconds of training": time.perf_counter() - started,
        "losses": losses[::25],
    }
    tests = {name: blocks(lm, data / f"{name}.test.jsonl.xz", 128, 60) for name in ("wikitext2", "law")}
    with tempfile.TemporaryDirectory() as folder:
        return result | test(lm, reader, count, tests, Path(folder))


def episodes(lm: Any, text: torch.Tensor, size: int = 64) -> Iterator[tuple[list[Asked], torch.Tensor]]:
    generator = np.random.default_rng(1)
    while True:
        items = []
        for fact in draw(generator, size):
            written, wording = generator.integers(SEEN, size=2).tolist()
            items.append(asked(lm.tokenizer, fact, written, wording))
        yield items, text[torch.from_numpy(generator.choice(len(text), 6, replace=False))]


def test(lm: Any, reader: RowReader, count: int, tests: dict[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Write facts into a table on disk and ask; half of them are replaced, the other half deleted."""
    generator = np.random.default_rng(2)
    items = draw(generator, count)
    new = [fact._replace(value=other.value) for fact, other in zip(items, draw(generator, count), strict=True)]
    names = [fact.subject for fact in items]
    before = {name: nats(lm, text) for name, text in tests.items()}
    found: dict[str, Any] = {"facts": count}
    with create_fact_bank(lm, reader, folder / "bank", rows=20 * count) as bank:

        def ask(chosen: Sequence[Fact], wording: int) -> float:
            with reader.reading(bank):
                return right(lm, chosen, wording)

        def tell(chosen: Sequence[Fact], wording: int, whole: bool = False) -> int:
            said = {fact.subject: sentence(fact, wording) for fact in chosen}
            starts = {} if whole else {name: start for name, (_, start) in said.items()}
            return write_facts(lm, bank, {name: text for name, (text, _) in said.items()}, starts=starts)

        def changes() -> dict[str, float]:
            with reader.reading(bank):
                return {name: nats(lm, text) - before[name] for name, text in tests.items()}

        found["nothing written"] = ask(items, 0)
        for whole in (False, True):
            started = time.perf_counter()
            rows = tell(items, 0, whole)
            part: dict[str, Any] = {"rows": rows, "facts a second": count / (time.perf_counter() - started)}
            part["as written"], part["seen wording"], part["unseen wording"] = (
                ask(items, wording) for wording in (0, 1, 3)
            )
            part["text, nats a token"] = changes()
            found["whole sentences" if whole else "values alone"] = part
            print(part, flush=True)
        tell(items, 0)
        bank.commit()
        ids = bank.owners.nonzero().flatten()
        bank.update(ids, values=bank.read("values", ids.roll(lm_rows(ids))))
        found["control: values of other facts"] = ask(items, 0)
        bank.rollback()
        half = count // 2
        tell(new[:half], 0)
        delete_facts(bank, names[half:])
        found["replaced, new value"], found["replaced, old value"] = ask(new[:half], 0), ask(items[:half], 0)
        found["deleted"] = ask(items[half:], 0)
        found["threshold"], found["scale"] = reader.threshold.item(), reader.log_scale.exp().item()
    return found


def lm_rows(ids: torch.Tensor) -> int:
    return len(ids) // 2


@torch.no_grad()
def right(lm: Any, items: Sequence[Fact], wording: int) -> float:
    """Return the share of facts whose value is the likeliest continuation, token after token."""
    count = 0
    for start in range(0, len(items), 50):
        batch = [tokens(lm.tokenizer, fact, wording) for fact in items[start : start + 50]]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
        best = lm.model(input_ids=ids, use_cache=False).logits.argmax(dim=-1)
        for row, (said, place) in zip(best, batch, strict=True):
            count += bool((row[place - 1 : len(said) - 1] == torch.tensor(said[place:])).all())
    return count / len(items)


@torch.no_grad()
def nats(lm: Any, text: torch.Tensor) -> float:
    parts = []
    for ids in text.split(10):
        logits = lm.model(input_ids=ids, use_cache=False).logits[:, :-1]
        parts.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double())
    return float(torch.cat(parts).mean())


def blocks(lm: Any, path: Path, length: int, count: int) -> torch.Tensor:
    """Return pieces of documents, evenly spread, shape (count, length)."""
    found = []
    for document in memlm.Corpus(path):
        ids = lm.tokenize(document).ids
        found += [ids[start : start + length] for start in range(0, len(ids) - length, length)]
        if len(found) > 20 * count:
            break
    chosen = np.linspace(0, len(found) - 1, count).astype(int)
    return torch.from_numpy(np.stack([found[number] for number in chosen]).astype(np.int64))


if __name__ == "__main__":
    main()

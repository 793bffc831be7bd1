"""External weights: 1,000 facts as English sentences, written into a table that the frozen reference model reads.

    python -m benchmarks.external_weights DATA

A reader is trained on facts with made-up names that are drawn anew in every step, on the training text of WikiText-2 as
text without facts. Then facts with other names are written into a table on disk, replaced and deleted, and asked for; an
answer counts where every token of the value is the likeliest one. Text without facts is WikiText-2's test split and, for
a kind of text that training has not seen, the United States Code's (DATA holds `<corpus>.{train,test}.jsonl.xz`).
Results: benchmarks/results/external_weights.{json,md}.
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

RESULTS = Path(__file__).parent / "results"
LAYER, WINDOW, SEEN = 2, 12, 3  # of six layers; tokens of a sentence that a key is made of; wordings that training sees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--facts", type=int, default=1000)
    options = parser.parse_args()
    found = facts(options.data, options.steps, options.facts)
    (RESULTS / "external_weights.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "external_weights.md").write_text(table(found))


def facts(data: Path, steps: int, count: int) -> dict[str, Any]:
    """Train a reader, then write, replace, delete and ask."""
    torch.manual_seed(0)
    lm = memlm.reference_lm()
    reader = add_row_reader(lm.model, LAYER, key_width=128, value_width=128, top_k=8, window=WINDOW)
    alike(reader)
    text = blocks(lm, data / "wikitext2.train.jsonl.xz", 64, 4000)
    losses: list[Any] = []

    def keep(step: int, loss: Any) -> None:
        if step % 20 == 0:
            parts = {name: float(getattr(loss, name).detach()) for name in ("answers", "found", "silent", "changed")}
            losses.append({"step": step} | parts)
            print(losses[-1], flush=True)

    started = time.perf_counter()
    train_reader(lm.model, reader, episodes(lm, text), steps, after=keep)
    seconds = time.perf_counter() - started
    tests = {name: blocks(lm, data / f"{name}.test.jsonl.xz", 128, 60) for name in ("wikitext2", "law")}
    with tempfile.TemporaryDirectory() as folder:
        found = test(lm, reader, count, tests, Path(folder))
    return {"steps": steps, "seconds of training": seconds, "losses": losses} | found


@torch.no_grad()
def alike(reader: RowReader) -> None:
    """Begin with the same map for every token of the window: a name is then found wherever in it the name stands."""
    weight = reader.query.weight.view(reader.query.out_features, reader.window, -1)
    weight.copy_(weight[:, :1].repeat(1, reader.window, 1))
    reader.key.weight.copy_(reader.query.weight)


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
        bank.update(ids, values=bank.read("values", ids.roll(len(ids) // 2)))
        found["control: values of other facts"] = ask(items, 0)
        bank.rollback()
        half = count // 2
        tell(new[:half], 0)
        delete_facts(bank, names[half:])
        found["replaced, new value"], found["replaced, old value"] = ask(new[:half], 0), ask(items[:half], 0)
        found["deleted"] = ask(items[half:], 0)
        found["threshold"], found["scale"] = reader.threshold.item(), reader.log_scale.exp().item()
    return found


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


def table(found: dict[str, Any]) -> str:
    ways = {name: found[name] for name in ("values alone", "whole sentences")}
    shares = ("as written", "seen wording", "unseen wording")
    lines = [
        "# External weights: facts as sentences, on the reference model",
        "",
        "    python -m benchmarks.external_weights DATA",
        "",
        f"A reader beside layer {LAYER} of the frozen reference model, trained for {found['steps']} steps on facts that are drawn anew in every",
        f"step, its keys made of {WINDOW} tokens. Then {found['facts']:,} facts with names that no step has seen are written by a forward pass",
        "each: made-up names of several tokens, in four relations. An answer counts where every token of the value is the",
        "likeliest one. Rows are made of the value's tokens alone, or of all tokens of the sentence.",
        "",
        "| | " + " | ".join(ways) + " |",
        "|---|---:|---:|",
        *(f"| {name} | " + " | ".join(f"{way[name]:.1%}" for way in ways.values()) + " |" for name in shares),
        "| rows | " + " | ".join(f"{way['rows']:,}" for way in ways.values()) + " |",
        *(
            f"| change of {name}, nats a token | "
            + " | ".join(f"{way['text, nats a token'][name]:+.4f}" for way in ways.values())
            + " |"
            for name in ("wikitext2", "law")
        ),
        "",
        "Asked as they were written, of the values alone:",
        "",
        "| | answered |",
        "|---|---:|",
        *(
            f"| {name} | {found[name]:.1%} |"
            for name in (
                "nothing written",
                "control: values of other facts",
                "replaced, new value",
                "replaced, old value",
                "deleted",
            )
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

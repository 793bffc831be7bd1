"""The recipe `squat` on other text than Python's own sources: code, prose, and theories of Isabelle.

    python -m benchmarks.squat DATA --runs FOLDER [--corpora code,novels,isabelle] [--seeds 1] [--processes 2]

DATA holds `<corpus>.{train,test}.jsonl.xz`. A directory of `code` is one document: its files in the order of their paths.
What is finished is kept in FOLDER; run again to go on. Results: benchmarks/results/squat.{json,md}.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memlm import Corpus, Document
from memlm.files import write_json
from memlm.recipes import Outcome, find_experiment, run_experiment
from memlm.recipes._sources import write_texts
from memlm.recipes.squat import _rows as rows
from memlm.recipes.squat import prepare

RESULTS = Path(__file__).parent / "results"
CORPORA = ("code", "novels", "isabelle")
PIECE = 300_000  # characters of one training document, at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    experiment, outcomes = find_experiment("squat"), {}
    for corpus in options.corpora.split(","):
        of_corpus = replace(experiment, prepare=partial(prepare_corpus, options.data, corpus))
        numbers = {"seeds": options.seeds, "processes": options.processes}
        outcomes[corpus] = run_experiment(of_corpus, options.runs / corpus, **numbers, say=print)
        found = {name: outcome.to_dict() for name, outcome in outcomes.items()}
        write_json(RESULTS / "squat.json", json.loads(json.dumps(found)))
        (RESULTS / "squat.md").write_text(table(outcomes))


def prepare_corpus(data: Path, corpus: str, sizes: Any, folder: Path) -> dict[str, Any]:
    """Write the beginning of a corpus as the text of a run."""
    texts = {}
    for split, room, longest in (("train", sizes.train, PIECE), ("test", sizes.test, sizes.test_file)):
        documents = documents_of(data / f"{corpus}.{split}.jsonl.xz", corpus == "code")
        order = np.random.default_rng(0).permutation(len(documents))
        chosen, left = [], room
        for number in order:
            text = documents[number].text[: min(longest, left)]
            if len(text) > sizes.length:
                chosen.append(Document(documents[number].id, text))
                left -= len(text)
        texts[split] = chosen
    write_texts(folder / "text", texts)
    return {"corpus": corpus} | prepare(sizes, folder)


def documents_of(path: Path, by_directory: bool) -> list[Document]:
    """Return the documents of a file, or one for each directory of them."""
    if not by_directory:
        return list(Corpus(path))
    folders = defaultdict(list)
    for document in sorted(Corpus(path), key=lambda item: item.id):
        folders[str(Path(document.id).parent)].append(document.text)
    return [Document(name, "\n".join(texts)) for name, texts in folders.items()]


def table(outcomes: dict[str, Outcome]) -> str:
    """All corpora side by side, then each with its claims and intervals."""
    first = next(iter(outcomes.values()))
    lines = [
        "# Squat language models",
        "",
        "    python -m benchmarks.squat DATA --runs FOLDER",
        "",
        *first.experiment.description.strip().splitlines(),
        "",
        "Perplexity a token of each corpus's own tokenizer: compare within a column.",
        "",
        "| | " + " | ".join(outcomes) + " |",
        "|---|" + "---:|" * len(outcomes),
    ]
    for arm in first.experiment.arms:
        for row in (rows.ALL, rows.FAR):
            means = [outcome.means(arm, row).mean() for outcome in outcomes.values()]
            lines.append(f"| {arm}, {row} | " + " | ".join(f"{np.exp(mean):.2f}" for mean in means) + " |")
        for fact in ("tokens a second", "bytes of state"):
            values = [np.mean([run.facts[fact] for run in outcome.runs[arm]]) for outcome in outcomes.values()]
            lines.append(f"| {arm}, {fact} | " + " | ".join(f"{value:,.0f}" for value in values) + " |")
    for corpus, outcome in outcomes.items():
        text = outcome.markdown().partition("\n")[2].replace(outcome.experiment.description.strip(), "")
        lines += ["", f"## {corpus}", "", text.strip()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

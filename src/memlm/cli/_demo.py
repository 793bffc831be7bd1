"""`memlm demo`: the main job on text that every Python installation has."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..documents import Document
from ..errors import CorpusError
from ..files import write_json
from . import _common as common

_LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data")
_SIZES = {"train": 850_000, "valid": 45_000, "test": 60_000}  # characters
_FILE = 60_000  # characters taken of one file at most


def demo(
    model: Annotated[
        str, typer.Option(help="Another causal language model: a folder or a name on the hub.")
    ] = "reference",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; replaced.")] = Path("demo"),
    json: common.Json = False,
) -> None:
    """Give a language model the standard library of Python as its memory, and measure what that is worth."""
    import shutil

    from ..datastore import Datastore
    from ..evaluation import evaluate, explain, tune_report
    from ..evaluation.report import write_report
    from ._generate import write

    def say(text: str) -> None:
        typer.echo(text, err=json)

    lm = common.load_model(model, "float32", None, None, None, None)
    splits = {name: list(documents) for name, documents in standard_library().items()}
    sizes = ", ".join(f"{len(documents)} for {name}" for name, documents in splits.items())
    say(
        f"Model: {lm.name}, {lm.model.num_parameters() / 1e6:.1f} M parameters; it has never been trained on this text."
    )
    say(f"Text: documentation and sources of Python's standard library, split by file: {sizes}.\n")

    say("1. build: one entry a token of the train files")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    memory = Datastore.build(lm, splits["train"], output / "memory")
    say(f"   {len(memory):,} entries, {memory.info()['bytes'] / 1e6:.0f} MB, search: {_search(memory.index.details)}")

    say("2. tune: λ, temperature and k on the valid files")
    tuning = tune_report(lm, memory, splits["valid"], max_tokens=8_000)
    tuning.mixture.save(output / "mixture.json")
    say(f"   {tuning.verdict()}")

    say("3. evaluate: on the test files, which nothing has seen")
    evaluation = evaluate(lm, splits["test"], memory, tuning.mixture)
    say("\n" + str(evaluation) + "\n")

    say("4. generate: a continuation, with its sources")
    prompt, passage = _passage(splits["test"])
    text = write(lm, memory, tuning.mixture, prompt, 48, 0, stream=False, do_sample=False)
    generated = explain(lm, text, memory, tuning.mixture, title="Generated text", generated_from=len(prompt))
    if not json:
        generated.print()

    say("\n5. explain: a passage of a test file")
    explained = explain(lm, passage.text, memory, tuning.mixture, title=f"{passage.id}, from the test files")
    write_report(output / "report.html", lm.name, memory, tuning, evaluation, splits["test"], [explained, generated])
    rows = [result.to_dict() for result in evaluation.results]
    write_json(output / "result.json", rows)
    say(f"   {output / 'report.html'}: the plots and the passage; {output / 'result.json'}: the table")
    if json:
        common.emit({"results": rows, "tuning": tuning.to_dict(), "generated": text}, "", True)


def standard_library() -> dict[str, Iterator[Document]]:
    """Return documents of train, valid and test: topics of Python's own documentation, and its sources, by file."""
    candidates = sorted(_documents(), key=lambda document: zlib.crc32(document.id.encode()))
    if not candidates:
        raise CorpusError("this Python has no sources of its standard library; expected .py files beside it")
    splits: dict[str, list[Document]] = {name: [] for name in _SIZES}
    filled = dict.fromkeys(_SIZES, 0)
    for number, document in enumerate(candidates):
        name = ("test", "valid")[number % 10] if number % 10 < 2 else "train"
        if filled[name] < _SIZES[name]:
            splits[name].append(document)
            filled[name] += len(document.text)
    return {name: iter(documents) for name, documents in splits.items()}


def _documents() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(id=f"help({name})", text=text[:_FILE])
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not any(part in _LEFT_OUT for part in relative.parts) and 2_000 < path.stat().st_size < 200_000:
            yield Document(id=relative.as_posix(), text=path.read_text(encoding="utf-8", errors="replace")[:_FILE])


def _passage(documents: list[Document]) -> tuple[str, Document]:
    """Choose the middle of a test file: a few lines as a prompt, and some more to explain."""
    document = max((item for item in documents if item.id.endswith(".py")), key=lambda item: len(item.text))
    lines = document.text.splitlines(keepends=True)
    middle = next(
        (n for n in range(len(lines) // 3, len(lines)) if lines[n].lstrip().startswith("def ")), len(lines) // 3
    )
    prompt = "".join(lines[max(0, middle - 6) : middle + 1]).rstrip()
    passage = "".join(lines[max(0, middle - 6) : middle + 30])
    return prompt, Document(id=document.id, text=passage)


def _search(details: dict[str, object]) -> str:
    if details["kind"] == "exact":
        return "exact"
    return f"{details['factory']}, recall@{details['recall_k']} {details['recall']}"

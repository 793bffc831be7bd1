"""`memlm demo`: the main job on text that every Python installation has."""

from __future__ import annotations

import shutil
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from ..documents import Document
from ..errors import ConfigError, CorpusError
from ..files import write_json
from . import _common as common

# Tests and other people's packages; "encodings" holds many tables that are nearly the same
_LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "pydoc_data")
_SIZES = {"train": 600_000, "valid": 24_000, "test": 48_000}  # characters
_FILE = {"train": 60_000, "valid": 4_000, "test": 4_000}  # characters taken of one file at most
_SMALLEST = 1_000  # characters of a file that are worth taking
_TUNED_TOKENS = 8_000
_NEW_TOKENS = 48
_MADE = {"memory", "mixture.json", "report.html", "result.json"}  # by an earlier demo: may be replaced


def demo(
    model: Annotated[
        str, typer.Option(help="Another causal language model: a folder or a name on the hub.")
    ] = "reference",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the results; replaces an earlier demo.")
    ] = Path("demo"),
    json: common.Json = False,
) -> None:
    """Give a language model the standard library of Python as its memory, and measure what that is worth."""
    others = {item.name for item in output.iterdir()} - _MADE if output.exists() else set()
    if others:
        raise ConfigError(f"{output} holds {min(others)}, which no demo made; name a new folder by --output")
    from ..datastore import Datastore
    from ..evaluation import evaluate, explain, tune_report
    from ..evaluation.report import write_report
    from ._generate import write

    def say(text: str) -> None:
        common.say(text, err=json)

    lm = common.load_model(model, "float32", None, None, None, None)
    splits = standard_library()
    sizes = ", ".join(f"{len(documents)} for {name}" for name, documents in splits.items())
    unseen = "; it was not trained on this text" if model == "reference" else ""
    say(f"Model: {lm.name}, {lm.model.num_parameters() / 1e6:.1f} M parameters{unseen}.")
    say(f"Text: documentation and sources of Python's standard library, split by file: {sizes}.\n")

    say("1. build: one entry a token of the train files")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    memory = Datastore.build(lm, splits["train"], output / "memory")
    info = memory.info()
    search = common.describe_search(info["index"])
    say(f"   {len(memory):,} entries, {decimal(info['bytes'])}, search: {search}")

    say("2. tune: λ, temperature and k on the valid files")
    tuning = tune_report(lm, memory, splits["valid"], max_tokens=_TUNED_TOKENS)
    tuning.mixture.save(output / "mixture.json")
    say(f"   {tuning.verdict()}")

    say("3. evaluate: on the test files, which nothing has seen")
    evaluation = evaluate(lm, splits["test"], memory, tuning.mixture)
    say("\n" + str(evaluation) + "\n")

    say("4. generate: a continuation, with its sources")
    prompt, passage = _passage(splits["test"], lm)
    text = write(lm, memory, tuning.mixture, prompt, _NEW_TOKENS, 0, stream=False, do_sample=True, top_p=0.9)
    generated = explain(
        lm, text, memory, tuning.mixture, title="Generated text", generated_from=len(prompt), leave_out_own=False
    )
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


def standard_library(scale: int = 1) -> dict[str, list[Document]]:
    """Return documents of train, valid and test: topics of Python's own documentation, and its sources, by file.

    Args:
        scale: Multiplies the sizes, for benchmarks.

    Raises:
        CorpusError: This Python has too few sources, as where its library lies in an archive or is compiled only.
    """
    root = Path(sysconfig.get_path("stdlib"))
    candidates = sorted([*_topics(), *_sources(root)], key=lambda item: (zlib.crc32(item.id.encode()), item.id))
    splits: dict[str, list[Document]] = {name: [] for name in _SIZES}
    room = {name: size * scale for name, size in _SIZES.items()}
    for number, document in enumerate(candidates):
        name = ("test", "valid")[number % 10] if number % 10 < 2 else "train"
        if room[name] >= _SMALLEST:
            text = _beginning(document.text, min(_FILE[name] * scale, room[name]))
            splits[name].append(Document(id=document.id, text=text))
            room[name] -= len(text)
    for name, documents in splits.items():
        if not any(document.id.endswith(".py") for document in documents):
            raise CorpusError(
                f"{root} has too few sources of Python's standard library (none for {name}); expected .py files, as "
                "python.org's and the distributions' full packages have them: run memlm with another Python"
            )
    return splits


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some packages leave it out
        return
    for name, text in topics.items():
        yield Document(id=f"help({name})", text=text)


def _sources(root: Path) -> Iterator[Document]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not any(part in _LEFT_OUT for part in relative.parts) and 2_000 < path.stat().st_size < 200_000:
            yield Document(id=relative.as_posix(), text=path.read_text(encoding="utf-8", errors="replace"))


def _beginning(text: str, size: int) -> str:
    """Return the first lines of a text that fit into a number of characters."""
    return text if len(text) <= size else text[: text.rfind("\n", 0, size) + 1]


def _passage(documents: list[Document], lm: Any) -> tuple[str, Document]:
    """Choose a few lines of a test file as a prompt, and a page of documentation (else more lines) to explain."""
    sources = [item for item in documents if item.id.endswith(".py")]
    document = max(sources, key=lambda item: item.text.count("\n    def "))
    lines = document.text.splitlines(keepends=True)
    third = len(lines) // 3
    middle = next((n for n in range(third, len(lines)) if lines[n].lstrip().startswith("def ")), third)
    first = max(0, middle - 6)
    code = Document(id=document.id, text="".join(lines[first : middle + 30]))
    pages = (Document(id=item.id, text=_beginning(item.text, 1_200)) for item in documents if item not in sources)
    passage = next((page for page in pages if page.text.strip()), code)
    while True:  # the prompt must leave room for what follows
        prompt = "".join(lines[first : middle + 1]).rstrip()
        if first == middle or len(lm.tokenizer.tokenize(prompt)) < lm.positions - _NEW_TOKENS:
            return prompt, passage
        first += 1

"""Running the command line inside the test's process, and the small world that it runs in."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from memlm.cli import main
from tiny_models import tiny_folder

# Sentences of two kinds in three files each, so that a memory of one text helps on another.
TEXTS = {
    "train/cats.txt": "The cat was in the house. The rain was on the roof of the house.\n" * 3,
    "train/birds.txt": "In the morning a bird was singing on the roof, and the rain was over.\n" * 3,
    "train/letters.md": "A letter was in the box; it said that the house is sold.\n" * 3,
    "valid/one.txt": "The cat was on the roof of the house. In the morning the rain was over.\n",
    "valid/two.txt": "A letter was in the house; it said that the bird is sold.\n",
    "test/one.txt": "A bird was singing in the house. The letter was on the roof.\n",
    "test/two.txt": "The rain was over, and the cat was in the box.\n",
}
_PROGRESS = ("reading keys: ", "tuning: ", "downloading: ", "uploading: ", "verifying: ")
SETTINGS = ("--lambda", "0.5", "--temperature", "10", "--k", "32")


class Outcome(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


class World(NamedTuple):
    """Folders: a tiny model, texts (train, valid, test), and a datastore of train."""

    model: Path
    texts: Path
    memory: Path


def run(*arguments) -> Outcome:
    """Run a command; every way out of it is an exit code."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return Outcome(leaving.value.code, out.getvalue(), err.getvalue())


def make_world(folder: Path) -> World:
    """Write a model and texts, and build a datastore by the command line."""
    for name, text in TEXTS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    world = World(tiny_folder("llama", folder / "tiny"), folder, folder / "memory")
    built = run("build", world.model, folder / "train", "--output", world.memory)
    assert built.code == 0, built.err
    return world


def refused(*command, place=None, left="") -> str:
    """Run a command that must be refused, and return the one line that it prints.

    Nothing may be left in the folder `place` but what begins with `left`.
    """
    before = {str(path) for path in place.rglob("*")} if place else set()
    result = run(*command)
    assert (result.code, result.out) == (2, ""), result
    lines = [line for line in result.err.splitlines() if not line.startswith(_PROGRESS)]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("memlm: ")
    after = {str(path) for path in place.rglob("*")} if place else set()
    assert not [name for name in after - before if not left or not name.startswith(left)]
    return lines[0]

"""The command line on datastores that are damaged, too new, or another model's: refused, in one clear line."""

import json
import os
import shutil

import pytest

from command_line import SETTINGS, make_world, refused, run
from manifests import current, forge
from memlm.files import file_sha256
from tiny_models import tiny_folder

KEYS = "segments/000000/keys.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory with a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat was in the house")
    return tmp_path


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def newer(memory):
    path = current(memory)
    content = json.loads(path.read_text()) | {"format_version": 99}
    path.write_text(json.dumps(content) + "\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda memory: os.truncate(memory / KEYS, 999), "keys.safetensors has 999 bytes; expected"),
        (lambda memory: flip(memory / KEYS, -1), "keys.safetensors does not match its checksum"),
        (
            lambda memory: flip(memory / "segments/000000/documents.jsonl", 9),
            "documents.jsonl does not match its checksum",
        ),
        (lambda memory: (memory / KEYS).unlink(), "keys.safetensors is missing; restore it from a copy or build again"),
        (newer, "memory has format version 99; this memlm reads up to 4: install a newer memlm"),
        (lambda memory: flip(current(memory), 99), "manifest-000002.json is not a sound manifest"),
        (
            lambda memory: current(memory).unlink(),
            "manifest-000002.json is not a sound manifest (FileNotFoundError",
        ),
        (shutil.rmtree, "memory holds no datastore; `memlm build` makes one"),
    ],
    ids=["truncated", "flipped bit", "flipped text", "missing file", "newer", "manifest", "no manifest", "nothing"],
)
def test_datastores_that_cannot_be_opened(world, place, damage, words):
    damage(shutil.copytree(world.memory, place / "memory"))
    for command in (["info", "memory"], ["eval", world.model, "memory", "text.txt", *SETTINGS], ["doctor", "memory"]):
        assert words in refused(*command, place=place)


@pytest.mark.parametrize(
    ("changed", "change"),
    [(300, lambda byte: byte ^ 0x02), (1, lambda byte: byte ^ 0x80), (1, lambda byte: 0x7E)],
    ids=["most", "one", "one to NaN"],
)
def test_doctor_finds_keys_that_were_changed_together_with_their_checksums(world, place, changed, change):
    memory = shutil.copytree(world.memory, place / "memory")
    keys, manifest = memory / KEYS, current(memory)
    data = bytearray(keys.read_bytes())
    for offset in range(1, 64 * changed, 2):  # the upper bytes of the numbers in the last keys
        data[-offset] = change(data[-offset])
    keys.write_bytes(data)
    content = json.loads(manifest.read_text())
    content["segments"][0]["files"]["keys.safetensors"]["sha256"] = file_sha256(keys)
    forge(memory, content)
    assert run("info", memory).code == 0, "the tampering is not consistent"
    result = run("doctor", memory, "--model", world.model)
    assert result.code == 1
    assert result.out.endswith("problem: recomputed keys differ from the stored ones: other weights, or other code\n")
    report = run("doctor", memory, "--model", world.model, "--json")
    assert (report.code, len(json.loads(report.out)["problems"])) == (1, 1)


@pytest.mark.parametrize("other", ["gpt2", "tokenizer", "shorter"])
def test_another_model_is_refused_and_both_are_named(world, place, other):
    tokenizer = "reversed" if other == "tokenizer" else "bytes"
    folder = tiny_folder("gpt2" if other == "gpt2" else "llama", place / other, tokenizer=tokenizer)
    if other == "shorter":
        config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 64}
        (folder / "config.json").write_text(json.dumps(config))
    for command in (
        ["eval", other, world.memory, "text.txt", *SETTINGS],
        ["tune", other, world.memory, "text.txt"],
        ["generate", other, world.memory, "The cat", *SETTINGS],
        ["explain", other, world.memory, "The cat", *SETTINGS],
        ["overlap", other, world.memory, "text.txt"],
        ["doctor", world.memory, "--model", other],
    ):
        line = refused(*command, place=place)
        assert "built with" in line
        assert "tiny" in line
        assert other in line

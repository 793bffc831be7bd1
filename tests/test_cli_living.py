"""The command line on a datastore that changes, verb by verb."""

import json
import re
import shutil

import pytest

from command_line import SETTINGS, TEXTS, make_world, refused, run
from memlm import Datastore

KEYS = "segments/000000/keys.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("living"))


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A working directory with a copy of the datastore and new texts."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.memory, tmp_path / "memory")
    (tmp_path / "new.txt").write_text("The box was sold in the morning.")
    return tmp_path


def documents(path="memory"):
    return {item["id"]: item["text"] for item in Datastore(path).documents()}


def result_of(*command):
    result = run(*command, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_a_day_in_the_life_of_a_datastore(world, place):
    before = documents()
    shown = run("add", world.model, "memory", "new.txt")
    assert shown.out.startswith("memory: 1 document added, 0 in the place of others; now ")
    assert "of 4 documents, version 3" in shown.out
    assert "reading keys" in shown.err
    assert documents() == before | {"new.txt": "The box was sold in the morning."}
    again = result_of("add", world.model, "memory", world.texts / "train")
    assert (again["added"], again["version"]) == (0, 3)

    (place / "new.txt").write_text("The box was bought.")
    words = "'new.txt' is stored already, with other content; replace it, or give the new one another id"
    assert words in refused("add", world.model, "memory", "new.txt")
    assert result_of("update", world.model, "memory", "new.txt")["replaced"] == 1
    assert documents()["new.txt"] == "The box was bought."

    cats = next(name for name in before if "cats" in name)
    assert result_of("remove", "memory", cats, "--dry-run")["removed"] == [cats]
    assert cats in documents()
    assert result_of("remove", "memory", "--pattern", "*cats*")["documents"] == 3
    assert cats not in documents()
    (place / "cats.txt").write_text(TEXTS["train/cats.txt"])
    found = run("audit", "memory", cats, "--text", "cats.txt")
    assert found.code == 1
    assert "version 4 holds it: compact the datastore" in found.out
    assert "segments/000000/documents.jsonl holds pieces of its text" in found.out
    assert "on the disk until `memlm compact`" in run("info", "memory").out

    versions = result_of("history", "memory")["versions"]
    assert [item["change"].split()[0] for item in versions] == ["build", "index", "add", "add", "remove"]
    assert "remove 1 document" in run("history", "memory").out
    assert result_of("rollback", "memory", "4")["documents"] == 4
    assert cats in documents()
    assert result_of("rollback", "memory", "5")["documents"] == 3

    compacted = result_of("compact", "memory", "--index", "IVF2,Flat")
    assert compacted["bytes"] < compacted["bytes_before"] + 20_000
    assert Datastore("memory").index.details["factory"] == "IVF2,Flat"
    gone = run("audit", "memory", cats, "--text", "cats.txt")
    assert (gone.code, gone.out) == (0, f"memory: no trace of {cats!r}\n")
    assert run("verify", "memory").out == "memory: sound\n"
    merged = result_of("merge", "memory", world.memory)
    assert merged["added"] == 1
    assert documents() == before | {"new.txt": "The box was bought."}
    for verb in ("tune", "eval"):
        assert run(verb, world.model, "memory", world.texts / "valid").code in (0, 2)


def test_keys_are_compressed(world, place):
    before = documents()
    shown = run("compress", "memory")
    assert shown.code == 0, shown.err
    assert re.match(r"memory: keys of 16 × int8, [\d.]+ kB → [\d.]+ kB, search: exact; now \d+ entries of 3", shown.out)
    assert "copying" in shown.err
    assert documents() == before
    assert "compressed from 32 × float16 to 16 × int8" in run("info", "memory").out
    assert result_of("info", "memory")["keys"] == {"dtype": "int8", "width": 16}
    assert result_of("add", world.model, "memory", "new.txt")["documents"] == 4
    for verb, text in (("eval", world.texts / "test"), ("explain", "The cat was")):
        assert run(verb, world.model, "memory", text, *SETTINGS).code == 0
    recomputed = run("doctor", "memory", "--model", world.model)
    assert recomputed.code == 0, recomputed.err
    assert run("verify", "memory").out == "memory: sound\n"
    words = "the keys of memory are compressed already, to 16 × int8; build again to compress them in another way"
    assert words in refused("compress", "memory", place=place)
    shutil.rmtree("memory")
    shutil.copytree(world.memory, "memory")
    result = result_of("compress", "memory", "--width", "32", "--keys", "float16", "--index", "IVF2,Flat")
    assert result["keys"] == {"dtype": "float16", "width": 32}
    assert Datastore("memory").index.details["factory"] == "IVF2,Flat"


def test_a_damaged_version_can_be_left(world, place):
    before = documents()
    result_of("add", world.model, "memory", "new.txt")
    shutil.rmtree(place / "memory" / "segments" / Datastore("memory").manifest.segments[-1].name)
    assert "is missing; restore it" in refused("info", "memory")
    assert len(result_of("history", "memory")["versions"]) == 3
    assert result_of("rollback", "memory", "2")["documents"] == 3
    assert documents() == before


def test_a_condition_that_is_no_json_is_a_text(world, place):
    lines = [{"id": name, "text": "The cat was here.", "note": note} for name, note in (("a", "[" * 10**5), ("b", 1))]
    (place / "noted.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result_of("add", world.model, "memory", "noted.jsonl")
    assert result_of("remove", "memory", "--where", "note=" + "[" * 10**5)["removed"] == ["a"]
    assert result_of("remove", "memory", "--where", "note=true")["removed"] == []
    assert result_of("remove", "memory", "--where", "note=1.0")["removed"] == ["b"]


def test_entries_are_merged(world, place):
    before, whole = documents(), len(Datastore("memory"))
    (place / "test.txt").write_text(TEXTS["test/one.txt"])
    dry = run("prune", "memory", "--neighbors", "20", "--dry-run")
    assert re.match(r"memory: \d+ of \d+ entries would be merged into others; now \d+ entries of 3", dry.out), dry
    assert len(Datastore("memory")) == whole
    shown = run("prune", "memory", "--neighbors", "20")
    assert shown.code == 0, shown.err
    assert re.match(r"memory: \d+ of \d+ entries merged into others, [\d.]+ kB → [\d.]+ kB; now \d+ entr", shown.out)
    assert dry.out.split()[1] == shown.out.split()[1] != "0"
    assert "finding what is alike" in shown.err
    assert "copying" in shown.err
    assert documents() == before
    left = result_of("info", "memory")
    assert left["entries"] + left["merged"] == whole
    assert "more, which these stand for" in run("info", "memory").out
    assert result_of("add", world.model, "memory", "new.txt")["documents"] == 4
    for command in (
        ("eval", world.model, "memory", "test.txt", *SETTINGS),
        ("explain", world.model, "memory", "The cat was", *SETTINGS),
        ("generate", world.model, "memory", "The cat was", *SETTINGS, "--max-new-tokens", "3"),
        ("overlap", world.model, "memory", "test.txt"),
        ("doctor", "memory", "--model", world.model),
        ("tune", world.model, "memory", world.texts / "valid", "--mixture", "auto"),
    ):
        done = run(*command)
        assert done.code == 0, (command, done.err)
    assert run("verify", "memory").out == "memory: sound\n"
    shutil.rmtree("memory")
    shutil.copytree(world.memory, "memory")
    options = ("--neighbors", "20", "--distance", "1e9", "--seed", "3", "--index", "IVF2,Flat")
    result = result_of("prune", "memory", *options)
    assert result["merged"] + result["entries"] == whole
    assert Datastore("memory").index.details["factory"] == "IVF2,Flat"
    again = result_of("prune", "memory", "--neighbors", "0")
    assert (again["merged"], again["version"], again["dry_run"]) == (0, result["version"], False)
    assert " merged into others, so nothing was written; now " in run("prune", "memory", "--neighbors", "0").out


def test_verify_finds_damage(place):
    data = bytearray((place / "memory" / KEYS).read_bytes())
    data[-1] ^= 1
    (place / "memory" / KEYS).write_bytes(data)
    result = run("verify", "memory")
    assert result.code == 1
    assert f"problem: memory/{KEYS} does not match its checksum" in result.out
    assert len(json.loads(run("verify", "memory", "--json").out)["problems"]) == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["remove", "memory"], "nothing says what to remove; give ids, --pattern or --where"),
        (["remove", "memory", "nobody"], "no document has the id 'nobody'; nothing was removed"),
        (["remove", "memory", "--where", "year"], "--where is 'year'; expected KEY=VALUE"),
        (["rollback", "memory", "9"], "version is 9; expected one that is kept: 1 to 2"),
        (["merge", "memory", "nowhere"], "nowhere holds no datastore"),
        (["compact", "nowhere"], "nowhere holds no datastore"),
        (["compact", "memory", "--index", "nonsense"], "FAISS does not take 'nonsense'"),
        (["compress", "nowhere"], "nowhere holds no datastore"),
        (["compress", "memory", "--width", "0"], "width is 0; expected 1 to 32, the numbers in a key"),
        (["compress", "memory", "--width", "33"], "width is 33; expected 1 to 32, the numbers in a key"),
        (["compress", "memory", "--keys", "int4"], "key type is 'int4'; expected int8 or float16"),
        (["compress", "memory", "--index", "nonsense"], "FAISS does not take 'nonsense'"),
        (["prune", "nowhere"], "nowhere holds no datastore"),
        (["prune", "memory", "--neighbors", "-1"], "neighbors is -1; expected 0 (only equal keys) to 4,096"),
        (["prune", "memory", "--distance", "nan"], "distance is nan; expected a squared distance of at least 0"),
        (["prune", "memory", "--distance", "-1"], "distance is -1.0; expected a squared distance of at least 0"),
        (["prune", "memory", "--index", "nonsense"], "FAISS does not take 'nonsense'"),
        (["audit", "nowhere", "a"], "nowhere holds no datastore"),
        (["history", "nowhere"], "nowhere holds no datastore"),
        (["audit", "memory", "a", "--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(place, command, words):
    before = documents()
    assert words in refused(*command, place=place)
    assert documents() == before


def test_another_model_cannot_add(world, place):
    from tiny_models import tiny_folder

    other = tiny_folder("gpt2", place / "gpt2")
    assert "built with" in refused("add", other, "memory", "new.txt")


def test_metadata_chooses_what_is_removed(world, place):
    lines = [{"id": f"n{year}", "text": "The cat was here.", "year": year} for year in (2023, 2024)]
    (place / "dated.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result_of("add", world.model, "memory", "dated.jsonl")
    assert result_of("remove", "memory", "--where", "year=2024")["removed"] == ["n2024"]
    assert result_of("remove", "memory", "--where", "year=2024")["removed"] == []

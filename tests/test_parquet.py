"""Exports and imports: everything goes there and back, damage and forgery are noticed, nothing half-written stays."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import make_world, refused, run
from fake_encoder import FakeEncoder, random_documents
from memlm import Datastore, Document
from memlm.datastore import Export, _export, verify
from memlm.datastore._manifest import content_sha256
from memlm.datastore._parquet import checked_settings
from memlm.errors import ConfigError, DatastoreCorrupt, DatastoreError, IndexError_

QUIET = {"show_progress": False}


def content(memory):
    """Everything that a reader can learn, by document, keys as bits."""
    rows = {}
    for item in memory.documents():
        first, stop = item["entries"]
        keys = memory.keys.gather_keys(np.arange(first, stop))
        bits = keys.view(torch.int16).numpy().tobytes()
        spans = [(memory.provenance(row).start, memory.provenance(row).token) for row in range(first, stop)]
        rows[item["id"]] = (item["text"], json.dumps(item["metadata"]), memory.values[first:stop].tolist(), spans, bits)
    return rows


def build(documents, path, **more):
    return Datastore.build(FakeEncoder(), documents, path, **QUIET | {"index": "exact", "segment_entries": 300} | more)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """A datastore of three segments; no test may change it."""
    documents = [Document(item.id, item.text, {"year": 2000 + place}) for place, item in enumerate(random_documents(8))]
    return build(documents, tmp_path_factory.mktemp("parquet") / "memory")


@pytest.fixture
def exported(memory, tmp_path):
    """An export with keys, to be damaged."""
    memory.to_parquet(tmp_path / "memory.parquet", keys=True)
    return tmp_path / "memory.parquet"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_import_equals_what_was_exported(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(_export, "_GROUP_BYTES", 4000)
    memory = build(random_documents(8), tmp_path / "memory", key_dtype=dtype)
    memory.to_parquet(tmp_path / "m.parquet", keys=True)
    assert pq.ParquetFile(tmp_path / "m.parquet").num_row_groups > len(memory.manifest.segments) == 4
    again = Datastore.from_parquet(tmp_path / "m.parquet", tmp_path / "again", index="IVF2,Flat", **QUIET)
    assert content(again) == content(memory)
    assert again.manifest.content_sha256 == memory.manifest.content_sha256
    for name in ("encoder", "tokenizer", "windows", "metric", "keys", "values", "corpus"):
        assert getattr(again.manifest, name) == getattr(memory.manifest, name)
    assert (again.manifest.version, again.manifest.change) == (1, "import of m.parquet")
    assert again.index.details["factory"] == "IVF2,Flat"
    assert verify(tmp_path / "again") == []
    assert again.add(FakeEncoder(), [Document("new", "xnew")]) == (1, 0)  # the same encoder


def test_other_programs_can_read_it(memory, exported):
    table = pq.read_table(exported)
    assert table.column_names == ["id", "text", "metadata", "values", "spans", "keys"]
    for row, item in zip(table.to_pylist(), memory.documents(), strict=True):
        first, stop = item["entries"]
        assert (row["id"], row["text"], json.loads(row["metadata"])) == (item["id"], item["text"], item["metadata"])
        assert row["values"] == memory.values[first:stop].tolist() == [ord(letter) for letter in item["text"]]
        assert row["spans"] == [[place, place + 1] for place in range(stop - first)]
        assert row["keys"] == memory.keys.gather_keys(np.arange(first, stop)).tolist()


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
METADATA = st.dictionaries(
    st.text(max_size=3), st.none() | st.integers() | st.floats() | st.text(max_size=3), max_size=3
)


@settings(max_examples=20)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.tuples(TEXTS, METADATA), min_size=1
    )
)
def test_any_document_goes_there_and_back(tmp_path_factory, documents):
    place = tmp_path_factory.mktemp("any")
    memory = build([Document(name, *rest) for name, rest in documents.items()], place / "memory")
    memory.to_parquet(place / "m.parquet", keys=True)
    again = Datastore.from_parquet(place / "m.parquet", place / "again", **QUIET)
    assert content(again) == content(memory)
    assert again.manifest.content_sha256 == memory.manifest.content_sha256


def test_an_id_that_parquet_does_not_take_is_named(tmp_path):
    memory = build([Document("half \ud800", "xtext")], tmp_path / "memory")
    with pytest.raises(DatastoreError, match="Parquet does not take the id 'half"):
        memory.to_parquet(tmp_path / "m.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_what_was_removed_is_not_exported(memory, tmp_path):
    changed = Datastore(shutil.copytree(memory.path, tmp_path / "memory"))
    changed.remove(["d0", "d1", "d2", "d5"])  # the first segment, and a document of another
    changed.to_parquet(tmp_path / "m.parquet", keys=True)
    table = pq.read_table(tmp_path / "m.parquet")
    assert table["id"].to_pylist() == ["d3", "d4", "d6", "d7"]
    again = Datastore.from_parquet(tmp_path / "m.parquet", tmp_path / "again", **QUIET)
    assert content(again) == content(changed)
    assert again.slots == len(again) == len(changed)
    changed.remove(["d3", "d4", "d6", "d7"])
    changed.to_parquet(tmp_path / "empty.parquet", keys=True)
    assert len(Datastore.from_parquet(tmp_path / "empty.parquet", tmp_path / "empty", **QUIET)) == 0


def test_without_keys_an_encoder_makes_them(memory, tmp_path):
    memory.to_parquet(tmp_path / "m.parquet")
    assert "keys" not in pq.read_table(tmp_path / "m.parquet").column_names
    with pytest.raises(ConfigError, match=r"m\.parquet has no keys; name the model that is to make them"):
        Datastore.from_parquet(tmp_path / "m.parquet", tmp_path / "again", **QUIET)
    again = Datastore.from_parquet(tmp_path / "m.parquet", tmp_path / "again", FakeEncoder(), **QUIET)
    assert content(again) == content(memory)
    assert again.manifest.corpus["source"] == str(tmp_path / "m.parquet")


def forge(file, change_rows=None, change_settings=None):
    """Write the file anew with other rows or settings, and a checksum that fits."""
    table = pq.read_table(file)
    written = json.loads(pq.ParquetFile(file).metadata.metadata[b"memlm"])
    written.pop("sha256")
    if change_settings:
        change_settings(written)
    if change_rows:
        rows = table.to_pylist()
        change_rows(rows)
        table = pa.Table.from_pylist(rows, schema=table.schema)
        written |= {"segments": [1] if rows else [], "documents": len(rows)}
        written["entries"] = sum(len(row["values"] or ()) for row in rows)
    groups = {"row_group_size": 1000} if change_rows else {}
    text = json.dumps({**written, "sha256": content_sha256(written)})
    table = table.replace_schema_metadata({"memlm": text})
    if not change_rows:  # as many row groups as before
        with pq.ParquetWriter(file.with_name("forged"), table.schema) as writer:
            reader = pq.ParquetFile(file)
            for group in range(reader.num_row_groups):
                writer.write_table(reader.read_row_group(group).replace_schema_metadata(table.schema.metadata))
        file.with_name("forged").replace(file)
        return
    pq.write_table(table, file, **groups)


def assert_refused(file, match):
    before = sorted(path.name for path in file.parent.iterdir())
    with pytest.raises(DatastoreCorrupt, match=match) as raised:
        Datastore.from_parquet(file, file.parent / "again", **QUIET)
    assert str(file) in str(raised.value)
    assert "export it again" in str(raised.value)
    assert sorted(path.name for path in file.parent.iterdir()) == before


def test_the_forger_of_these_tests_can_write_a_sound_file(memory, exported):
    forge(exported)
    assert content(Datastore.from_parquet(exported, exported.parent / "a", **QUIET)) == content(memory)
    forge(exported, lambda rows: None)
    assert content(Datastore.from_parquet(exported, exported.parent / "b", **QUIET)) == content(memory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda written: written.update(format="x"), "its format is 'x'"),
        (lambda written: written.update(format_version=2), "its format version is 2"),
        (lambda written: written.pop("encoder"), "lacks 'encoder'"),
        (lambda written: written.update(metric="cosine"), "its metric is 'cosine'"),
        (lambda written: written["keys"].update(width=9), "its column 'keys' has the type"),
        (lambda written: written["keys"].update(width=0), "positive width"),
        (lambda written: written["keys"].update(dtype="bfloat16"), "its column 'keys' has the type"),
        (lambda written: written["tokenizer"].update(vocab_size=-1), "expected a whole number"),
        (lambda written: written["tokenizer"].update(vocab_size=100), r"token id \d+; expected ids below 100"),
        (lambda written: written["encoder"].pop("key_site"), "lacks 'key_site'"),
        (lambda written: written["encoder"].pop("dtype"), "encoder lacks 'dtype'"),
        (lambda written: written["windows"].update(stride="1"), "expected a whole number"),
        (lambda written: written["windows"].update(stride=0), r"windows are .*'stride': 0.*; expected .* at least 1"),
        (lambda written: written["windows"].update(stride=-1), "stride is '-1'; expected a whole number, not negative"),
        (lambda written: written["windows"].update(context=0), r"windows are .*'context': 0.*; expected .* at least 1"),
        (lambda written: written.update(segments=[9]), "row groups"),
        (lambda written: written.update(segments=[0, *written["segments"]]), "row groups"),
        (lambda written: written.update(documents=9), "8 rows; expected 9"),
        (lambda written: written.update(entries=9), "expected 9"),
        (lambda written: written.update(corpus="x"), "corpus is 'x'; expected dict"),
    ],
)
def test_forged_settings_are_refused(exported, change, words):
    forge(exported, change_settings=change)
    assert_refused(exported, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[1].update(id="d0"), "two documents with the id 'd0'"),
        (lambda rows: rows[1].update(metadata="[]"), r"metadata of 'd1' is '\[\]'; expected a JSON object"),
        (lambda rows: rows[1].update(id=""), "a document whose id is ''; expected one character at least"),
        (
            lambda rows: rows[1].update(text=" \n", values=[], spans=[], keys=[]),
            "text of 'd1' is ' .n'; expected something",
        ),
        (lambda rows: rows[1].update(metadata="{"), "JSONDecodeError"),
        (lambda rows: rows[1].update(text="x"), "entries of 'd1' lie outside its text"),
        (lambda rows: rows[1]["spans"].__setitem__(3, [4, 3]), "entries of 'd1' lie outside its text"),
        (lambda rows: rows[1]["spans"].pop(), "other numbers of values and of spans"),
        (lambda rows: rows[1]["keys"].pop(), "a row group of 808 entries has 807 keys"),
        (
            lambda rows: rows[1]["keys"][2].__setitem__(0, math.inf),
            "number 0 of key 103 in row group 0 is inf; expected",
        ),
        (
            lambda rows: rows[7]["keys"][1].__setitem__(3, math.nan),
            "number 3 of key 708 in row group 0 is nan; expected",
        ),
        (lambda rows: rows[1]["values"].__setitem__(0, 1 << 31), "token id 2147483648"),
    ],
)
def test_forged_rows_are_refused(exported, change, words):
    forge(exported, change)
    assert_refused(exported, words)


def test_columns_of_other_kinds_and_nulls_are_refused(exported):
    table = pq.read_table(exported)
    written = pq.ParquetFile(exported).metadata.metadata[b"memlm"]
    changes = {
        "it has the columns": table.drop_columns(["spans"]),
        "its column 'values' has the type": table.set_column(3, "values", table["values"].cast(pa.list_(pa.int64()))),
        "its column 'text' holds nulls": table.set_column(1, "text", pa.array([None] * 8, pa.string())),
    }
    for words, changed in changes.items():
        with pq.ParquetWriter(exported, changed.schema) as writer:
            for first, stop in ((0, 2), (2, 4), (4, 6), (6, 8)):
                writer.write_table(changed.slice(first, stop - first))
            writer.add_key_value_metadata({"memlm": written})
        assert_refused(exported, words)


def test_damage_anywhere_is_noticed_or_harmless(memory, exported, tmp_path):
    """Every page has a checksum; in what lies between them a flipped bit may mean nothing, but never other content."""
    whole, held, noticed = exported.read_bytes(), content(memory), 0
    places = np.random.default_rng(0).integers(0, len(whole), 60)
    for number, place in enumerate(places):
        data = bytearray(whole)
        data[place] ^= 1 << (number % 8)
        exported.write_bytes(data)
        try:
            again = Datastore.from_parquet(exported, tmp_path / "again", **QUIET)
        except DatastoreCorrupt:
            noticed += 1
            assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.parquet"]
        else:
            assert content(again) == held
            shutil.rmtree(tmp_path / "again")
    assert noticed > 40
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        exported.write_bytes(whole[:size])
        assert_refused(exported, "not a sound export")


def test_another_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    assert_refused(tmp_path / "other.parquet", "it lacks the metadata of `memlm export`")
    with pytest.raises(FileNotFoundError):
        Export(tmp_path / "nowhere.parquet")


def test_errors_leave_nothing(memory, exported, tmp_path, monkeypatch):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(IndexError_):
        Datastore.from_parquet(exported, tmp_path / "again", index="nonsense", **QUIET)
    with pytest.raises(IndexError_):
        Datastore.from_parquet(exported, tmp_path / "again", index="IVF100000,Flat", **QUIET)

    def fail(*arguments, **settings):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", fail)
        with pytest.raises(OSError, match="No space left"):
            Datastore.from_parquet(exported, tmp_path / "again", **QUIET)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            memory.to_parquet(tmp_path / "other.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    for target in (exported, tmp_path):
        with pytest.raises(ConfigError, match="exists already; name a new one, or remove it first"):
            memory.to_parquet(target)
        with pytest.raises(ConfigError, match="exists already; name a new one, or remove it first"):
            Datastore.from_parquet(exported, target, **QUIET)


def test_what_a_killed_import_left_is_removed_by_the_next(memory, exported, tmp_path):
    script = (
        "import os, signal, sys; from memlm import Datastore; from memlm.datastore import _import\n"
        "_import.segment_used = lambda manifest: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Datastore.from_parquet(*sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", script, exported, tmp_path / "again"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".again.") for path in tmp_path.iterdir())
    assert not (tmp_path / "again").exists()
    again = Datastore.from_parquet(exported, tmp_path / "again", **QUIET)
    assert content(again) == content(memory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "memory.parquet"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_the_command_line(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("export", world.memory, "with.parquet", "--keys", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["documents"], told["keys"], told["bytes"]) == (3, True, Path("with.parquet").stat().st_size)
    assert "exporting: " in done.err
    done = run("export", world.memory, "without.parquet")
    assert done.out.startswith("without.parquet: 3 documents without keys, ")
    done = run("import", "with.parquet", "--output", "a", "--json")
    assert json.loads(done.out)["entries"] == len(Datastore(world.memory))
    assert run("verify", "a").out == "a: sound\n"
    assert content(Datastore("a")) == content(Datastore(world.memory))
    done = run("import", "without.parquet", "--output", "b", "--model", world.model, "--index", "exact")
    assert "keys from last_ffn_input, search: exact" in done.out
    assert content(Datastore("b")) == content(Datastore(world.memory))

    for command, words in (
        (["export", "nowhere", "c.parquet"], "nowhere holds no datastore"),
        (["export", world.memory, "with.parquet"], "with.parquet exists already"),
        (["import", "without.parquet", "--output", "c"], "has no keys; name the model that is to make them by --model"),
        (["import", "with.parquet", "--output", "a"], "a exists already"),
        (["import", "nowhere.parquet", "--output", "c"], "nowhere.parquet: No such file or directory"),
        (["import", world.texts / "train" / "cats.txt", "--output", "c"], "is not a sound export"),
        (["import", "with.parquet", "--output", "c", "--index", "nonsense"], "FAISS does not take 'nonsense'"),
    ):
        assert words in refused(*command, place=tmp_path)


def test_a_missing_package_is_one_clear_line(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    words = "Parquet files need pyarrow, which is not installed; pip install pyarrow"
    assert words in refused("export", world.memory, tmp_path / "m.parquet", place=tmp_path)
    assert words in refused("import", tmp_path / "m.parquet", "--output", tmp_path / "m", place=tmp_path)


def test_compressed_keys_stay_where_they_are(tmp_path):
    """An export has keys as a model gave them; without keys it is as good as any."""
    memory = build(random_documents(4), tmp_path / "memory")
    memory.compress(memory.width // 2)
    with pytest.raises(ConfigError, match=r"the keys are compressed.*export without keys"):
        memory.to_parquet(tmp_path / "memory.parquet", keys=True)
    assert not (tmp_path / "memory.parquet").exists()
    memory.to_parquet(tmp_path / "memory.parquet", keys=False)
    assert Export(tmp_path / "memory.parquet").manifest.keys["width"] == memory.width


@pytest.mark.parametrize(("value", "message"), [("\ud800", "surrogates not allowed"), (float("nan"), "float values")])
def test_settings_that_no_manifest_can_hold_are_noticed_before_one_is_written(memory, exported, value, message):
    found = json.loads(pq.ParquetFile(exported).metadata.metadata[b"memlm"])
    found.pop("sha256")
    found["encoder"]["name"] = value
    with pytest.raises(ValueError, match=message):
        checked_settings(json.dumps({**found, "sha256": "0"}).encode())

"""Manifests: damaged, from a newer memlm, or made to deceive; and folders that are no place for a datastore."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fake_encoder import FakeEncoder, random_documents
from manifests import current, forge
from memlm import Datastore, Document
from memlm.datastore import FORMAT_VERSION, Manifest
from memlm.datastore._part import Part
from memlm.errors import DatastoreCorrupt, DatastoreError, FormatVersionError, IndexError_


@pytest.fixture
def changed(copied):
    """Return a function that changes the manifest of a sound datastore, checksum included, and opens the datastore."""
    original = json.loads(current(copied).read_text())

    def change(path, value):
        content = json.loads(json.dumps(original))
        place = content
        *outer, last = path.split("/")
        for name in outer:
            place = place[int(name) if isinstance(place, list) else name]
        if value is KeyError:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
        forge(copied, content)
        return Datastore(copied)

    return change


def test_the_checksum_is_what_the_format_says(changed, memory):
    assert len(changed("created_by", "another program")) == len(memory)


def test_a_flipped_bit_is_noticed_wherever_it_is(copied):
    for file in (current(copied), copied / "current.json"):
        data = file.read_bytes()
        for place in range(0, len(data), 5):
            flipped = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
            file.write_bytes(flipped)
            with pytest.raises(DatastoreError):
                Manifest.load(copied)
        file.write_bytes(data)
    assert Manifest.load(copied)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**9])
def test_a_newer_format_is_told_from_a_damaged_one(changed, version):
    message = f"has format version {version}; this memlm reads up to {FORMAT_VERSION}: install a newer memlm"
    with pytest.raises(FormatVersionError, match=message):
        changed("format_version", version)


PATHS = ["../000000", "/etc", "a/b", "..", "", "000000\n", "000000/../000000", "C:", "0\0", 7, None]
FILES = ["../keys.safetensors", "/etc/passwd", ".hidden", "a/b.c", "keys", "keys.safetensors\n", ""]
SUM = {"bytes": 1, "sha256": "0"}
KEYS = {"dtype": "float16", "width": 32}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *[("segments/0/name", name) for name in PATHS],
        *[("index", {"name": name, "files": {}, "details": {"kind": "faiss"}}) for name in PATHS],
        *[
            (name, KeyError)
            for name in ("format", "version", "encoder", "keys", "segments", "index", "segments/0/files")
        ],
        ("segments/0/files/keys.safetensors", KeyError),
        ("segments/0/files/keys.safetensors/bytes", "100"),
        ("segments/0/files/keys.safetensors/sha256", 7),
        ("segments/0/files/keys.safetensors/bytes", KeyError),
        ("format", "another"),
        ("format_version", "1"),
        ("format_version", -1),
        ("format_version", None),
        ("surprise", 1),
        ("version", 2),
        ("parent", 7),
        ("parent", {"version": 9, "sha256": "0"}),
        ("kept", {}),
        ("kept/oldest", 99),
        ("kept/next_segment", -1),
        ("kept/next_segment", 0),  # the next writer would sweep the segment away
        ("kept/next_segment", 1 << 48),
        ("kept/next_segment", 10**400),
        ("kept/first_segment", 1),
        ("index", {"name": "000009", "files": {}, "details": {"kind": "faiss", "entries": 1}}),
        ("index", {"name": "first", "files": {}, "details": {"kind": "faiss", "entries": 1}}),
        ("written", "yesterday"),
        ("corpus/complete", "yes"),
        ("segments/0/details/deleted", KeyError),
        ("segments/0/details/deleted/documents", [[0, 99]]),
        ("segments/0/details/deleted/documents", [[1, 1]]),
        ("segments/0/details/deleted/documents", [[0, 1], [1, 2]]),
        ("segments/0/details/deleted/documents", [[0]]),
        ("segments/0/details/deleted/documents", [0]),
        ("segments/0/details/deleted/documents", [[0, 10**30]]),
        ("segments/0/details/deleted/entries", 10**12),
        ("segments/0/details/deleted/entries", 1),
        ("version", -1),
        ("version", True),
        ("metric", "cosine"),
        ("encoder", "gpt2"),
        ("encoder/sha256", None),
        ("encoder/key_site", {}),
        ("encoder/dtype", KeyError),
        ("encoder/dtype", 16),
        ("encoder/name", "half of a pair: \ud800"),  # what no later version could be written with
        ("encoder/surprise", math.nan),
        ("windows/context", 0),
        ("windows/stride", 0),
        ("tokenizer/vocab_size", -1),
        ("tokenizer/vocab_size", 0),
        ("tokenizer/vocab_size", (1 << 22) + 1),
        ("tokenizer/vocab_size", 10**40),
        ("keys/dtype", "int8"),
        ("codec", {}),
        ("codec", []),
        ("codec", {"name": "000001", "files": {}, "details": {"keys": {"dtype": "float16", "width": 32}}}),
        ("codec", {"name": "000001", "files": {"codec.safetensors": SUM}, "details": {}}),
        ("codec", {"name": "..", "files": {"codec.safetensors": SUM}, "details": {"keys": KEYS}}),
        ("codec", {"name": "000001", "files": {"codec.safetensors": SUM}, "details": {"keys": KEYS}}),
        ("codec", {"name": "1", "files": {"codec.safetensors": SUM}, "details": {"keys": {**KEYS, "width": 31}}}),
        ("codec", {"name": "1", "files": {"codec.safetensors": SUM}, "details": {"keys": {**KEYS, "dtype": "int8"}}}),
        ("keys/dtype", "float64"),
        ("keys/width", 31),
        ("keys/width", 0),
        ("keys/width", 10**30),
        ("values/dtype", "uint32"),
        ("segments", {}),
        ("segments", [7]),
        ("segments/0/details/entries", -1),
        ("segments/0/details/entries", 1),
        ("segments/0/details/entries", 10**12),
        ("segments/0/details/entries", 10**30),
        ("segments/0/details/entries", 1.5),
        ("segments/0/details/entries", "many"),
        ("segments/0/details/documents", 10**12),
        ("index", {}),
        ("index", []),
        ("index", {"name": "000002", "files": {}, "details": {}}),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(changed, path, value):
    with pytest.raises(DatastoreCorrupt):
        changed(path, value)


@pytest.mark.parametrize("name", FILES)
def test_names_of_files_cannot_lead_out_of_the_folder(changed, memory, name):
    files = {item: dict(value) for item, value in memory.manifest.segments[0].files.items()}
    with pytest.raises(DatastoreCorrupt, match="unsafe file names in part '000000'"):
        changed("segments/0/files", {**files, name: SUM})


def test_a_segment_cannot_be_named_twice(changed, memory):
    segment = asdict(memory.manifest.segments[0])
    with pytest.raises(DatastoreCorrupt, match="names a segment twice"):
        changed("segments", [segment, segment])


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("entry_starts", [0, 10**9, 10**9, 69], "entry_starts that do not rise from 0 to"),
        ("entry_starts", [-5, 10, 20, 69], "entry_starts that do not rise from 0 to"),
        ("text_starts", [0, 10, 20, 10**9], "text_starts that do not rise from 0 to"),
        ("values", np.zeros(69, np.int64), "holds other tensors than its manifest says"),
        ("spans", np.zeros((69, 3), np.uint32), "holds other tensors than its manifest says"),
        ("surprise", np.zeros(1, np.uint32), "holds other tensors than its manifest says"),
    ],
)
def test_tensors_that_cannot_be_are_refused_though_their_checksum_is_right(tmp_path, tensor, value, message):
    documents = [Document(name, "x" * length) for name, length in {"a": 20, "b": 29, "c": 20}.items()]
    path = tmp_path / "memory"
    Datastore.build(FakeEncoder(), documents, path, show_progress=False)
    file = path / "segments" / "000000" / "entries.safetensors"
    tensors = load_file(file)
    assert tensors["entry_starts"].tolist() == [0, 20, 49, 69]
    save_file({**tensors, tensor: np.asarray(value)}, file)
    segment = Part.describe(path / "segments", "000000", Manifest.load(path).segments[0].details)
    replace(Manifest.load(path), segments=(segment,)).publish(path)
    with pytest.raises(DatastoreCorrupt, match=message):
        Datastore(path)


@pytest.mark.parametrize(
    "details",
    [{"kind": "annoy"}, {"kind": "faiss"}, {"kind": "faiss", "stores_keys": True, "nprobe": 1}],
)
def test_an_index_that_is_not_known_or_not_described_is_refused(changed, details):
    with pytest.raises(IndexError_):
        changed("index", {"name": "000002", "files": {}, "details": {"entries": 1, **details}})


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "null", "7", "[" * 100_000, '{"a":' * 100_000, "\ud800", "9" * 9999]
)
def test_what_is_no_manifest_at_all(copied, content):
    file = current(copied)
    file.write_bytes(f"{content}\n".encode("utf-8", "surrogatepass"))
    with pytest.raises(
        DatastoreCorrupt, match=rf"{file.name} is not a sound manifest .*; restore it from a copy or build"
    ):
        Datastore(copied)
    (copied / "current.json").write_bytes(f"{content}\n".encode("utf-8", "surrogatepass"))
    with pytest.raises(DatastoreCorrupt, match=r"current.json is damaged .*; restore it from a copy"):
        Datastore(copied)


def test_the_newest_manifest_counts(copied):
    memory = Datastore(copied)
    before = memory.manifest.version
    memory.build_index("Flat")
    assert Datastore(copied).manifest.version == before + 1
    memory.build_index("exact")
    assert Datastore(copied).manifest.version == before + 2
    assert Datastore(copied).index.details == {"kind": "exact"}
    assert [Manifest.load(copied).version, memory.manifest.version] == [before + 2] * 2


def refused(*_):
    raise OSError("disk")


@pytest.mark.parametrize("place", ["memlm.datastore._manifest.write_json", "pathlib.Path.replace"])
def test_a_manifest_that_cannot_be_written_changes_nothing(copied, monkeypatch, place):
    memory = Datastore(copied)
    before = memory.manifest, memory.index
    monkeypatch.setattr(place, refused)
    with pytest.raises((OSError, DatastoreError), match="disk"):
        memory.build_index("Flat")
    assert (memory.manifest, memory.index) == before
    assert Datastore(copied).manifest == before[0]
    assert not list(copied.glob(".*"))


def test_a_folder_that_holds_something_is_left_alone(tmp_path, memory):
    note = tmp_path / "notes" / "segments" / "note.txt"
    note.parent.mkdir(parents=True)
    note.write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(memory.path.rglob("*"))
    for path in (tmp_path / "notes", memory.path, tmp_path / "file"):
        with pytest.raises(DatastoreError, match="exists already"):
            Datastore.build(FakeEncoder(), random_documents(), path, show_progress=False)
    assert note.read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(memory.path.rglob("*")) == before
    with pytest.raises(DatastoreError, match="cannot be made"):
        Datastore.build(FakeEncoder(), random_documents(), tmp_path / "file" / "memory", show_progress=False)


def test_an_empty_folder_is_used(tmp_path):
    assert len(Datastore.build(FakeEncoder(), random_documents(1), tmp_path, show_progress=False)) == 101


def test_opening_what_is_no_datastore(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", __file__):
        with pytest.raises(DatastoreError, match="holds no datastore; `memlm build` makes one"):
            Datastore(path)

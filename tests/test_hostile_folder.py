"""Datastores that came from strangers: links, pipes and devices in the folder; nobody waits for them or is harmed."""

import os
import shutil
import signal
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
import torch  # noqa: F401  (before faiss)
from safetensors.numpy import load_file, save_file

import faiss  # isort: skip

from command_line import refused, run
from fake_encoder import FakeEncoder, random_documents
from manifests import current
from memlm import Datastore, Document
from memlm.datastore import Manifest, verify
from memlm.datastore._part import Part
from memlm.errors import DatastoreCorrupt, DatastoreError
from memlm.files import write_json

QUIET = {"show_progress": False}


@pytest.fixture
def memory(tmp_path):
    settings = {"index": "exact", "segment_entries": 90, **QUIET}
    return Datastore.build(FakeEncoder(), random_documents(4, 40), tmp_path / "memory", **settings)


class Hang(Exception):
    """Not an OSError, which would be taken for damage."""


@contextmanager
def at_most(seconds):
    """Raise an error in the block that takes longer."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("folder", ["segments", "index", "codec"])
@pytest.mark.parametrize(
    "change",
    [
        lambda memory: memory.remove("d0"),
        lambda memory: memory.add(FakeEncoder(), [Document("new", "xnew")]),
        lambda memory: memory.compact(),
        lambda memory: memory.compress(2),
        lambda memory: memory.rollback(1),
    ],
    ids=["remove", "add", "compact", "compress", "rollback"],
)
def test_a_writer_removes_nothing_behind_a_link(memory, tmp_path, folder, change):
    """What a killed writer left is told by its number; a folder of photos may have such numbers, too."""
    if folder == "segments":
        memory.remove(pattern="*")
        memory.compact()  # so that no segment is named, and none leads out
    (tmp_path / "photos" / "20240101").mkdir(parents=True)
    (tmp_path / "photos" / "20240101" / "cat").write_text("mine")
    (memory.path / folder).rmdir() if (memory.path / folder).exists() else None
    (memory.path / folder).symlink_to(tmp_path / "photos")
    memory = Datastore(memory.path)
    with pytest.raises(DatastoreCorrupt, match=f"{folder} is a link; put the folder itself in its place"):
        change(memory)
    assert [item.name for item in (tmp_path / "photos").rglob("*")] == ["20240101", "cat"]


def test_links_and_files_under_the_name_of_a_segment_are_swept_away(memory, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "cat").write_text("mine")
    (memory.path / "segments" / "000002").symlink_to(tmp_path / "outside")
    (memory.path / "segments" / "000003").write_text("")
    for number in range(2):
        memory.add(FakeEncoder(), [Document(f"new{number}", "xnew")])
    assert verify(memory.path) == []
    assert (tmp_path / "outside" / "cat").read_text() == "mine"


@pytest.mark.parametrize("file", ["manifest", "current.json", "segments/000000/keys.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder", "outside", "nowhere"])
def test_what_is_no_regular_file_of_the_folder_is_an_error_at_once(memory, tmp_path, file, kind):
    file = current(memory.path) if file == "manifest" else memory.path / file
    data = file.read_bytes()
    file.unlink()
    (tmp_path / "outside").write_bytes(data)
    targets = {"device": "/dev/zero", "loop": file, "outside": tmp_path / "outside", "nowhere": tmp_path / "nowhere"}
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(targets[kind])
    with at_most(10):
        for use in (
            lambda: Datastore(memory.path),
            lambda: Datastore(memory.path, verify=False),
            lambda: memory.remove("d0"),
            lambda: memory.compact(),
        ):
            with pytest.raises(DatastoreError) as raised:
                use()
            assert file.name in str(raised.value) or "holds no datastore" in str(raised.value)
        assert verify(memory.path) != []


def test_a_link_under_the_name_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".current.json.{os.getpid()}.tmp").symlink_to(tmp_path / "mine")
    write_json(tmp_path / "current.json", {"version": 1})
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "current.json").is_symlink()


# Damage and forgery do not get checksums of ours


def flip(file):
    data = bytearray(file.read_bytes())
    data[-2] ^= 1  # of a key's fraction, so that it stays a number
    file.write_bytes(data)


def test_damage_is_not_merged(memory, tmp_path):
    other = Datastore.build(FakeEncoder(), [Document("theirs", "xtheirs")], tmp_path / "other", **QUIET)
    before = memory.manifest
    keys = other.path / "segments" / "000000" / "keys.safetensors"
    flip(keys)
    with pytest.raises(DatastoreCorrupt, match=r"keys\.safetensors does not match its checksum"):
        memory.merge(other.path)
    assert Datastore(memory.path).manifest == before
    flip(keys)
    assert memory.merge(other.path) == (1, 0)


@pytest.mark.parametrize("verb", ["compact", "compress"])
def test_damage_is_not_copied(memory, verb):
    reader, before = Datastore(memory.path, verify=False), Datastore(memory.path).manifest
    flip(memory.path / "segments" / "000001" / "keys.safetensors")
    with pytest.raises(DatastoreCorrupt, match=r"keys\.safetensors does not match its checksum"):
        reader.compact() if verb == "compact" else reader.compress(4)
    flip(memory.path / "segments" / "000001" / "keys.safetensors")
    assert Datastore(memory.path).manifest == before
    assert verify(memory.path) == []


def test_a_build_does_not_go_on_behind_damage(tmp_path):
    def stop(number, keys):
        if number == 14:
            raise KeyboardInterrupt
        return keys

    settings = {"segment_entries": 90, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        Datastore.build(FakeEncoder(change=stop), random_documents(4, 40), tmp_path / "memory", **settings)
    flip(tmp_path / "memory" / "segments" / "000000" / "keys.safetensors")
    with pytest.raises(DatastoreCorrupt, match=r"keys\.safetensors does not match its checksum"):
        Datastore.build(FakeEncoder(), random_documents(4, 40), tmp_path / "memory", **settings)


def forged(path, tensors):
    """Replace tensors of the first segment, with checksums that fit."""
    file = path / "segments" / "000000" / "entries.safetensors"
    save_file({**load_file(file), **tensors}, file)
    manifest = Manifest.load(path)
    part = Part.describe(path / "segments", "000000", manifest.segments[0].details)
    replace(manifest, parent=None, segments=(part, *manifest.segments[1:])).publish(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"values": np.full(7, 1 << 21, np.uint32)}, "token ids lie outside the vocabulary"),
        ({"spans": np.full((7, 2), 99, np.uint32)}, "entries of document 0 lie outside its text"),
        ({"ids": np.zeros((1, 32), np.uint8)}, "document 0 does not match its digests"),
    ],
)
def test_forgery_is_not_merged(memory, tmp_path, tensors, message):
    Datastore.build(FakeEncoder(), [Document("theirs", "xtheirs")], tmp_path / "other", **QUIET)
    forged(tmp_path / "other", tensors)
    assert message in str(verify(tmp_path / "other"))
    before = memory.manifest
    with pytest.raises(DatastoreCorrupt, match=message):
        memory.merge(tmp_path / "other")
    assert Datastore(memory.path).manifest == before


def test_two_documents_with_one_id_are_noticed(memory, tmp_path):
    """Removing the one would leave the other."""
    documents, settings = [Document("a", "xone"), Document("b", "xtwo")], {"segment_entries": 5, **QUIET}
    other = Datastore.build(FakeEncoder(), documents, tmp_path / "other", **settings)
    second = Datastore.build(FakeEncoder(), [Document("a", "xtwo")], tmp_path / "second", **QUIET)
    shutil.rmtree(other.path / "segments" / "000001")
    shutil.copytree(second.path / "segments" / "000000", other.path / "segments" / "000001")
    part = replace(second.manifest.segments[0], name="000001")
    replace(other.manifest, parent=None, segments=(other.manifest.segments[0], part)).publish(other.path)
    message = "has two documents with the id 'a'"
    assert any(message in line for line in verify(other.path))
    with pytest.raises(DatastoreCorrupt, match=message):
        memory.merge(other.path)


# An index can be ignored, so it can be made anew


@pytest.mark.parametrize("damage", ["missing", "flipped", "unknown", "undescribed"])
def test_a_damaged_index_is_made_anew(memory, damage):
    memory.build_index("Flat")
    part = memory.manifest.index
    file = memory.path / "index" / part.name / "index.faiss"
    if damage == "missing":
        shutil.rmtree(memory.path / "index")
    elif damage == "flipped":
        flip(file)
    else:
        details = {**part.details, "kind": "annoy"} if damage == "unknown" else {**part.details, "recall": "good"}
        replace(memory.manifest, parent=None, index=replace(part, details=details)).publish(memory.path)
    refused_with = refused("info", memory.path)
    assert "rebuild it by `memlm compact DATASTORE --index auto`" in refused_with
    done = run("compact", memory.path, "--index", "Flat")
    assert done.code == 0, done.err
    assert "search: Flat" in done.out
    assert verify(memory.path) == []
    assert Datastore(memory.path).index.details["factory"] == "Flat"


@pytest.mark.parametrize("factory", ["IVF2,SQ8", "IVF2,Flat", "IDMap,Flat"])
def test_an_index_of_entries_that_do_not_exist_is_an_error(memory, factory):
    memory.build_index("IVF2,SQ8")
    part = memory.manifest.index
    index = faiss.index_factory(8, factory)
    keys = memory.keys.gather_keys(np.arange(memory.slots)).numpy()
    index.train(keys)
    index.add_with_ids(keys, np.arange(memory.slots) + 10**9)
    faiss.write_index(index, str(memory.path / "index" / part.name / "index.faiss"))
    details = {**part.details, "stores_keys": factory == "IVF2,Flat"}
    forged = Part.describe(memory.path / "index", part.name, details)
    replace(memory.manifest, parent=None, index=forged).publish(memory.path)
    opened = Datastore(memory.path)
    for queries in (keys[:3], np.tile(keys, (10, 1))):
        with pytest.raises(DatastoreError, match="rebuild it by `memlm compact"):
            opened.search(queries, 5)
    opened.remove("d0")
    for queries in (keys[:3], np.tile(keys, (10, 1))):
        with suppress(DatastoreError):  # or nothing is found, where FAISS is told what may be
            assert not opened.search(queries, 5).present.any()

"""Datastores that came from strangers: links, pipes and devices in the folder; nobody waits for them or is harmed."""

import os
import signal
from contextlib import contextmanager

import pytest

from fake_encoder import FakeEncoder, random_documents
from manifests import current
from memlm import Datastore, Document
from memlm.datastore import verify
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

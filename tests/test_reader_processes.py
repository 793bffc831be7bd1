"""Processes read while another writes: none ever fails, and each sees nothing but versions that were committed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fake_encoder import FakeEncoder, random_documents
from memlm import Datastore, Document
from memlm.datastore import Manifest, verify
from memlm.datastore._manifest import content_sha256, manifest_name
from memlm.files import write_json
from reader import fingerprint

READERS = 2


def watched(path, write):
    """Write while readers read; return what each of them saw; all read before the first change and after the last."""
    stop = path.with_name("stop")
    command = [sys.executable, str(Path(__file__).with_name("reader.py")), str(path), str(stop)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(READERS)]
    try:
        assert [reader.stdout.readline() for reader in readers] == ["ready\n"] * READERS
        write()
    finally:
        stop.touch()
        told = [reader.communicate(timeout=120)[0] for reader in readers]
    return [json.loads(text) for text in told]


def wrong(outcomes, committed):
    """Return what readers should not have seen, a line each."""
    lines = [line for outcome in outcomes for line in outcome["failures"]]
    for outcome in outcomes:
        strange = [version for version, found in outcome["seen"].items() if committed.get(int(version)) != found]
        lines += [f"version {version} was seen with other content than was committed" for version in strange]
    return lines


@pytest.fixture
def committed(monkeypatch):
    """Fingerprints of all versions that are published in this process, by number."""
    recorded, publish = {}, Manifest.publish

    def record(self, path):
        publish(self, path)
        recorded[self.version] = fingerprint(Datastore(path, verify=False))

    monkeypatch.setattr(Manifest, "publish", record)
    return recorded


@pytest.fixture
def memory(committed, tmp_path):
    settings = {"index": "IVF2,Flat", "segment_entries": 200, "show_progress": False}
    return Datastore.build(FakeEncoder(), random_documents(6, 60), tmp_path / "memory", **settings)


def test_readers_see_nothing_but_what_was_committed(memory, committed):
    def write():
        for number in range(9):
            memory.add(FakeEncoder(), [Document("changing", f"xnumber {number}")], replace=True)
            memory.add(FakeEncoder(), [Document(f"more{number}", f"xmore {number}"), Document(f"and{number}", "xand")])
            memory.remove([f"and{number}"])
            if number % 3 == 2:
                memory.compact()
            if number % 4 == 3:
                memory.rollback(memory.manifest.version - (0 if memory.manifest.parent is None else 1))

    outcomes = watched(memory.path, write)
    assert wrong(outcomes, committed) == []
    assert len(committed) > 30
    for outcome in outcomes:
        assert outcome["readings"] > 3
        assert len(outcome["seen"]) > 3
    assert verify(memory.path) == []


def test_a_version_that_changes_is_noticed(memory, committed):
    """The negative control: a writer that publishes other content under the number of a version."""
    careful = dict(committed)

    def write():
        manifest = memory.manifest
        deleted = manifest.segments[0].deleted
        deleted[0] = True
        first = manifest.segments[0].with_deleted(deleted, memory._segments[0].rows(0).stop)
        changed = replace(manifest, segments=(first, *manifest.segments[1:]))
        Manifest.publish(changed, memory.path)
        assert fingerprint(Datastore(memory.path)) != careful[manifest.version]

    assert wrong(watched(memory.path, write), careful)


def test_a_version_that_is_named_before_it_is_there_is_noticed(memory, committed):
    """The negative control of failing: `current.json` names a manifest that comes later, or never."""
    digest = content_sha256(memory.manifest.following("nothing")._content())

    def write():
        name = manifest_name(memory.manifest.version + 1)
        assert not (memory.path / name).exists()
        write_json(memory.path / "current.json", {"version": memory.manifest.version + 1, "sha256": digest})

    assert any("DatastoreCorrupt" in line for line in wrong(watched(memory.path, write), committed))

"""Datastores that were interrupted, ran out of space, were damaged or were made to deceive: never half of one."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import memlm.files
from fake_encoder import FakeEncoder, random_documents
from manifests import current
from memlm import Datastore, Document
from memlm import tensors as tensor_files
from memlm.datastore import Manifest, verify
from memlm.errors import DatastoreCorrupt, DatastoreError


def build(path, encoder=None, **settings):
    settings = {"segment_entries": 250, "show_progress": False} | settings
    return Datastore.build(encoder or FakeEncoder(), random_documents(), path, **settings)


def raising(error, at):
    def change(number, keys):
        if number == at:
            raise error
        return keys

    return FakeEncoder(change=change)


# Builds that do not come to their end


@pytest.mark.parametrize("error", [ValueError("model"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EIO, "disk")])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_build_leaves_nothing(tmp_path, error, existed):
    path = tmp_path / "new" / "memory"
    if existed:
        path.mkdir(parents=True)
    with pytest.raises(type(error)):
        build(path, raising(error, at=20))  # in the first segment
    assert path.exists() == existed
    assert not existed or list(path.iterdir()) == []
    assert len(build(path)) == 606


@pytest.mark.parametrize("error", [ValueError("model"), KeyboardInterrupt(), OSError(errno.EIO, "disk")])
def test_an_interrupted_build_keeps_its_finished_segments_and_goes_on_behind_them(tmp_path, error):
    path, whole = tmp_path / "memory", build(tmp_path / "whole")
    with pytest.raises(type(error)):
        build(path, raising(error, at=40))  # in the second segment
    reached = Datastore(path)
    assert (len(reached), reached.info()["complete"]) == (202, False)
    assert [item["id"] for item in reached.documents()] == ["d0", "d1"]
    assert len(reached.search(np.zeros((1, 8), np.float32), 3).entries) == 1
    encoder = FakeEncoder()
    memory = build(path, encoder)
    assert encoder.batches == 42  # of 404 entries in two segments: what was stored is not read again
    assert memory.info()["complete"]
    assert memory.manifest.content_sha256 == whole.manifest.content_sha256
    with pytest.raises(DatastoreError, match="exists already"):
        build(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_dtype": "bfloat16"}, "unfinished build whose keys is .*float16.*go on with the same settings"),
        ({"metric": "inner_product"}, "unfinished build whose metric is squared_l2, not inner_product"),
        ({"encoder": FakeEncoder(width=4)}, "unfinished build whose keys is"),
    ],
)
def test_an_unfinished_build_goes_on_with_the_same_settings_only(tmp_path, settings, message):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "memory", raising(KeyboardInterrupt(), at=40))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DatastoreError, match=message):
        build(tmp_path / "memory", **settings)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unfinished_build_of_other_text_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "memory", raising(KeyboardInterrupt(), at=40))
    documents = [Document(item.id, item.text + "!") for item in random_documents()]
    with pytest.raises(DatastoreError, match="'d0' is stored already, with other content"):
        Datastore.build(FakeEncoder(), documents, tmp_path / "memory", show_progress=False)
    assert len(build(tmp_path / "memory")) == 606


def test_an_interruption_after_the_manifest_was_written_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path):
        if any(path.glob("manifest-*.json")):
            raise KeyboardInterrupt

    tmp_path.joinpath("memory").mkdir()
    monkeypatch.setattr(memlm.files, "sync_directory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "memory")
    assert list(tmp_path.joinpath("memory").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import memlm.index
from test_datastore_damage import FakeEncoder, build

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def change(number, keys):
    return die() if number == 20 else keys

for name in ("keys", "manifest", "current", "index"):
    if os.fork() == 0:
        if name == "manifest":
            replace = Path.replace
            Path.replace = lambda self, to: die() if to.name == "manifest-000001.json" else replace(self, to)
        if name == "current":
            replace = Path.replace
            Path.replace = lambda self, to: die() if to.name == "current.json" else replace(self, to)
        if name == "index":
            import memlm.index._faiss as module
            module._tune = die
        build(Path(sys.argv[2]) / name, FakeEncoder(change=change) if name == "keys" else None, index="IVF4,Flat")
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_killed_build_leaves_no_datastore_and_can_be_run_again(tmp_path):
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, here, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 4, done.stderr
    for name in ("keys", "manifest"):
        left = [path.name for path in (tmp_path / name).rglob("*")]
        assert "keys.safetensors" in left  # it was killed in the middle
        assert any(item.endswith(".tmp") for item in left) == (name == "manifest")
        with pytest.raises(DatastoreError, match="holds no datastore"):
            Datastore(tmp_path / name)
        assert len(build(tmp_path / name)) == len(Datastore(tmp_path / name)) == 606
        assert not [path for path in (tmp_path / name).rglob("*") if path.suffix == ".tmp"]
    with pytest.raises(DatastoreCorrupt, match=r"current.json is missing: .* run the same build again"):
        Datastore(tmp_path / "current")
    assert len(build(tmp_path / "current")) == 606
    memory = Datastore(tmp_path / "index")  # everything but the index was there
    assert len(memory) == 606
    assert memory.index.details == {"kind": "exact"}
    build(tmp_path / "index", index="IVF4,Flat")
    assert Datastore(tmp_path / "index").index.details["factory"] == "IVF4,Flat"


@pytest.mark.parametrize("left", ["", "{", "[]", "{}", '{"sha256": 7}\n', "[" * 100_000])
def test_a_build_does_not_go_on_behind_what_is_no_manifest(tmp_path, left):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "manifest-000001.json").write_text(left)
    with pytest.raises(DatastoreCorrupt, match=r"manifest-000001\.json is not a sound manifest .*build again"):
        build(tmp_path / "memory")


def test_two_builds_into_one_folder_are_kept_apart(tmp_path):
    def meanwhile(number, keys):
        if number == 40:
            holder = rf"is being written to by process {os.getpid()} on .*\(build, since"
            with pytest.raises(DatastoreError, match=holder):
                build(tmp_path / "memory")
        return keys

    build(tmp_path / "memory", FakeEncoder(change=meanwhile))
    assert len(Datastore(tmp_path / "memory")) == 606


def test_everything_is_on_the_disk_before_the_manifest_names_it(tmp_path, monkeypatch):
    published, synced, fsync = [], set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.add(os.fstat(number).st_ino), fsync(number)))
    replace = Path.replace

    def publish(self, target):
        if target.name != "current.json":
            return replace(self, target)
        parts = [path for path in target.parent.rglob("*") if path.name != self.name]
        published.append(len(parts))
        assert not [path for path in parts if path.stat().st_ino not in synced]
        assert self.stat().st_ino in synced
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", publish)
    build(tmp_path / "memory", index="IVF4,Flat")
    assert (tmp_path / "memory").stat().st_ino in synced
    assert len(published) == 4  # three segments, then the index
    assert published[-1] > 15


# No space


def refused(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["reserve", "manifest"])
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch, place):
    if place == "reserve":
        monkeypatch.setattr(os, "posix_fallocate", refused)
    else:
        monkeypatch.setattr("memlm.datastore._manifest.write_json", refused)
    with pytest.raises(
        DatastoreError, match=r"no space left .*; it is as before the last commit.* An entry takes about 36 bytes"
    ):
        build(tmp_path / "memory")
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_file_sizes_is_told_and_nothing_is_left(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(DatastoreError, match="no space left"):
            build(tmp_path / "memory")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(DatastoreError, match=r"no space left .*No space left on device"):
            build(tmp_path / "memory")
        assert verify(tmp_path / "memory") == []
        manifest = Manifest.load(tmp_path / "memory")
        assert (manifest.entries, manifest.complete) == (202, False)  # what fitted
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_space_is_reserved_where_the_system_has_no_call_for_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    tensors = tensor_files.create_tensors(tmp_path / "t.safetensors", {"a": ("F16", (600_000,)), "b": ("I64", (0, 2))})
    tensors["a"][-1] = 1
    tensors["a"].flush()
    read = tensor_files.open_tensors(tmp_path / "t.safetensors")
    assert (read["a"][0], read["a"][-1], read["a"].shape, read["b"].shape) == (0, 1, (600_000,), (0, 2))


# Damage


def part_files(path):
    return [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix != ".json"]


def test_a_flipped_bit_is_noticed_wherever_it_is(copied):
    generator = np.random.default_rng(0)
    files = sorted(file for file in copied.rglob("*") if file.is_file())
    assert len(files) == 14  # three segments of three files, four manifests, and which of them is current
    old = [file for file in files if "manifest" in file.name and file != current(copied)]
    for file in files:
        data = file.read_bytes()
        places = {0, 7, 8, 60, len(data) // 2, len(data) - 2, *generator.integers(0, len(data), 12).tolist()}
        for place in places:
            file.write_bytes(data[:place] + bytes([data[place] ^ 1 << generator.integers(8)]) + data[place + 1 :])
            assert verify(copied) != []
            if file not in old:
                with pytest.raises(DatastoreError):
                    Datastore(copied)
        file.write_bytes(data)
    Datastore(copied)
    assert verify(copied) == []


def test_a_missing_file_is_noticed_whichever_it_is(copied):
    for file in sorted(file for file in copied.rglob("*") if file.is_file()):
        data = file.read_bytes()
        for left in (None, data[:-1], b""):
            file.unlink(missing_ok=True)
            if left is not None:
                file.write_bytes(left)
            assert verify(copied) != [], file
        file.write_bytes(data)
    assert verify(copied) == []


def test_a_truncated_or_lengthened_file_is_noticed_without_reading_it(copied):
    for file in part_files(copied):
        data = file.read_bytes()
        for other in (b"", data[:-1], data[: len(data) // 2], data + b"\0"):
            file.write_bytes(other)
            with pytest.raises(DatastoreCorrupt, match=f"{file.name} has {len(other)} bytes; expected {len(data)}"):
                Datastore(copied, verify=False)
        file.write_bytes(data)


def test_a_missing_file_is_named(copied):
    for file in part_files(copied):
        file.rename(file.with_suffix(".away"))
        with pytest.raises(DatastoreCorrupt, match=f"{file.name} is missing; restore it"):
            Datastore(copied)
        file.with_suffix(".away").rename(file)


def test_links_out_of_the_datastore_are_refused(copied, tmp_path):
    segment = copied / "segments" / "000000"
    inside = shutil.copy(segment / "keys.safetensors", copied / "segments" / "copy")
    outside = shutil.copytree(segment, tmp_path / "outside")
    (segment / "keys.safetensors").unlink()
    (segment / "keys.safetensors").symlink_to(outside / "keys.safetensors")
    with pytest.raises(DatastoreCorrupt, match="is a link out of the datastore"):
        Datastore(copied)
    (segment / "keys.safetensors").unlink()
    (segment / "keys.safetensors").symlink_to(inside)
    assert len(Datastore(copied)) > 0
    shutil.rmtree(segment)
    segment.symlink_to(outside)
    with pytest.raises(DatastoreCorrupt, match="is a link out of the datastore"):
        Datastore(copied)

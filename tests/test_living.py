"""A datastore that changes: adding, replacing, removing, merging, compacting, going back; deletion on every path."""

import gc
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fake_encoder import FakeEncoder, random_documents
from memlm import Datastore, Document
from memlm.datastore import Pointers, audit, rollback_to, verify
from memlm.errors import ConfigError, CorpusError, DatastoreError, DatastoreMismatch

QUIET = {"show_progress": False}
FACTORIES = ["exact", "IVF4,Flat", "IVF4,SQfp16", "IVF4,SQ8", "Flat", "HNSW8", "PQ4x4"]


def build(source, path, **settings):
    return Datastore.build(FakeEncoder(), source, path, **QUIET | {"index": "exact"} | settings)


def stored(memory):
    return {item["id"]: item["text"] for item in memory.documents()}


def content(memory):
    """Everything that a reader can learn, by document."""
    rows = {}
    for item in memory.documents():
        first, stop = item["entries"]
        keys = memory.keys.gather_keys(np.arange(first, stop))
        rows[item["id"]] = (item["text"], item["metadata"], memory.values[first:stop].tolist(), keys.tolist())
    return rows


def nearest(memory, queries, k):
    """The nearest live keys by brute force in float64, as (document, position, distance) of each query."""
    answers = []
    keys, names = [], []
    for item in memory.documents():
        first, stop = item["entries"]
        keys.append(memory.keys.gather_keys(np.arange(first, stop)).double().numpy())
        names += [(item["id"], place) for place in range(stop - first)]
    keys = np.concatenate(keys)
    for query in queries.astype(np.float64):
        distances = ((keys - query) ** 2).sum(axis=1)
        order = np.argsort(distances, kind="stable")[:k]
        answers.append([(names[place], distances[place]) for place in order])
    return answers


def assert_finds(memory, k=9, queries=None, exact=True):
    """What a search returns is what brute force over the documents returns."""
    queries = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32) if queries is None else queries
    found = memory.search(queries, k)
    for row, truth in enumerate(nearest(memory, queries, k)):
        assert found.present[row].sum() == min(k, len(truth))
        names = [memory.provenance(int(entry)) for entry in found.entries[row][found.present[row]]]
        assert {name.document for name in names} <= set(stored(memory))
        if exact:
            np.testing.assert_allclose(
                found.distances[row][found.present[row]], [distance for _, distance in truth], rtol=1e-4, atol=1e-4
            )


@pytest.fixture
def documents():
    return random_documents(8, 60)


@pytest.fixture
def memory(documents, tmp_path):
    return build(documents[:6], tmp_path / "memory", segment_entries=130)


def test_documents_are_added_behind_the_others(memory, documents, tmp_path):
    before = memory.values.copy()
    assert memory.add(FakeEncoder(), documents) == (2, 0)  # six were there
    assert memory.values[: len(before)].tolist() == before.tolist()
    whole = build(documents, tmp_path / "whole", segment_entries=130)
    assert content(memory) == content(whole) == content(Datastore(memory.path))
    assert_finds(memory)
    assert memory.add(FakeEncoder(), documents) == (0, 0)
    assert memory.manifest.version == Datastore(memory.path).manifest.version


def test_the_same_id_with_other_content_is_an_error_unless_it_is_replaced(memory, documents):
    for changed in (Document("d2", "xanother text"), Document("d2", documents[2].text, {"year": 2024})):
        before = content(memory), memory.manifest
        with pytest.raises(DatastoreError, match="'d2' is stored already, with other content; replace it"):
            memory.add(FakeEncoder(), [documents[7], changed])
        assert (content(memory), memory.manifest) == before
        assert verify(memory.path) == []
    old = memory.document_range(documents[2].text)
    assert memory.add(FakeEncoder(), [Document("d2", "xanother text", {"year": 2024})], replace=True) == (1, 1)
    assert memory.document_range(documents[2].text) == (0, 0) != old
    assert stored(memory) == {item.id: item.text for item in documents[:6]} | {"d2": "xanother text"}
    assert_finds(memory)
    with pytest.raises(ConfigError, match=rf"entry {old[0]} is deleted"):
        memory.provenance(old[0])


def test_another_encoder_cannot_add(memory, documents):
    other = FakeEncoder()
    other.identity["encoder"]["sha256"] = "2" * 64
    with pytest.raises(DatastoreMismatch, match="built with fake"):
        memory.add(other, documents)


def test_an_interrupted_addition_goes_on(memory, tmp_path):
    more = [Document(f"new{item.id}", item.text) for item in random_documents(6, 60, seed=5)]
    straight = Datastore(shutil.copytree(memory.path, tmp_path / "straight"))
    straight.add(FakeEncoder(), more, segment_entries=130)

    def stop(number, keys):
        if number == 20:
            raise KeyboardInterrupt
        return keys

    with pytest.raises(KeyboardInterrupt):
        memory.add(FakeEncoder(change=stop), more, segment_entries=130)
    assert 6 < memory.manifest.documents < 12
    memory.add(FakeEncoder(), more, segment_entries=130)
    assert memory.manifest.content_sha256 == straight.manifest.content_sha256


@pytest.mark.parametrize("factory", FACTORIES)
def test_what_is_removed_is_returned_by_no_path(memory, documents, factory):
    memory.build_index(factory)
    memory.add(FakeEncoder(), documents[6:])  # behind the index
    gone = [documents[1], documents[4], documents[6]]
    ranges = [memory.document_range(item.text) for item in gone]
    queries = np.concatenate([memory.keys.gather_keys(np.arange(*each)).float().numpy() for each in ranges])
    before = memory.search(queries, 5)
    assert (np.isin(before.entries[:, 0], np.concatenate([np.arange(*each) for each in ranges]))).mean() > 0.5
    statistics = memory.statistics()
    assert memory.remove([item.id for item in gone]) == [item.id for item in gone]
    deleted = np.concatenate([np.arange(*each) for each in ranges])
    for opened in (memory, Datastore(memory.path)):
        assert_finds(opened, exact="PQ" not in factory and "HNSW" not in factory)
        for k in (1, 5, len(opened)):
            many = np.tile(queries, (40, 1))  # enough for the batched search of lists
            found = opened.search(many, k)
            assert not np.isin(found.entries[found.present], deleted).any()
            if factory in ("exact", "Flat"):
                assert found.present.all()
            pointed = Pointers(opened, 1).lookup(
                queries, np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64), k
            )
            assert not np.isin(pointed.found.entries[pointed.found.present], deleted).any()
        assert {item.id for item in gone}.isdisjoint(stored(opened))
        assert [opened.document_range(item.text) for item in gone] == [(0, 0)] * 3
        assert len(opened) == opened.info()["entries"] == opened.slots - len(deleted)
        assert opened.info()["deleted"] == len(deleted)
        for entry in deleted[::17]:
            with pytest.raises(ConfigError, match="is deleted"):
                opened.provenance(int(entry))
        assert not opened.statistics().equal(statistics)
        assert all(first not in deleted for first, _ in opened.entry_ranges())
        with pytest.raises(ConfigError, match=f"k is {len(opened) + 1}; expected 1 to {len(opened)}"):
            opened.search(queries, len(opened) + 1)


def test_a_mask_that_forgets_one_document_is_noticed(memory, documents):
    """The test above can fail: with the mask of deleted entries broken, what was removed comes back."""
    first, stop = memory.document_range(documents[1].text)
    memory.remove("d1")
    queries = memory.keys.gather_keys(np.arange(first, stop)).float().numpy()
    memory.live[first:stop] = True
    memory.index.__dict__.pop("_resident", None)
    assert np.isin(memory.search(queries, 1).entries, np.arange(first, stop)).mean() > 0.9


def test_documents_are_removed_by_pattern_and_metadata(tmp_path):
    source = [
        Document("a/1", "xone", {"year": 2023, "draft": True}),
        Document("a/2", "xtwo", {"year": 2024}),
        Document("b/1", "xthree", {"year": 2024, "draft": True}),
    ]
    memory = build(source, tmp_path / "memory")
    cases = [
        ({"pattern": "a/*"}, ["a/1", "a/2"]),
        ({"where": {"year": 2024}}, ["a/2", "b/1"]),
        ({"pattern": "a/*", "where": {"year": 2024}}, ["a/2"]),
        ({"where": {"year": 2024, "draft": True}}, ["b/1"]),
        ({"where": {"year": "2024"}}, []),
        ({"pattern": "c*"}, []),
        ({"ids": ["b/1"], "pattern": "a/1"}, ["a/1", "b/1"]),
        ({"ids": []}, []),
    ]
    for settings, expected in cases:
        version = memory.manifest.version
        assert memory.remove(**settings, dry_run=True) == expected
        assert memory.manifest.version == version
        assert len(stored(memory)) == 3
    assert memory.remove(where={"year": 2024}) == ["a/2", "b/1"]
    assert list(stored(memory)) == ["a/1"]
    with pytest.raises(ConfigError, match="no document has the id 'a/2' and 1 others; nothing was removed"):
        memory.remove(["a/1", "a/2", "b/1"])
    assert list(stored(memory)) == ["a/1"]


def test_everything_can_be_removed_and_something_added_again(memory, documents):
    memory.remove(pattern="*")
    assert (len(memory), stored(memory)) == (0, {})
    with pytest.raises(ConfigError, match="k is 1; expected 1 to 0"):
        memory.search(np.zeros((1, 8), np.float32), 1)
    memory.compact()
    assert (len(memory), memory.slots, Datastore(memory.path).manifest.segments) == (0, 0, ())
    assert verify(memory.path) == []
    memory.add(FakeEncoder(), documents[:1])
    assert_finds(memory)


@pytest.mark.parametrize("factory", ["exact", "IVF4,SQfp16"])
def test_compacting_keeps_everything_but_what_was_deleted(memory, documents, factory):
    memory.build_index(factory)
    memory.add(FakeEncoder(), [documents[6], Document("d0", "xnew text")], replace=True)
    memory.remove("d3")
    before = content(memory)
    secrets = [(item.id, item.text) for item in (documents[3], documents[0])]
    assert audit(memory.path, *secrets[0]) != []
    assert any("version" in line for line in audit(memory.path, "d3"))
    memory.compact()
    assert content(memory) == content(Datastore(memory.path)) == before
    assert memory.slots == len(memory)
    assert [item["change"] for item in memory.history()] == ["compact"]
    assert memory.index.details.get("factory", "exact") == factory
    assert_finds(memory)
    assert verify(memory.path) == []
    assert audit(memory.path, *secrets[0]) == []
    assert [line for line in audit(memory.path, *secrets[1]) if "digest" in line or "pieces" in line] == []
    for _, text in secrets:  # not even its bytes, by any name
        assert not any(text.encode() in file.read_bytes() for file in memory.path.rglob("*") if file.is_file())


def test_compacting_joins_small_segments(memory, documents):
    for item in documents[6:]:
        memory.add(FakeEncoder(), [item])
    assert len(memory.manifest.segments) == 5
    before = content(memory)
    memory.compact(segment_entries=300)
    assert len(memory.manifest.segments) == 2
    assert content(memory) == before


def test_merging_equals_building_together(memory, documents, tmp_path):
    other = build([*documents[4:6], *documents[6:]], tmp_path / "other", segment_entries=70)
    assert memory.merge(other.path) == (2, 0)
    assert content(memory) == content(build(documents, tmp_path / "whole"))
    assert_finds(memory)
    changed = build([Document("d0", "xother")], tmp_path / "changed")
    with pytest.raises(DatastoreError, match="'d0' is stored already, with other content"):
        memory.merge(changed.path)
    assert memory.merge(changed.path, replace=True) == (1, 1)
    assert stored(memory)["d0"] == "xother"
    with pytest.raises(DatastoreMismatch, match="the datastores have the metric"):
        memory.merge(build(documents[:1], tmp_path / "products", metric="inner_product").path)


def test_going_back_and_forth(memory, documents):
    first = content(memory)
    memory.remove("d1")
    second = content(memory)
    version = memory.manifest.version
    memory.rollback(version - 1)
    assert content(memory) == content(Datastore(memory.path)) == first
    assert content(Datastore(memory.path, version=version)) == second
    memory.rollback(version)
    assert content(memory) == second
    changes = [item["change"] for item in memory.history()]
    assert changes[-3:] == ["remove 1 document", f"rollback to version {version - 1}", f"rollback to version {version}"]
    with pytest.raises(ConfigError, match=r"version is 99; expected one that is kept: 1 to \d+"):
        memory.rollback(99)
    with pytest.raises(ConfigError, match="version is 99; expected one that is kept"):
        Datastore(memory.path, version=99)
    memory.compact()
    with pytest.raises(ConfigError, match="A compaction drops those before it"):
        memory.rollback(version)
    memory.add(FakeEncoder(), documents[6:7])  # numbers go on
    assert verify(memory.path) == []


def test_versions_do_not_pile_up(memory):
    for number in range(70):
        memory.add(FakeEncoder(), [Document(f"n{number}", f"x{number}")])
    assert len(memory.history()) == 64
    assert len(list(memory.path.glob("manifest-*.json"))) <= 65
    assert verify(memory.path) == []
    assert memory.manifest.documents == 76


# Readers and one writer


def test_readers_keep_what_they_opened_until_they_refresh(memory, documents):
    reader = Datastore(memory.path)
    before, found = content(reader), reader.search(np.zeros((1, 8), np.float32), 9)
    memory.remove("d1")
    memory.add(FakeEncoder(), documents[6:])
    memory.compact()
    assert content(reader) == before
    for one, other in zip(reader.search(np.zeros((1, 8), np.float32), 9), found, strict=True):
        np.testing.assert_array_equal(one, other)
    reader.refresh()
    assert content(reader) == content(memory) != before


def test_readers_never_fail_and_never_see_a_mixture(memory, documents):
    """A thread opens and refreshes while this one adds, removes and compacts as fast as it can."""
    done, failures, seen = threading.Event(), [], set()
    pairs = [Document(f"{side}{number}", f"x{side}{number}") for number in range(12) for side in ("left", "right")]

    def read():
        reader = Datastore(memory.path)
        while not done.is_set():
            try:
                reader.refresh()
                for opened in (reader, Datastore(memory.path)):
                    names = set(stored(opened))
                    seen.add(frozenset(names))
                    left = {name[4:] for name in names if name.startswith("left")}
                    assert left == {name[5:] for name in names if name.startswith("right")}  # always both
                    found = opened.search(np.zeros((3, 8), np.float32), 5)
                    assert {opened.provenance(int(entry)).document for entry in found.entries.ravel()} <= names
            except BaseException as error:
                failures.append(error)
                raise

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(12):
        memory.add(FakeEncoder(), pairs[2 * number : 2 * number + 2])
        if number % 3 == 2:
            memory.remove([item.id for item in pairs[2 * number : 2 * number + 2]])
        if number % 4 == 3:
            memory.compact()
    done.set()
    thread.join()
    assert failures == []
    assert len(seen) > 3


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from memlm.datastore._writing import writing
with writing(Path(sys.argv[2]), "add"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_at_once_and_a_dead_one_is_forgotten(memory, documents):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(Path(__file__).parent), str(memory.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        before = content(memory)
        message = rf"is being written to by process {process.pid} on .* \(add, since .*\); wait for it to end"
        for change in (
            lambda: memory.add(FakeEncoder(), documents),
            lambda: memory.remove("d1"),
            memory.compact,
            lambda: memory.rollback(1),
            lambda: memory.build_index("Flat"),
        ):
            with pytest.raises(DatastoreError, match=message):
                change()
        assert content(memory) == before
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert memory.remove("d1") == ["d1"]
    assert not list(memory.path.glob(".*"))


def test_a_folder_that_cannot_be_written_is_read(memory):
    """Root may write anywhere, but not where a mount forbids it."""
    if os.geteuid() == 0:
        bound = subprocess.run(["mount", "--bind", memory.path, memory.path], capture_output=True)
        if bound.returncode:
            pytest.skip("mounting is not allowed here")
        subprocess.run(["mount", "-o", "remount,ro,bind", memory.path], check=True)
    else:
        memory.path.chmod(0o555)
    try:
        reader = Datastore(memory.path)
        assert content(reader) == content(memory)
        assert_finds(reader)
        assert verify(memory.path) == []
        with pytest.raises(DatastoreError, match=r"cannot be written to .*; copy it to a place that can"):
            reader.remove("d1")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", memory.path], check=True)
        else:
            memory.path.chmod(0o755)


def test_a_killed_writer_leaves_nothing_that_stays(memory, documents):
    leftovers = ["segments/000099/keys.safetensors", "index/000099/index.faiss", "manifest-000099.json"]
    for name in [*leftovers, ".manifest-000100.json.7.tmp", ".current.json.7.tmp"]:
        (memory.path / name).parent.mkdir(parents=True, exist_ok=True)
        (memory.path / name).write_bytes(b"half")
    (memory.path / "mine.txt").write_text("not memlm's")
    assert verify(memory.path) == []
    assert content(Datastore(memory.path)) == content(memory)
    memory.add(FakeEncoder(), documents[6:])
    left = [item.relative_to(memory.path).as_posix() for item in memory.path.rglob("*")]
    assert not [name for name in left if "99" in name or name.endswith(".tmp")]
    assert "mine.txt" in left


def test_infinite_least_pointers_agree_with_search(memory):
    memory.remove("d2")
    queries = memory.keys.gather_keys(np.arange(30)).float().numpy()
    pointed = Pointers(memory, math.inf).lookup(queries, memory.values[:30].astype(np.int64), np.zeros(30, np.int64), 7)
    for one, other in zip(pointed.found[:3], memory.lookup(queries, 7)[:3], strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("factory", ["exact", "IVF4,SQfp16"])
def test_files_are_closed_when_nobody_holds_the_datastore(tmp_path, factory):
    """Without the garbage collector: a process that opens many would run out of descriptors before it comes by."""
    path = tmp_path / "memory"
    Datastore.build(FakeEncoder(), random_documents(1, 40), path, index=factory, show_progress=False)
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        memory = Datastore(path)
        memory.add(FakeEncoder(), [Document("new", "something else")])
        memory.search(np.zeros((1, memory.width), np.float32), 3)
        assert len(os.listdir("/proc/self/fd")) > before
        del memory
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


def test_metadata_are_compared_as_json_and_not_as_python(tmp_path):
    source = [
        Document("true", "xone", {"draft": True, "score": math.nan, "list": [1, True]}),
        Document("one", "xtwo", {"draft": 1, "score": 0.5, "list": [1, 1]}),
        Document("one as float", "xthree", {"draft": 1.0, "score": 2**70}),
        Document("text", "xfour", {"draft": "1"}),
    ]
    memory = build(source, tmp_path / "memory")
    for where, expected in (
        ({"draft": 1}, ["one", "one as float"]),
        ({"draft": True}, ["true"]),
        ({"draft": 1.0}, ["one", "one as float"]),
        ({"draft": "1"}, ["text"]),
        ({"score": math.nan}, ["true"]),
        ({"score": 2**70}, ["one as float"]),
        ({"list": [1, 1]}, ["one"]),
        ({"draft": None}, []),
    ):
        assert memory.remove(where=where, dry_run=True) == expected, where


def test_the_order_of_metadata_does_not_matter(tmp_path):
    memory = build([Document("a", "xone", {"b": 1, "c": {"d": 2, "e": 3}})], tmp_path / "memory")
    again = [Document("a", "xone", {"c": {"e": 3, "d": 2}, "b": 1})]
    assert memory.add(FakeEncoder(), again) == (0, 0)
    other = build(again, tmp_path / "other")
    assert memory.merge(other.path) == (0, 0)


def test_metadata_too_deep_for_json_are_named(tmp_path):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(CorpusError, match="the metadata of 'a' cannot be stored as JSON"):
        build([Document("a", "xone", {"deep": deep})], tmp_path / "memory")


def test_going_back_from_a_damaged_version(memory, documents):
    version, before = memory.manifest.version, content(memory)
    memory.add(FakeEncoder(), documents[6:])
    shutil.rmtree(memory.path / "segments" / memory.manifest.segments[-1].name)
    with pytest.raises(DatastoreError, match="is missing"):
        Datastore(memory.path)
    rollback_to(memory.path, version)
    assert content(Datastore(memory.path)) == before


def test_nobody_goes_back_to_what_is_missing(memory):
    memory.build_index("Flat")
    version = memory.manifest.version
    memory.build_index("exact")
    shutil.rmtree(memory.path / "index")
    before = memory.manifest
    with pytest.raises(DatastoreError, match=r"index\.faiss is missing; restore it"):
        memory.rollback(version)
    assert Datastore(memory.path).manifest == before


@pytest.mark.parametrize("several", [False, True])
def test_the_name_of_a_removed_file_is_forgotten_by_compact(tmp_path, documents, several):
    (tmp_path / "secret.txt").write_text("xnothing to see")
    (tmp_path / "open.txt").write_text("xsomething to see")
    source = [str(tmp_path / "secret.txt"), *([str(tmp_path / "open.txt")] if several else [])]
    memory = build(source if several else source[0], tmp_path / "memory")
    memory.add(FakeEncoder(), documents[:1])
    memory.compact()
    assert "secret.txt" in memory.manifest.corpus["source"]  # it is there still
    memory.remove("secret.txt")
    assert any("names it as a source: compact" in line for line in audit(memory.path, "secret.txt"))
    memory.compact()
    assert audit(memory.path, "secret.txt") == []
    assert not [file for file in memory.path.rglob("*") if file.is_file() and b"secret" in file.read_bytes()]
    memory.remove(documents[0].id)
    before = memory.manifest.corpus
    memory.compact()
    assert memory.manifest.corpus == before

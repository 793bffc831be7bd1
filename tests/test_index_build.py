"""Building and opening an index: which one, what cannot be built, what is damaged; the datastore stays as it was."""

import math
import resource
import shutil
from dataclasses import replace

import pytest

from fake_encoder import FakeEncoder, random_documents
from memlm import Datastore
from memlm.errors import DatastoreCorrupt, DatastoreError, IndexError_
from memlm.index import _exact, _faiss, auto_factory

DOCUMENTS = random_documents(12, 130)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "memory"
    return Datastore.build(FakeEncoder(), DOCUMENTS, path, index="exact", show_progress=False)


@pytest.mark.parametrize("factory", ["nonsense", "", "IVF8,PQ3", "IVF8,"])
def test_a_factory_that_faiss_does_not_know_stops_the_build_before_it_begins(tmp_path, base, factory):
    encoder = FakeEncoder(change=lambda *_: pytest.fail("keys were computed"))
    with pytest.raises(IndexError_, match=f"FAISS does not take '{factory}' for keys of width 8: .* expected 'auto'"):
        Datastore.build(encoder, DOCUMENTS, tmp_path / "memory", index=factory, show_progress=False)
    assert list(tmp_path.iterdir()) == []
    before = sorted(base.path.rglob("*"))
    with pytest.raises(IndexError_):
        base.build_index(factory)
    assert sorted(base.path.rglob("*")) == before


@pytest.mark.parametrize("factory", ["IVF4096,Flat", "IVF0,Flat", "PCA20,Flat", "IDMap,Flat"])
def test_an_index_that_cannot_be_filled_leaves_the_datastore_as_it_was(base, factory):
    before = sorted(base.path.rglob("*"))
    with pytest.raises(IndexError_, match=rf"FAISS cannot build '{factory}' over 1572 keys of width 8: (?!Error in)"):
        base.build_index(factory)
    assert sorted(base.path.rglob("*")) == before
    assert base.manifest.version == 2


def test_a_disk_that_is_full_while_an_index_is_written(base, tmp_path):
    memory = Datastore(shutil.copytree(base.path, tmp_path / "memory"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(IndexError_, match="cannot build"):
            memory.build_index("Flat")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (memory.path / "index").exists()
    assert Datastore(memory.path).index.details == {"kind": "exact"}


def test_a_damaged_index_or_one_of_another_datastore_is_refused(base, tmp_path):
    path = shutil.copytree(base.path, tmp_path / "memory")
    Datastore(path).build_index("IVF8,Flat")
    file = path / "index" / "000003" / "index.faiss"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"!")
    with pytest.raises(DatastoreCorrupt, match=r"index\.faiss does not match its checksum"):
        Datastore(path)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DatastoreCorrupt, match=r"index\.faiss has .* bytes; expected"):
        Datastore(path, verify=False)
    file.write_bytes(b"FAISS" + data[5:])
    with pytest.raises(IndexError_, match=r"does not fit its datastore: .*; rebuild it"):
        Datastore(path, verify=False)
    other = Datastore.build(FakeEncoder(), DOCUMENTS[:1], tmp_path / "other", index="Flat", show_progress=False)
    part = other.manifest.index
    with pytest.raises(IndexError_, match="it holds 131 keys of width 8"):
        _faiss.FaissIndex(base.keys, other.path / "index", replace(part, details={**part.details, "entries": 1572}))


def test_recall_is_measured_and_kept(base, tmp_path):
    path = shutil.copytree(base.path, tmp_path / "memory")
    Datastore(path).build_index("IVF8,SQ8")
    details = Datastore(path).manifest.index.details
    assert {name: details[name] for name in ("lists", "recall_k", "recall_queries")} == {
        "lists": 8,
        "recall_k": 1024,
        "recall_queries": 256,
    }
    assert details["recall"] >= 0.99
    assert 1 <= details["nprobe"] <= 8


@pytest.mark.parametrize("width", [1, 64, 256, 4096, 1 << 20])
def test_the_index_is_chosen_by_size(width):
    for entries in [1, 100, *(1 << power for power in range(8, 34))]:
        factory = auto_factory(entries, width, "float16")
        if factory == "exact":
            assert entries <= 4096 or entries * width <= 1 << 25
            continue
        lists, codes = factory.removeprefix("IVF").split(",")
        assert math.log2(int(lists)).is_integer()
        assert math.isqrt(entries) <= int(lists) <= min(2 * math.isqrt(entries) + 1, entries // 32)
        assert codes == ("SQ8" if entries * width * 2 > 16 << 30 else "SQfp16")
        assert auto_factory(entries, width, "bfloat16") == factory.replace("fp16", "bf16")


def test_auto_is_exact_for_a_small_datastore(base):
    before = base.manifest.version
    base.build_index("auto")
    assert base.manifest.version == before
    assert isinstance(base.index, _exact.ExactIndex)


def test_errors_of_an_index_are_errors_of_a_datastore():
    assert issubclass(IndexError_, DatastoreError)

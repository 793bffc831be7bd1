"""Compressed keys: the codec against NumPy in float64, and a datastore that goes on living after `compress`."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fake_encoder import FakeEncoder, random_documents
from memlm import Datastore, Document
from memlm.datastore import Manifest, Pointers, _change, audit, verify
from memlm.datastore._codec import Codec
from memlm.datastore._fit_codec import fit_codec
from memlm.datastore._part import Part
from memlm.errors import ConfigError, DatastoreCorrupt, DatastoreError, DatastoreMismatch, KeyOverflow, ShapeError
from memlm.index import auto_factory

QUIET = {"show_progress": False}
METRICS = ["squared_l2", "inner_product"]
DOCUMENTS = random_documents(8, 60)
QUERIES = np.random.default_rng(3).normal(size=(20, 8)).astype(np.float32)


def sample(n=500, width=12, seed=0, scale=1.0):
    """Keys whose numbers depend on one another, not about zero."""
    generator = np.random.default_rng(seed)
    keys = generator.normal(size=(n, width)) @ generator.normal(size=(width, width)) + generator.normal(size=width)
    return torch.tensor(keys * scale, dtype=torch.float32)


def projected(keys, codec):
    """The oracle of a projection."""
    return (keys.double().numpy() - codec.mean.double().numpy()) @ codec.projection.double().numpy()


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99), st.sampled_from(METRICS), st.floats(1e-3, 1e3))
def test_a_decoded_key_is_within_half_a_step_of_the_projected_one(n, width, seed, metric, scale):
    keys = sample(n, 9, seed, scale)
    codec = fit_codec(keys, width, "int8", metric)
    codes = codec.encode(keys)
    assert (codes.dtype, codes.shape) == (torch.int8, (n, width))
    error = np.abs(codec.decode(codes).double().numpy() - projected(keys, codec))
    assert (error <= 0.5001 * codec.step.double().numpy() + 1e-5 * float(keys.abs().max())).all()


def test_float16_codes_are_the_projected_keys_rounded():
    keys = sample()
    codec = fit_codec(keys, 5, "float16", "squared_l2")
    codes = codec.encode(keys)
    assert codes.dtype == torch.float16
    assert codec.decode(codes).equal(codes.float())
    np.testing.assert_allclose(codes.double().numpy(), projected(keys, codec), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("metric", METRICS)
def test_the_projection_keeps_the_most_that_so_many_numbers_can(metric):
    keys = sample()
    about = keys.double().numpy() - (0 if metric == "inner_product" else keys.double().numpy().mean(axis=0))
    kept = np.linalg.svd(about, compute_uv=False)[:4] ** 2
    codec = fit_codec(keys, 4, "int8", metric)
    projection = codec.projection.double().numpy()
    np.testing.assert_allclose(projection.T @ projection, np.eye(4), atol=1e-5)
    np.testing.assert_allclose((projected(keys, codec) ** 2).sum(axis=0), kept, rtol=1e-4)
    others = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 4)))[0]  # the test can fail
    assert ((about @ others) ** 2).sum() < 0.9 * kept.sum()


def test_nothing_is_lost_where_all_numbers_are_kept_and_none_rounded():
    keys, queries = sample(), sample(30, seed=5)
    for metric in METRICS:
        codec = fit_codec(keys, 12, "float16", metric)
        mine, theirs = (codec.project(part).double().numpy() for part in (queries, keys))
        asked, stored = queries.double().numpy(), keys.double().numpy()
        if metric == "inner_product":
            np.testing.assert_allclose(mine @ theirs.T, asked @ stored.T, rtol=1e-4, atol=1e-3)
        else:
            distances = ((asked[:, None] - stored) ** 2).sum(axis=2)
            np.testing.assert_allclose(((mine[:, None] - theirs) ** 2).sum(axis=2), distances, rtol=1e-4, atol=1e-3)


def test_what_lies_outside_the_grid_goes_to_its_end():
    codec = fit_codec(sample(), 12, "int8", "squared_l2")
    codes = codec.encode(torch.cat([codec.mean[None] + 1e4 * codec.projection.T, codec.mean[None] - 1e4]))
    assert (codes[:12].diagonal() == 127).all()
    assert codec.decode(codes).isfinite().all()


@pytest.mark.parametrize("keys", [torch.full((1, 4), 3.0), torch.full((9, 4), -2.5), torch.zeros(3, 4)])
def test_keys_that_are_all_alike_come_back(keys):
    for metric in METRICS:
        codec = fit_codec(keys, 4, "int8", metric)
        assert (codec.step > 0).all()
        np.testing.assert_allclose(codec.decode(codec.encode(keys)).numpy(), projected(keys, codec), atol=1e-5)


def test_keys_that_cannot_be_encoded_are_an_error():
    codec = fit_codec(sample(), 3, "int8", "squared_l2")
    assert codec.encode(torch.zeros(0, 12)).shape == (0, 3)
    with pytest.raises(ShapeError, match=r"keys have shape \(2, 11\); expected \(n, 12\)"):
        codec.encode(torch.zeros(2, 11))
    for bad in (math.nan, math.inf):
        with pytest.raises(KeyOverflow, match="NaN or infinite; check its weights"):
            codec.encode(torch.full((1, 12), bad))
    large = fit_codec(sample(scale=1e6), 3, "float16", "squared_l2")
    with pytest.raises(KeyOverflow, match="overflow float16; compress them to int8"):
        large.encode(sample(scale=1e6))


@pytest.mark.parametrize("width", [0, -1, 13, 2.0, 10**10])
def test_widths_that_cannot_be_are_refused(width):
    with pytest.raises(ConfigError, match=f"width is {width}; expected 1 to 12, the numbers in a key"):
        fit_codec(sample(), width, "int8", "squared_l2")


def test_types_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="key type is 'int4'; expected int8 or float16"):
        fit_codec(sample(), 4, "int4", "squared_l2")
    with pytest.raises(ConfigError, match="there are no keys to fit a codec to; expected at least one"):
        fit_codec(torch.zeros(0, 4), 4, "int8", "squared_l2")


# A datastore


def build(path, source=DOCUMENTS, **settings):
    return Datastore.build(FakeEncoder(), source, path, **QUIET | {"index": "exact", "segment_entries": 130} | settings)


@pytest.fixture
def memory(tmp_path):
    return build(tmp_path / "memory")


def tensors_of(memory):
    """The codec's tensors and all codes, read by another program."""
    part = memory.manifest.codec
    codec = load_file(memory.path / "codec" / part.name / "codec.safetensors")
    codes = [
        load_file(memory.path / "segments" / segment.name / "keys.safetensors")["keys"]
        for segment in memory.manifest.segments
    ]
    return {name: array.astype(np.float64) for name, array in codec.items()}, np.concatenate(codes)


def oracle(memory, queries, k):
    """The nearest entries that are not deleted and their distances, in float64."""
    codec, codes = tensors_of(memory)
    keys = codec["offset"] + codec["step"] * codes
    asked = (queries.astype(np.float64) - codec["mean"]) @ codec["projection"]
    distances = -asked @ keys.T
    if memory.metric == "squared_l2":
        distances = ((asked[:, None] - keys) ** 2).sum(axis=2)
    if memory.live is not None:
        distances[:, ~memory.live] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


def assert_finds(memory, k=9):
    found = memory.search(QUERIES, k)
    order, distances = oracle(memory, QUERIES, k + 1)
    assert found.present.all()
    np.testing.assert_allclose(found.distances, distances[:, :k], rtol=1e-4, atol=1e-4)
    clear = np.diff(distances, axis=1).min(axis=1) > 1e-3
    assert clear.any()
    assert (found.entries[clear] == order[clear, :k]).all()


def content(memory):
    """Documents with their values and codes."""
    _, codes = tensors_of(memory)
    rows = {}
    for item in memory.documents():
        part = slice(*item["entries"])
        rows[item["id"]] = (item["text"], memory.values[part].tolist(), codes[part].tolist())
    return rows


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("key_dtype", "width"), [("int8", 8), ("int8", 3), ("float16", 8), ("float16", 5)])
@pytest.mark.parametrize("index", ["exact", "Flat", "IVF2,Flat", "IVF1,SQfp16", "IVF1,SQ8"])
def test_search_finds_what_brute_force_over_the_codes_finds(tmp_path, metric, key_dtype, width, index):
    memory = build(tmp_path / "memory", metric=metric)
    before = list(memory.documents()), memory.values.tolist(), memory.manifest
    memory.compress(width, key_dtype, index=index)
    assert (list(memory.documents()), memory.values.tolist()) == before[:2]
    assert memory.manifest.keys == {"dtype": key_dtype, "width": width}
    assert (memory.width, memory.keys.width) == (8, width)
    assert memory.manifest.content_sha256 != before[2].content_sha256
    assert len(memory.history()) == 1
    assert verify(memory.path) == []
    if index != "IVF2,Flat" or memory.index.details["nprobe"] == 2:
        assert_finds(memory)
        assert_finds(Datastore(memory.path))
    exact = index in ("Flat", "IVF2,Flat") or (key_dtype, index) in (("float16", "IVF1,SQfp16"), ("int8", "IVF1,SQ8"))
    assert memory.index.details.get("stores_keys", True) == (exact or index == "exact")


def test_all_numbers_of_a_key_in_int8_find_almost_the_same(memory):
    before = memory.search(QUERIES, 20)
    memory.compress(8)
    found = memory.search(QUERIES, 20)
    np.testing.assert_allclose(found.distances, before.distances, rtol=0.1, atol=0.1)
    same = [len(np.intersect1d(one, other)) for one, other in zip(before.entries, found.entries, strict=True)]
    assert np.mean(same) > 18
    memory = build(memory.path.parent / "narrow")
    memory.compress(1)
    found = memory.search(QUERIES, 20)
    same = [len(np.intersect1d(one, other)) for one, other in zip(before.entries, found.entries, strict=True)]
    assert np.mean(same) < 10  # so the test can fail


@pytest.mark.parametrize("metric", METRICS)
def test_pointers_measure_as_searches_do(tmp_path, metric):
    memory = build(tmp_path / "memory", metric=metric)
    memory.compress(4)
    queries = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    found = memory.search(queries, 5)
    rows = np.repeat(np.arange(60), 5)
    distances = memory.distances(queries, rows, found.entries.ravel())
    np.testing.assert_allclose(distances.reshape(60, 5), found.distances, rtol=1e-4, atol=1e-4)
    targets = memory.values[:60].astype(np.int64)
    pointed = Pointers(memory, math.inf).lookup(queries, targets, np.zeros(60, np.int64), 5)
    for one, other in zip(pointed.found[:3], memory.lookup(queries, 5)[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(ShapeError, match=r"expected \(n, 8\)"):
        memory.search(queries[:, :4], 5)


def test_life_goes_on(memory, tmp_path):
    memory.compress(5)
    codec = memory.manifest.codec
    new = [Document("new", "xa new one"), Document("d2", "xin the place of another")]
    assert memory.add(FakeEncoder(), new, replace=True) == (2, 1)
    first, stop = memory.document_range("xa new one")
    for rows, keys in FakeEncoder().keys([FakeEncoder().tokenize(new[0]).ids]):
        assert memory.keys.segments[-1].keys[rows].equal(memory.keys.codec.encode(keys))
    assert (first, stop) == (memory.slots - 10 - 24, memory.slots - 24)
    assert_finds(memory)
    memory.remove("d4")
    assert_finds(memory)
    memory.build_index("IVF1,SQ8")
    memory.add(FakeEncoder(), random_documents(9, 60)[8:])
    assert_finds(memory)
    version, held = memory.manifest.version, content(memory)
    memory.remove("new")
    memory.rollback(version)
    assert content(memory) == held
    memory.compact()
    assert content(memory) == held == content(Datastore(memory.path))
    assert memory.manifest.codec == codec
    assert_finds(memory)
    assert verify(memory.path) == []
    copy = Datastore(shutil.copytree(memory.path, tmp_path / "copy"))
    copy.add(FakeEncoder(), [Document("theirs", "xonly there")])
    assert memory.merge(copy.path) == (1, 0)
    assert content(memory) == content(copy)
    assert_finds(memory)


def test_keys_as_built_are_encoded_when_they_are_merged(memory, tmp_path):
    memory.remove("d7")
    memory.compress(5)
    whole = build(tmp_path / "whole")
    expected = memory.keys.codec.encode(whole.keys.gather_keys(np.arange(*whole.document_range(DOCUMENTS[7].text))))
    assert memory.merge(whole.path) == (1, 0)
    assert content(memory)["d7"][2] == expected.tolist()
    assert_finds(memory)
    before = Manifest.load(whole.path)
    with pytest.raises(DatastoreMismatch, match="those here are not compressed; merge first and compress then"):
        whole.merge(memory.path)
    whole.compress(5)
    other = Manifest.load(whole.path)
    with pytest.raises(DatastoreMismatch, match=r"compressed by the codec .*, those here are compressed by"):
        whole.merge(memory.path)
    assert (before != other, Manifest.load(whole.path)) == (True, other)
    narrow = Datastore.build(FakeEncoder(width=5), DOCUMENTS, tmp_path / "narrow", **QUIET)
    with pytest.raises(DatastoreMismatch, match="the datastores have the keys"):
        memory.merge(narrow.path)


def test_a_build_that_was_broken_off_goes_on_with_codes(tmp_path):
    def stop(number, keys):
        if number == 20:
            raise KeyboardInterrupt
        return keys

    with pytest.raises(KeyboardInterrupt):
        Datastore.build(FakeEncoder(change=stop), DOCUMENTS, tmp_path / "memory", segment_entries=130, **QUIET)
    memory = Datastore(tmp_path / "memory")
    assert not memory.manifest.complete
    memory.compress(6)
    memory = build(memory.path)
    assert (memory.manifest.complete, memory.manifest.documents) == (True, 8)
    assert memory.manifest.keys == {"dtype": "int8", "width": 6}
    assert_finds(memory)
    with pytest.raises(DatastoreError, match="exists already"):
        build(memory.path)


def test_a_long_document_is_encoded_piece_by_piece(memory, tmp_path, monkeypatch):
    whole = Datastore(shutil.copytree(memory.path, tmp_path / "whole"))
    whole.compress(5)
    monkeypatch.setattr(_change, "_COPIED_TOGETHER", 7)
    memory.compress(5)
    expected, found = (tensors_of(item)[1].astype(int) for item in (whole, memory))
    assert np.abs(found - expected).max() <= 1  # products of another shape may round another way
    assert (found == expected).mean() > 0.99


def test_what_was_removed_leaves_no_trace(memory, tmp_path):
    memory.remove("d3")
    memory.compress(4)
    assert audit(memory.path, "d3", DOCUMENTS[3].text) == []
    without = build(tmp_path / "without", [item for item in DOCUMENTS if item.id != "d3"])
    without.compress(4)
    assert content(memory) == content(without)  # the codec has not seen it either
    assert memory.manifest.codec.files == without.manifest.codec.files


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width is 0; expected 1 to 8"),
        ({"width": 9}, "width is 9; expected 1 to 8"),
        ({"width": 4, "key_dtype": "bfloat16"}, "key type is 'bfloat16'; expected int8 or float16"),
        ({"width": 4, "index": "nonsense"}, "FAISS does not take 'nonsense'"),
        ({"width": 4, "index": "PQ8x4"}, "FAISS (does not take|cannot build) 'PQ8x4'"),
        ({"width": 4, "index": "IVF900,Flat"}, "FAISS cannot build 'IVF900,Flat'"),
    ],
)
def test_what_cannot_be_done_changes_nothing(memory, settings, message):
    before, files = memory.manifest, sorted(memory.path.rglob("*"))
    with pytest.raises((ConfigError, DatastoreError), match=message):
        memory.compress(**settings)
    assert memory.manifest == before == Manifest.load(memory.path)
    assert sorted(memory.path.rglob("*")) == files
    memory.compress(4)
    with pytest.raises(DatastoreError, match="compressed already, to 4 × int8; build again"):
        memory.compress(4)
    assert_finds(memory)


def test_a_datastore_without_entries_is_refused(memory):
    memory.remove(pattern="*")
    with pytest.raises(DatastoreError, match="has no entries to fit a codec to; add documents first"):
        memory.compress(4)


def test_fewer_entries_than_numbers_are_refused(tmp_path):
    """The components of n keys beyond n - 1 are arbitrary, and their grid has no width: later keys would be lost."""
    memory = build(tmp_path / "memory", [Document("a", "xabc"), Document("b", "xabcdefgh")])
    memory.remove("a")
    memory.remove("b")
    memory.add(FakeEncoder(), [Document("c", "xone")])  # what counts is not deleted
    before, files = memory.manifest, sorted(memory.path.rglob("*"))
    for width in (4, 8):
        with pytest.raises(ConfigError, match=f"width is {width}, but .*memory has 4 entries; expected more .*smaller"):
            memory.compress(width)
    assert Manifest.load(memory.path) == before
    assert sorted(memory.path.rglob("*")) == files
    memory.compress(3)
    assert_finds(memory, k=3)


def test_keys_that_come_after_few_are_not_lost(tmp_path):
    """With one entry more than numbers, every component has some width, so that later keys can differ."""
    memory = build(tmp_path / "memory", [Document("a", "xabcdefgh")])
    memory.compress(8)
    memory.add(FakeEncoder(), DOCUMENTS)
    assert all(len(np.unique(column)) > 2 for column in tensors_of(memory)[1].T)


def test_a_reader_keeps_what_it_opened(memory):
    reader = Datastore(memory.path)
    before = reader.search(QUERIES, 5)
    memory.compress(4)
    for one, other in zip(reader.search(QUERIES, 5), before, strict=True):
        assert np.array_equal(one, other)
    reader.refresh()
    assert_finds(reader)


def test_a_damaged_codec_is_noticed(memory):
    memory.compress(4)
    file = memory.path / "codec" / memory.manifest.codec.name / "codec.safetensors"
    data = file.read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], b""):
        file.write_bytes(damaged)
        with pytest.raises(DatastoreCorrupt, match=r"codec\.safetensors"):
            Datastore(memory.path)
        assert any("codec.safetensors" in line for line in verify(memory.path))
    file.unlink()
    with pytest.raises(DatastoreCorrupt, match=r"codec\.safetensors is missing"):
        memory.add(FakeEncoder(), [Document("new", "xa new one")])
    file.write_bytes(data)
    assert verify(memory.path) == []
    Datastore(memory.path).add(FakeEncoder(), [Document("new", "xa new one")])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", np.zeros(9), "other tensors"),
        ("projection", np.zeros((8, 5)), "other tensors"),
        ("surprise", np.zeros(1), "other tensors"),
        ("step", np.zeros(4), "numbers that cannot be"),
        ("offset", np.full(4, np.nan), "numbers that cannot be"),
        ("offset", np.full(4, 3e38), "numbers that cannot be"),
        ("mean", np.full(8, -1e30), "numbers that cannot be"),
        ("step", np.full(4, 1e-45), "numbers that cannot be"),
    ],
)
def test_a_codec_that_cannot_be_is_refused_though_its_checksum_is_right(memory, name, value, message):
    memory.compress(4)
    part = memory.manifest.codec
    file = memory.path / "codec" / part.name / "codec.safetensors"
    save_file({**load_file(file), name: value.astype(np.float32)}, file)
    forged = replace(memory.manifest, codec=Part.describe(memory.path / "codec", part.name, part.details))
    forged.publish(memory.path)
    with pytest.raises(DatastoreCorrupt, match=message):
        Datastore(memory.path)
    assert any(message in line for line in verify(memory.path))


def test_a_codec_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Part, "describe", fail)
    with pytest.raises(OSError, match="No space"):
        fit_codec(sample(), 3, "int8", "squared_l2").write(tmp_path, "000001", {"dtype": "float16", "width": 12})
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    codec = fit_codec(sample(), 3, "int8", "squared_l2")
    part = codec.write(tmp_path, "000001", {"dtype": "float16", "width": 12})
    again = Codec.open(tmp_path, part, {"dtype": "int8", "width": 3}, verify=True)
    assert again.encode(sample()).equal(codec.encode(sample()))


def test_the_index_of_int8_keys_holds_them_in_8_bits():
    assert auto_factory(1_000_000, 128, "int8") == "IVF1024,SQ8"
    assert auto_factory(1_000_000, 128, "float16") == "IVF1024,SQfp16"
    assert auto_factory(10_000, 128, "int8") == "exact"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_keys_that_are_not_finite_are_not_fitted_to(value):
    keys = torch.randn(50, 8)
    keys[3, 2] = value
    with pytest.raises(DatastoreError, match="NaN or infinite"):
        fit_codec(keys, 4, "int8", "squared_l2")


def test_a_codec_that_the_next_writer_would_sweep_away_is_refused(memory):
    memory.compress(4)
    forged = replace(memory.manifest, kept={**memory.manifest.kept, "first_codec": 99})
    forged.publish(memory.path)
    with pytest.raises(DatastoreCorrupt, match="names codec/"):
        Datastore(memory.path)

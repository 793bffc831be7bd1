"""The table of rows on disk: what is written, undone, kept through a kill, published, and refused when damaged."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlm.errors import (
    ConfigError,
    DatastoreCorrupt,
    DatastoreError,
    FormatVersionError,
    KeyOverflow,
    ShapeError,
)
from memlm.layers import Bank, TensorRows


def create(path, rows=12, key_width=4, value_width=3, **settings):
    return Bank.create(path, rows=rows, key_width=key_width, value_width=value_width, **settings)


def some(count, seed=0, key_width=4, value_width=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, key_width, generator=generator), torch.randn(count, value_width, generator=generator)


def content(bank):
    return {name: bank.read(name, torch.arange(bank.rows)) for name in ("owners", "keys", "values")}


def same(left, right):
    return all(left[name].equal(right[name]) for name in left)


def test_rows_are_written_read_and_deleted(tmp_path):
    keys, values = some(5)
    with create(tmp_path / "bank", note={"made": "by a test"}) as bank:
        assert (len(bank), bank.dtype, bank.note) == (0, torch.float32, {"made": "by a test"})
        assert bank.write(7, keys[:3], values[:3]).tolist() == [0, 1, 2]
        assert bank.write(-8, keys[3:], values[3:]).tolist() == [3, 4]
        assert bank.delete(7) == 3
        assert bank.delete(7) == bank.delete(0) == 0
        assert len(bank) == 2
        # holes are filled before new rows are taken
        assert bank.write(9, *some(4, seed=1)).tolist() == [0, 1, 2, 5]
    with Bank(tmp_path / "bank") as bank:
        assert len(bank) == 6
        assert bank.owners.tolist() == [9, 9, 9, -8, -8, 9] + [0] * 6
        assert bank.keys[3:5].equal(keys[3:])
        assert bank.read("values", torch.tensor([4])).equal(values[4:])


def test_deleted_rows_are_overwritten_on_disk(tmp_path):
    with create(tmp_path / "bank") as bank:
        bank.write(7, torch.full((1, 4), 1.2345), torch.full((1, 3), 1.2345))
    pattern = np.float32(1.2345).tobytes()
    assert pattern in (tmp_path / "bank" / "rows.safetensors").read_bytes()
    with Bank(tmp_path / "bank", writable=True) as bank:
        bank.delete(7)
    assert not [path for path in (tmp_path / "bank").iterdir() if pattern in path.read_bytes()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nearest_is_that_of_an_oracle(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("memlm.layers._bank._SCORES", 5 * 9)  # blocks of nine rows
    keys, values = some(40)
    queries = some(5, seed=1)[0]
    bank = create(tmp_path / "bank", rows=64, dtype=dtype)
    for owner in range(1, 11):
        bank.write(owner, keys[4 * owner - 4 : 4 * owner], values[4 * owner - 4 : 4 * owner])
    bank.delete(3)
    found = bank.nearest(queries, 6)
    stored = bank.keys[:40].double().numpy()
    scores = queries.double().numpy() @ stored.T
    scores[:, 8:12] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :6]
    assert np.array_equal(found.keys.double().numpy(), stored[best])
    assert found.values.equal(bank.values[torch.from_numpy(best)].float())
    assert found.present.all()
    in_memory = TensorRows(*(torch.cat([item[:8], item[12:40]]).float() for item in (bank.keys, bank.values)))
    assert in_memory.nearest(queries, 6).keys.equal(found.keys)


def test_absent_rows_are_masked(tmp_path):
    bank = create(tmp_path / "bank")
    queries = some(2)[0]
    assert not bank.nearest(queries, 3).present.any()
    keys, values = some(2, seed=1)
    bank.write(1, -keys.abs(), values)  # scores below those of empty rows, which are zero
    bank.write(2, keys, values)
    bank.delete(1)
    for rows in (bank, TensorRows(keys, values)):
        found = rows.nearest(queries.abs(), 3)
        assert found.present.tolist() == [[True, True, False]] * 2
        assert found.keys.shape == (2, 3, 4)
        assert found.values.shape == (2, 3, 3)
    assert not TensorRows(keys[:0], values[:0]).nearest(queries, 3).present.any()


def test_gradients_flow_to_the_rows_in_memory_that_are_found():
    keys, values = (item.requires_grad_() for item in some(5))
    found = TensorRows(keys, values).nearest(keys.detach()[:1] * 10, 1)
    (found.keys.sum() + found.values.sum()).backward()
    assert (keys.grad.abs().sum(dim=1) > 0).tolist() == [True] + [False] * 4
    assert (values.grad.abs().sum(dim=1) > 0).tolist() == [True] + [False] * 4


def test_what_is_not_committed_is_undone(tmp_path):
    keys, values = some(6)
    bank = create(tmp_path / "bank", moments=True)
    bank.write(1, keys[:3], values[:3])
    bank.commit({"weights": torch.ones(2)}, {"step": 3})
    before = content(bank)
    bank.write(2, keys[3:], values[3:])
    bank.delete(1)
    bank.update(torch.tensor([0, 4, 11]), values=torch.zeros(3, 3), squares=torch.ones(3))
    assert not same(content(bank), before)
    bank.rollback()
    assert same(content(bank), before)
    assert bank.read("squares", torch.arange(12)).equal(torch.zeros(12))
    assert len(bank) == 3
    assert bank.write(5, keys[3:4], values[3:4]).tolist() == [3]
    bank.close()  # without a commit
    with pytest.raises(DatastoreError, match="closed"):
        bank.write(1, keys[:1], values[:1])
    with Bank(tmp_path / "bank") as bank:
        assert same(content(bank), before)
        assert (bank.committed.number, bank.committed.note) == (1, {"step": 3})
        assert bank.committed.tensors["weights"].tolist() == [1, 1]


def test_an_error_inside_a_block_undoes_it_and_a_commit_beside_it_stays(tmp_path):
    keys, values = some(2)
    with create(tmp_path / "bank") as bank:
        bank.write(1, keys, values)
        bank.commit(note={"kept": True})
    with suppress(ZeroDivisionError), Bank(tmp_path / "bank", writable=True) as bank:
        bank.write(2, keys, values)
        1 / 0  # noqa: B018
    with Bank(tmp_path / "bank", writable=True) as bank:
        assert len(bank) == 2
        bank.write(3, keys, values)  # the end of the block commits, with what was committed beside the rows before
    with Bank(tmp_path / "bank") as bank:
        assert (len(bank), bank.committed.note) == (4, {"kept": True})


@given(st.lists(st.tuples(st.sampled_from(["write", "delete", "commit", "rollback"]), st.integers(1, 4)), max_size=25))
def test_any_order_of_changes_is_as_in_a_dictionary(tmp_path_factory, changes):
    bank = create(tmp_path_factory.mktemp("banks") / "bank", rows=40)
    live, kept = {}, {}
    for number, (kind, owner) in enumerate(changes):
        if kind == "write" and len(bank) + owner <= 40:
            keys, values = some(owner, seed=number)
            bank.write(owner, keys, values)
            live = live | {owner: [*live.get(owner, []), *values.tolist()]}
        elif kind == "delete":
            assert bank.delete(owner) == len(live.get(owner, []))
            live = {name: rows for name, rows in live.items() if name != owner}
        elif kind == "commit":
            bank.commit()
            kept = live
        elif kind == "rollback":
            bank.rollback()
            live = kept
        assert len(bank) == sum(map(len, live.values()))
        for name in range(1, 5):
            found = bank.values[bank.owners == name].tolist()
            assert sorted(found) == sorted(live.get(name, []))
    bank.close()
    with Bank(bank.folder) as bank:
        assert sorted(bank.owners[bank.owners != 0].tolist()) == sorted(o for o, rows in kept.items() for _ in rows)


KILLED = """
import sys, torch
from memlm.layers import Bank
bank = Bank(sys.argv[1], writable=True)
generator = torch.Generator().manual_seed(0)
for step in range(1_000_000):
    ids = torch.randperm(bank.rows, generator=generator)[:50]
    bank.update(ids, values=bank.read("values", ids) + 1, keys=torch.randn(50, 4, generator=generator))
    if step % 3 == 2:
        bank.commit({"keys": bank.keys}, {"total": float(bank.values.sum())})
        print(step, flush=True)
"""


def test_a_killed_process_is_led_back_to_its_last_commit(tmp_path):
    """Killed at any moment: rows are those of a commit, of the last one that was reported or the one after it."""
    create(tmp_path / "bank", rows=400).close()
    generator = np.random.default_rng(0)
    last, undone = 0, 0
    for _ in range(12):  # until one was killed between two commits, which some are
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "bank")], stdout=subprocess.PIPE, text=True
        ) as process:
            for _ in range(int(generator.integers(2, 9))):
                process.stdout.readline()
            time.sleep(generator.uniform(0, 0.005))
            process.send_signal(signal.SIGKILL)
        undone += (tmp_path / "bank" / "journal").exists()
        with Bank(tmp_path / "bank") as bank:  # a reader sees the same, and leaves the files alone
            seen = content(bank)
            committed = bank.committed
        with Bank(tmp_path / "bank", writable=True) as bank:
            assert same(content(bank), seen)
            assert not (tmp_path / "bank" / "journal").exists()
            assert bank.keys.equal(committed.tensors["keys"])
            assert float(bank.values.sum()) == committed.note["total"]
            assert committed.number >= last + 2
            last = committed.number
        if undone >= 2:
            break
    assert undone, "no process was killed between two commits"


def journaled(tmp_path):
    """A folder as a killed process leaves it, and what was committed."""
    bank = create(tmp_path / "bank")
    bank.write(1, *some(4))
    bank.commit()
    before = content(bank)
    bank.update(torch.arange(3), values=torch.zeros(3, 3))
    bank.update(torch.arange(2, 8), values=torch.ones(6, 3))
    shutil.copytree(tmp_path / "bank", tmp_path / "left")
    bank.close()
    return tmp_path / "left", before


def test_a_journal_is_undone_whoever_opens_the_table(tmp_path):
    folder, before = journaled(tmp_path)
    with Bank(folder) as bank:
        assert same(content(bank), before)
    assert (folder / "journal").exists()
    with Bank(folder, writable=True) as bank:
        assert same(content(bank), before)
    with Bank(folder) as bank:
        assert same(content(bank), before)


def test_a_journal_that_was_not_undone_would_be_noticed(tmp_path):
    """Negative control of the tests around this one."""
    folder, before = journaled(tmp_path)
    (folder / "journal").unlink()
    with Bank(folder) as bank:
        assert not same(content(bank), before)


@pytest.mark.parametrize("cut", [1, 5, 21, 200])
def test_the_last_record_may_be_cut_off(tmp_path, cut):
    """Its rows were not changed yet: here they were, so only the first record's are compared."""
    folder, before = journaled(tmp_path)
    data = (folder / "journal").read_bytes()
    (folder / "journal").write_bytes(data[:-cut])
    with Bank(folder, writable=True) as bank:
        assert bank.values[:3].equal(before["values"][:3])


def test_a_journal_of_an_earlier_commit_is_forgotten(tmp_path):
    """The process was killed after its commit, before it removed the journal."""
    folder, _ = journaled(tmp_path)
    journal = (folder / "journal").read_bytes()
    with Bank(folder, writable=True) as bank:
        bank.update(torch.arange(3), values=torch.full((3, 3), 9.0))
        bank.commit()
        after = content(bank)
    (folder / "journal").write_bytes(journal)
    with Bank(folder, writable=True) as bank:
        assert same(content(bank), after)


@pytest.mark.parametrize("place", [0, 8, 30, 60])
def test_a_damaged_journal_is_refused(tmp_path, place):
    folder, _ = journaled(tmp_path)
    data = bytearray((folder / "journal").read_bytes())
    data[place] ^= 0x40
    (folder / "journal").write_bytes(data)
    for writable in (False, True):
        with pytest.raises(DatastoreCorrupt, match="journal is damaged"):
            Bank(folder, writable=writable)


def test_a_full_disk_changes_no_row(tmp_path, monkeypatch):
    bank = create(tmp_path / "bank")
    bank.write(1, *some(4))
    bank.commit()
    before = content(bank)
    bank.update(torch.tensor([0]), values=torch.zeros(1, 3))
    full = [True]
    fsync = os.fsync

    def refuse(descriptor):
        if full[0]:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        bank.write(2, *some(3))
    assert (len(bank), bank.values[4:].abs().sum()) == (4, 0)
    full[0] = False
    bank.write(3, *some(2))
    bank.rollback()
    assert same(content(bank), before)


def test_published_tables_are_immutable_and_checked(tmp_path):
    bank = create(tmp_path / "work", note={"a": 1}, moments=True)
    bank.write(1, *some(3))
    bank.write(2, *some(2))
    bank.delete(1)
    bank.commit({"weights": torch.ones(1)}, {"step": 2})
    bank.publish(tmp_path / "published")
    found = bank.nearest(some(4, seed=2)[0], 2)
    bank.write(3, *some(4))
    with Bank(tmp_path / "published") as published:
        assert (len(published), published.rows, published.note, published.published) == (2, 5, {"a": 1}, True)
        assert published.committed.note == {"step": 2}
        assert all(map(torch.equal, published.nearest(some(4, seed=2)[0], 2), found))
        with pytest.raises(DatastoreError, match="is published and cannot be changed"):
            published.write(1, *some(1))
        with Bank(tmp_path / "published"):
            pass  # any number may read it
    with pytest.raises(ConfigError, match="is published and cannot be changed"):
        Bank(tmp_path / "published", writable=True)
    assert not (tmp_path / "published" / "moments.safetensors").exists()
    path = tmp_path / "published" / "rows.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatastoreCorrupt, match="SHA-256"):
        Bank(tmp_path / "published")
    Bank(tmp_path / "published", verify=False).close()


def test_a_table_without_keys_is_published_whole(tmp_path):
    bank = create(tmp_path / "work", key_width=0)
    bank.update(torch.tensor([11]), values=torch.ones(1, 3))
    bank.publish(tmp_path / "published")
    with Bank(tmp_path / "published") as published:
        assert published.values[11].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("rows.safetensors", lambda data: data[:-1], "rows.safetensors cannot be read"),
        ("rows.safetensors", lambda data: data[:6], "rows.safetensors cannot be read"),
        ("rows.safetensors", None, "rows.safetensors cannot be read"),
        ("rows.safetensors", lambda data: data.replace(b"values", b"valves"), "does not fit bank.json"),
        ("rows.safetensors", lambda data: data.replace(b'"F32"', b'"F99"'), "cannot be read"),
        ("moments.safetensors", lambda data: data[:-4], "moments.safetensors cannot be read"),
        ("moments.safetensors", lambda data: data.replace(b"steps", b"stops"), "does not fit bank.json"),
        ("bank.json", lambda data: data[:20], "bank.json is damaged"),
        ("bank.json", lambda data: data.replace(b"memlm-bank", b"other-bank"), "bank.json is damaged"),
        ("bank.json", lambda data: data.replace(b'"rows": 12', b'"rows": -1'), "bank.json is damaged"),
        ("bank.json", lambda data: data.replace(b'"rows": 12', b'"rows": 13'), "does not fit bank.json"),
        ("bank.json", lambda data: data.replace(b"float32", b"float99"), "bank.json is damaged"),
        ("bank.json", lambda data: b"[]", "bank.json is damaged"),
        ("commit.safetensors", None, "commit.safetensors is damaged"),
        ("commit.safetensors", lambda data: data[:-1], "commit.safetensors is damaged"),
        ("commit.safetensors", lambda data: data.replace(b'"number"', b'"nunber"'), "commit.safetensors is damaged"),
    ],
)
def test_damage_is_told(tmp_path, name, damage, message):
    bank = create(tmp_path / "bank", moments=True)
    bank.write(1, *some(2))
    bank.commit({"weights": torch.ones(4)})
    bank.close()
    path = tmp_path / "bank" / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    for writable in (False, True):
        with pytest.raises(DatastoreCorrupt, match=message):
            Bank(tmp_path / "bank", writable=writable)


def test_a_copy_is_the_table_itself_and_it_is_not_pickled(tmp_path):
    with Bank.create(tmp_path / "bank", rows=4, key_width=0, value_width=2) as bank:
        assert copy.deepcopy({"rows": bank})["rows"] is bank
        with pytest.raises(DatastoreError, match="cannot be pickled"):
            pickle.dumps(bank)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigError, match="holds no bank"):
        Bank(tmp_path)
    bank = create(tmp_path / "bank")
    for writable in (False, True):
        with pytest.raises(DatastoreError, match="elsewhere"):
            Bank(tmp_path / "bank", writable=writable)
    bank.close()
    with Bank(tmp_path / "bank"), Bank(tmp_path / "bank"), pytest.raises(DatastoreError, match="in use elsewhere"):
        Bank(tmp_path / "bank", writable=True)
    path = tmp_path / "bank" / "bank.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(FormatVersionError, match="update memlm"):
        Bank(tmp_path / "bank")


def test_what_cannot_be_written(tmp_path):
    bank = create(tmp_path / "bank")
    keys, values = some(13)
    bank.write(1, keys[:2], values[:2])
    before = content(bank)
    with pytest.raises(DatastoreError, match="room for 10 more rows, 11"):
        bank.write(1, keys[:11], values[:11])
    with pytest.raises(ShapeError, match=r"expected \(n, 4\) and \(n, 3\)"):
        bank.write(1, keys[:2], values[:3])
    with pytest.raises(ConfigError, match="owner is 0"):
        bank.write(0, keys[:2], values[:2])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(KeyOverflow, match="nothing was written"):
            bank.write(1, keys[:1] * bad, values[:1])
        with pytest.raises(KeyOverflow, match="nothing was written"):
            bank.update(torch.tensor([0]), keys=keys[:1], values=values[:1] * bad)
    assert same(content(bank), before)
    bank.close()
    with Bank(tmp_path / "bank") as bank, pytest.raises(DatastoreError, match="opened for reading"):
        bank.delete(1)


def test_what_cannot_be_created(tmp_path):
    for settings, message in (
        ({"rows": 0}, "rows is 0"),
        ({"value_width": 0}, "value_width is 0"),
        ({"key_width": -1}, "key_width is -1"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ):
        with pytest.raises(ConfigError, match=message):
            create(tmp_path / "bank", **settings)
    create(tmp_path / "bank").close()
    with pytest.raises(ConfigError, match="exists already"):
        create(tmp_path / "bank")
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]

"""Random injuries to a datastore, and forged manifests: an error, or the right answers; never a crash or a wrong one.

A sample here; MEMLM_KILLS, as in test_faults, makes it 1,500 injuries and 15,000 manifests: without an index, with one,
and with compressed keys.
"""

import copy
import json
import os
import random
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from fake_encoder import FakeEncoder, random_documents
from manifests import current, forge
from memlm import Datastore
from memlm.datastore import verify
from memlm.errors import MemlmError

MANY = "MEMLM_KILLS" in os.environ
pytestmark = pytest.mark.timeout(1200)
QUERIES = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)


@pytest.fixture(scope="module", params=["exact", "IVF2,SQfp16", "compressed"])
def memory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("injured") / "memory"
    index = request.param if request.param != "compressed" else "exact"
    settings = {"segment_entries": 90, "show_progress": False}
    # More tokens than uint16 has, and not so many that counting them would be most of the work
    encoder = FakeEncoder(vocab_size=1 << 17)
    memory = Datastore.build(encoder, random_documents(5, 40), path, index=index, **settings)
    if request.param == "compressed":
        memory.compress(5, index="IVF2,SQ8", **settings)
    memory.add(encoder, random_documents(6, 40)[5:])
    memory.remove("d1")
    return memory


def answers(path):
    """Everything that a reader is told."""
    memory = Datastore(path)
    found = memory.search(QUERIES, 7)
    sources = [str(memory.provenance(int(entry))) for entry in found.entries[found.present]]
    return (
        [array.tolist() for array in found],
        sources,
        list(memory.documents()),
        memory.statistics().numpy().tobytes(),
        len(memory),
    )


def injure(data, dice):
    """Return a file's bytes with some damage; None removes it."""
    kind = dice.choice(["bit", "bit", "byte", "cut", "longer", "zeros", "shuffled", "removed", "empty"])
    place = dice.randrange(len(data))
    stop = min(len(data), place + dice.choice([1, 8, 64, 512]))
    piece = bytearray(data[place:stop])
    dice.shuffle(piece)
    return {
        "bit": data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :],
        "byte": data[:place] + bytes([dice.randrange(256)]) + data[place + 1 :],
        "cut": data[:place],
        "longer": data + data[place:stop],
        "zeros": data[:place] + bytes(stop - place) + data[stop:],
        "shuffled": data[:place] + bytes(piece) + data[stop:],
        "removed": None,
        "empty": b"",
    }[kind]


def test_no_injury_changes_an_answer_silently(memory):
    dice, expected = random.Random(0), answers(memory.path)
    files = sorted(file for file in memory.path.rglob("*") if file.is_file())
    noticed = 0
    for _ in range(500 if MANY else 80):
        file = dice.choice(files)
        data = file.read_bytes()
        injured = injure(data, dice)
        if injured is None:
            file.unlink()
        else:
            file.write_bytes(injured)
        try:
            assert answers(memory.path) == expected, file
        except MemlmError:
            noticed += 1
        if injured != data:
            assert verify(memory.path) != [], file
        file.write_bytes(data)
    assert noticed > 40
    assert answers(memory.path) == expected
    assert verify(memory.path) == []


def test_an_injury_is_not_noticed_where_checksums_are_not_compared(memory):
    """The test above can fail: without checksums, a flipped bit of a key changes distances silently."""
    file = memory.path / "segments" / memory.manifest.segments[0].name / "keys.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 0x40]))
    assert Datastore(memory.path, verify=False)
    assert any("checksum" in line for line in verify(memory.path))
    file.write_bytes(data)


ODD = [None, True, False, -1, 0, 1, 2**31, 2**63, 10**40, 1.5, -0.0, "", "..", "/etc/passwd", "x" * 5000, [], {}, [[]]]
ODD += [[[0, 10**12]], {"a": {}}, "000000", "keys.safetensors", "\ud800", "0" * 64, [[1, 0]], 1e308]


def places(value, path=()):
    """Yield the path of everything in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from places(inner, (*path, name))


def mutate(content, dice):
    """Change one to three things of a manifest."""
    content = copy.deepcopy(content)
    for _ in range(dice.choice([1, 1, 2, 3])):
        *outer, last = dice.choice([path for path in places(content) if path])
        place = content
        for name in outer:
            place = place[name]
        kind = dice.choice(["odd", "odd", "odd", "number", "gone", "twice", "named"])
        if kind == "number" and isinstance(place[last], int):
            place[last] += dice.choice([-1, 1, 1 << 20, 1 << 40])
        elif kind == "gone":
            del place[last]
        elif kind == "twice" and isinstance(place, list):
            place.append(copy.deepcopy(place[last]))
        elif kind == "named" and isinstance(place, dict):
            place[dice.choice(["odd", "../x", "index.faiss", ""])] = place.pop(last)
        else:
            place[last] = copy.deepcopy(dice.choice(ODD))
        if not content:
            break
    return content


def test_a_forged_manifest_is_an_error_or_a_datastore(memory):
    """Checksums fit, so only what is checked of the content helps; memory is limited while it is opened."""
    dice = random.Random(1)
    file, pointer = current(memory.path), memory.path / "current.json"
    original, kept = file.read_bytes(), pointer.read_bytes()
    refused = 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 29), before[1]))
    try:
        for _ in range(5_000 if MANY else 150):
            content = mutate(json.loads(original), dice)
            try:
                forge(memory.path, content)
            except UnicodeEncodeError:
                continue
            started = time.perf_counter()
            try:
                answers(memory.path)
            except MemlmError:
                refused += 1
            assert time.perf_counter() - started < 20  # no hang
            file.write_bytes(original)
            pointer.write_bytes(kept)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        file.write_bytes(original)
        pointer.write_bytes(kept)
    assert refused > 75
    assert verify(memory.path) == []

"""Kill a datastore's writer at random moments, again and again, and look at what is left.

    python tests/faults.py OPERATION KILLS SEED FOLDER

A warm process forks a child for every kill, so that nothing is imported again. Half of the children are killed before a
random one of their calls that change the disk, the others after a random time; one that ends before its time is looked
at, too, and not counted. Each child tells its parent of every version that it has published, over a pipe. Afterwards
the folder must be sound, hold what the last version that was told (or the one after it, which was published and not
told) holds, and running the operation again must end with the very content of a run that nobody disturbed. Prints what
was seen as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import faiss
import torch

from fake_encoder import FakeEncoder, random_documents
from memlm import Datastore, Document
from memlm.datastore import Manifest, verify
from memlm.datastore._manifest import content_sha256, manifest_name
from memlm.datastore._writing import sweep
from memlm.errors import ConfigError, DatastoreError
from memlm.files import write_json

QUIET = {"show_progress": False, "segment_entries": 90}
DOCUMENTS = random_documents(8, 40)
MORE = [
    *(Document(f"new{item.id}", item.text) for item in random_documents(4, 40, seed=7)),
    Document("d1", "xin the place of another"),
    Document("d6", "xalso new"),
]


def build(path):
    Datastore.build(FakeEncoder(), DOCUMENTS, path, index="IVF2,Flat", **QUIET)


def add(path):
    Datastore(path).add(FakeEncoder(), MORE, replace=True, **QUIET)


def remove(path):
    Datastore(path).remove(["d1", "d3", "d7"])


def compact(path):
    Datastore(path).compact(**QUIET)


def compress(path):
    Datastore(path).compress(4, **QUIET)


def prune(path):
    if Datastore(path).counts is None:  # of what is left, more could be merged
        Datastore(path).prune(60, **QUIET)


def merge(path):
    Datastore(path).merge(path.parent / "other", replace=True, **QUIET)


# Negative controls, which must be caught


def name_early(self, path):
    """Name a version before it is written."""
    digest = content_sha256(self._content())
    write_json(path / "current.json", {"version": self.version, "sha256": digest})
    write_json(path / manifest_name(self.version), {**self._content(), "sha256": digest})


def sweep_early(self, path):
    """Remove what a version replaces before it is published."""
    sweep(path, self)
    PUBLISH(self, path)


CARELESS = {"name_early": ("build", name_early), "sweep_early": ("compact", sweep_early)}
PUBLISH = Manifest.publish
OPERATIONS = {function.__name__: function for function in (build, add, remove, compact, compress, prune, merge)}
CALLS = [
    (os, "fsync"),
    (os, "mkdir"),
    (os, "unlink"),
    (os, "rename"),
    (os, "replace"),
    (os, "rmdir"),
    (os, "posix_fallocate"),
]


def content(path):
    """Everything that a reader can learn: documents, values and keys."""
    memory = Datastore(path)
    rows = {}
    for item in memory.documents():
        first, stop = item["entries"]
        keys = memory.keys.gather_keys(torch.arange(first, stop).numpy()).numpy().tobytes()
        rows[item["id"]] = (item["text"], str(item["metadata"]), memory.values[first:stop].tobytes(), keys)
    return rows


def states(operation, path):
    """Run the operation undisturbed; return what was held before and after every version, and its number of calls."""
    held = [content(path) if (path / "current.json").exists() else {}]
    publish, calls = Manifest.publish, Counter()

    def recorded(self, where):
        publish(self, where)
        held.append(content(where))

    counted = counting(calls, None)
    Manifest.publish = recorded
    operation(path)
    Manifest.publish = publish
    restore(counted)
    return held, calls["all"]


def seconds(operation, path):
    """Return how long the operation takes, undisturbed."""
    started = time.perf_counter()
    operation(path)
    return time.perf_counter() - started


def counting(calls, fatal):
    """Count the calls that change the disk; die before number `fatal`."""
    before = [(module, name, getattr(module, name)) for module, name in CALLS]

    def wrap(function):
        def call(*arguments, **settings):
            calls["all"] += 1
            if calls["all"] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        return call

    for module, name, function in before:
        setattr(module, name, wrap(function))
    return before


def restore(before):
    for module, name, function in before:
        setattr(module, name, function)


def killed(operation, path, calls, took, dice):
    """Run the operation in a child and kill it; return how many versions it told of, and whether it was killed."""
    told, tell = os.pipe()
    fatal, delay = (dice.randint(1, calls), None) if dice.random() < 0.5 else (None, dice.uniform(0, took))
    child = os.fork()
    if child == 0:
        try:
            os.close(told)
            publish = Manifest.publish

            def telling(self, where):
                publish(self, where)
                os.write(tell, b".")

            Manifest.publish = telling
            counting(Counter(), fatal)
            operation(path)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(tell)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the child ended with {status}"
    with os.fdopen(told, "rb") as pipe:
        return len(pipe.read()), status != 0


def main(name, kills, seed, folder):
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    if name in CARELESS:
        name, Manifest.publish = CARELESS[name]
    dice, operation, folder = random.Random(f"{name} {seed}"), OPERATIONS[name], Path(folder)
    base = folder / "base"
    base.mkdir(parents=True)
    if name != "build":
        build(base / "memory")
        Datastore(base / "memory").remove(["d0"])
        Datastore.build(FakeEncoder(), MORE, base / "other", **QUIET)
    for name in ("whole", "timed"):
        shutil.copytree(base, folder / name)
    held, calls = states(operation, folder / "whole" / "memory")
    took = seconds(operation, folder / "timed" / "memory")  # the second run: the first one loads and compiles
    seen = Counter(killed=0)
    while seen["killed"] < kills:
        shutil.copytree(base, folder / "try")
        path = folder / "try" / "memory"
        versions, was_killed = killed(operation, path, calls, took, dice)
        seen["killed" if was_killed else "ended before"] += 1
        if (path / "current.json").exists():
            problems = verify(path)
            assert not problems, problems
            found = content(path)
        else:
            found = {}
        allowed = held[versions : versions + 2]
        assert found in allowed, (versions, sorted(found), [sorted(state) for state in allowed])
        seen[f"after {versions} versions"] += 1
        try:
            operation(path)
        except (ConfigError, DatastoreError):  # what is done cannot be done again
            if found != held[-1]:
                raise
        assert content(path) == held[-1]
        assert verify(path) == []
        assert not [item for item in path.rglob("*") if item.name.endswith(".tmp")]
        shutil.rmtree(folder / "try")
    print(json.dumps({"calls": calls, "versions": len(held) - 1, **seen}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

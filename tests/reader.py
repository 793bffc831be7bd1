"""A reader in a process of its own: opens and refreshes a datastore again and again while others write.

    python tests/reader.py DATASTORE STOP

Prints "ready" after the first reading. Ends when there is a file STOP, and prints what it saw as JSON: a fingerprint of
everything that a version held, by its number, the number of readings, and what failed.
"""

import hashlib
import json
import sys
import traceback
from pathlib import Path

import faiss
import numpy as np
import torch

from memlm import Datastore


def fingerprint(memory):
    """Return a digest of all documents, values and keys, and of what searches find."""
    rows = []
    for item in memory.documents():
        first, stop = item["entries"]
        keys = memory.keys.gather_keys(np.arange(first, stop)).view(torch.int16).numpy()
        rows.append((item["id"], item["text"], memory.values[first:stop].tolist(), keys.tolist()))
    queries = np.random.default_rng(0).normal(size=(4, memory.width)).astype(np.float32)
    found = memory.search(queries, 3)
    names = [memory.provenance(int(entry)).document for entry in found.entries.ravel()]
    return hashlib.sha256(repr((sorted(rows), sorted(names))).encode()).hexdigest()


def main(path, stop):
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    seen, readings, failures = {}, 0, []
    kept = Datastore(path)
    last = False
    while not failures and not last:
        last = stop.exists()  # so that what was written last is read, too
        try:
            kept.refresh()
            for memory in (kept, Datastore(path), Datastore(path, verify=False)):
                version, found = memory.manifest.version, fingerprint(memory)
                if seen.setdefault(version, found) != found:
                    failures.append(f"version {version} is not always the same")
        except Exception:
            failures.append(traceback.format_exc())
        if not readings:
            print("ready", flush=True)
        readings += 1
    print(json.dumps({"seen": seen, "readings": readings, "failures": failures}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""Whether a learned rotation (OPQ; Ge et al. 2013) beats principal components where every number is rounded by itself.

    python -m benchmarks.opq WORK_FOLDER [--corpora law,code]

WORK_FOLDER holds the datastores that benchmarks/pruning.py keeps there. Keys are projected on 128 numbers in either way and
rounded to int8, and the 64 nearest of 300 stored keys are searched for exactly. Results go to benchmarks/results/opq.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import memlm
from benchmarks.compression import RESULTS
from memlm.datastore._fit_codec import fit_codec

import faiss  # isort: skip

WIDTH, SAMPLE, QUERIES, K = 128, 16_384, 300, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--corpora", default="law,code")
    options = parser.parse_args()
    lines = [
        "# Principal components or a learned rotation",
        "",
        f"Share of the {K} nearest of {QUERIES} stored keys that are found among keys of {WIDTH} × int8, and seconds that the fit to",
        f"{SAMPLE:,} keys took. OPQ: FAISS's OPQMatrix for {WIDTH // 4} parts of 4 numbers, 10 rounds. Both round alike.",
        "",
        "    python -m benchmarks.opq WORK",
        "",
        "| corpus | PCA | seconds | OPQ | seconds |",
        "|---|---|---|---|---|",
    ]
    for corpus in options.corpora.split(","):
        lines.append(measure(corpus, memlm.Datastore(options.work / corpus, verify=False)))
        (RESULTS / "opq.md").write_text("\n".join(lines) + "\n")


def measure(corpus: str, memory: memlm.Datastore) -> str:
    """Return a row of the table."""
    keys, dice = memory.keys.gather_keys(np.arange(len(memory))), np.random.default_rng(0)
    asking = torch.from_numpy(dice.choice(len(keys), QUERIES, replace=False))
    sample = keys[torch.from_numpy(dice.choice(len(keys), SAMPLE, replace=False))]
    started = time.perf_counter()
    components = fit_codec(sample, WIDTH, "int8", "squared_l2")
    fitted = time.perf_counter()
    rotation = faiss.OPQMatrix(keys.shape[1], WIDTH // 4, WIDTH)
    rotation.niter, rotation.max_train_points = 10, SAMPLE
    rotation.train((sample - components.mean).numpy())
    projection = torch.from_numpy(faiss.vector_to_array(rotation.A).reshape(WIDTH, -1).T.copy())
    learned = time.perf_counter()
    projected = (sample - components.mean) @ projection
    low, step = projected.amin(dim=0), (projected.amax(dim=0) - projected.amin(dim=0)) / 255
    rotated = replace(components, projection=projection, offset=low + 128 * step, step=step)
    true = nearest(keys[asking], keys)
    shares = []
    for codec in (components, rotated):
        found = nearest(codec.project(keys[asking]), codec.decode(codec.encode(keys)))
        shares.append(np.mean([len(np.intersect1d(one, other)) for one, other in zip(true, found, strict=True)]) / K)
    return f"| {corpus} | {shares[0]:.3f} | {fitted - started:.1f} | {shares[1]:.3f} | {learned - fitted:.0f} |"


def nearest(queries: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """Return the numbers of the nearest keys by exact search, shape (queries, K)."""
    return faiss.knn(queries.contiguous().numpy(), keys.contiguous().numpy(), K)[1]


if __name__ == "__main__":
    main()

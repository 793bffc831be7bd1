"""Draw λ against the nearest distance, as buckets and curves fitted to it: docs/drop-off.png.

    python -m benchmarks.plot_drop_off

Reads benchmarks/results/mixtures.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent.parent
NAMES = {
    "law": "law",
    "latex": "LaTeX",
    "code": "code",
    "isabelle": "Isabelle",
    "peps": "PEPs",
    "wikitext2": "WikiText-2",
}


def main() -> None:
    compared = json.loads((ROOT / "benchmarks/results/mixtures.json").read_text())["compare"]
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.2), sharey=True, layout="constrained")
    for (corpus, name), axis in zip(NAMES.items(), axes.flat, strict=True):
        fitted = compared[corpus]["mixtures"]
        edges, weights = fitted["buckets"]["edges"], fitted["buckets"]["bucket_weights"]
        last = edges[-1] + (edges[-1] - edges[-2])
        distances = np.linspace(0, last, 400)
        exponential, logistic, fixed = (fitted[kind] for kind in ("exponential", "logistic", "knn-lm"))
        axis.stairs(weights, [0, *edges, last], baseline=None, color="0.45", label="buckets")
        curve = exponential["scale"] * np.exp(-distances / exponential["length"])
        axis.plot(distances, curve.clip(0, 1), color="#c2410c", label="exponential")
        curve = logistic["scale"] / (1 + np.exp((distances - logistic["center"]) / logistic["length"]))
        axis.plot(distances, curve, "--", color="#1d4ed8", label="logistic")
        axis.axhline(fixed["interpolation_weight"], color="0.7", linewidth=0.8, label="one λ")
        axis.set(title=name, ylim=(0, 1.02), xlim=(0, last))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("squared distance of the nearest neighbor")
    for axis in axes[:, 0]:
        axis.set_ylabel("λ")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(ROOT / "docs/drop-off.png", dpi=110)


if __name__ == "__main__":
    main()

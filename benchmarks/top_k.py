"""Top-k attention and feed-forward layers in the reference model: perplexity without training, memory, and time.

    python -m benchmarks.top_k DATA_FOLDER

Perplexity: 40 windows of 512 tokens for each text, seeded pieces of its documents; the last 128 targets of each are scored, so
that every target sees 385 to 512 tokens. The model is used as it is; nothing is trained or chosen, so `test` is as honest
as `valid`. The model was trained on the train splits of `wikitext2` and `novels`, and has seen nothing like `code`. Intervals
are paired bootstraps over windows.

Memory: bytes kept for the gradient, counted by torch's hooks on saved tensors, each memory once, parameters aside.
Time: forward and backward, medians of runs in turn, as ratios. Results go to benchmarks/results/top_k.json and top_k.md,
and the curves to docs/top-k.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

import memlm
from benchmarks.knn_lm import pieces
from memlm.evaluation._bootstrap import paired_bootstrap
from memlm.layers import top_k_attention, top_k_feed_forward

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
STYLES = {"wikitext2.valid": "C0-", "wikitext2.test": "C0--", "novels.test": "C2--", "code.test": "C1--"}  # by text
WINDOWS, LENGTH, SCORED = 40, 512, 128
KEYS = (8, 16, 32, 64, 128, 256, 512)
UNITS = (40, 80, 160, 320, 640)  # of 640
KINDS = {
    "keys": "keys of 512",
    "units by score": "hidden units of 640, by score",
    "units by size": "hidden units of 640, by size",
}
LENGTHS = (256, 512, 1024, 2048, 4096)
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    lm = memlm.reference_lm()
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    results["perplexity"] = {text: curves(lm, options.data / f"{text}.jsonl.xz") for text in STYLES}
    results["attention"] = {str(length): attention(length) for length in LENGTHS}
    results["model"] = {str(length): whole_model(lm.model, length) for length in LENGTHS[:4]}
    RESULTS.joinpath("top_k.json").write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.joinpath("top_k.md").write_text(table(results))
    draw(results["perplexity"])


def curves(lm: Any, path: Path) -> dict[str, Any]:
    """Score a text with every k, in attention and in feed-forward layers."""
    sequences = (lm.tokenize(piece).ids for piece in pieces(path))
    ids = torch.from_numpy(np.stack([ids[: LENGTH + 1] for ids in sequences if len(ids) > LENGTH][:WINDOWS]))
    alone = score(lm.model, ids)
    result: dict[str, Any] = {"windows": len(ids), "targets": alone.size, "perplexity": float(np.exp(-alone.mean()))}
    windows = np.repeat(np.arange(len(ids)), SCORED)

    def row(change: AbstractContextManager[Any]) -> dict[str, float]:
        with change:
            changed = score(lm.model, ids)
        interval = paired_bootstrap((alone - changed).ravel(), windows)
        loss, low, high = (float(np.expm1(value)) for value in interval[:3])
        return {"perplexity": float(np.exp(-changed.mean())), "loss": loss, "low": low, "high": high}

    result["keys"] = {str(k): row(top_k_attention(lm.model, k)) for k in KEYS}
    for by in ("score", "size"):
        result[f"units by {by}"] = {str(k): row(top_k_feed_forward(lm.model, k=k, by=by)) for k in UNITS}
    result["128 keys and 160 units by size"] = row(both(lm.model))
    print(path.name, {k: round(100 * loss["loss"], 2) for k, loss in result["keys"].items()}, flush=True)
    return result


@contextmanager
def both(model: Any) -> Iterator[None]:
    with top_k_attention(model, 128), top_k_feed_forward(model, k=160, by="size"):
        yield


@torch.no_grad()
def score(model: Any, ids: Tensor) -> np.ndarray:
    """Return log p of the last targets of each window, float64, shape (windows, SCORED)."""
    scored = []
    for batch in ids.split(4):
        logits = model(batch[:, :-1], use_cache=False, logits_to_keep=SCORED).logits
        scored.append(logits.log_softmax(dim=-1).gather(-1, batch[:, -SCORED:, None])[..., 0])
    return torch.cat(scored).double().numpy()


def attention(length: int) -> dict[str, Any]:
    """Measure attention alone, causal, four heads of width 64."""
    from memlm.ops import top_k_attention as top_k

    torch.manual_seed(0)
    tensors = [torch.randn(1, 4, length, 64, requires_grad=True) for _ in range(3)]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

    def eager() -> Tensor:
        queries, keys, values = tensors
        return ((queries @ keys.mT / 8).masked_fill(hidden, -torch.inf)).softmax(dim=-1) @ values

    return measured(
        {
            "eager": eager,
            "sdpa": lambda: nn.functional.scaled_dot_product_attention(*tensors, is_causal=True),
            "top 128": lambda: top_k(*tensors, 128, causal=True),
            "top 32": lambda: top_k(*tensors, 32, causal=True),
        }
    )


def whole_model(model: Any, length: int) -> dict[str, Any]:
    """Measure the reference model's loss on one text; positions beyond 512 mean nothing to it, and cost the same."""
    ids = torch.randint(0, 8000, (1, length), generator=torch.Generator().manual_seed(0))

    def loss(change: Callable[[], AbstractContextManager[Any]]) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            with change():
                return model(ids, labels=ids, use_cache=False).loss

        return compute

    def eager() -> AbstractContextManager[Any]:
        return by_name(model, "eager")

    changes = {
        "eager": eager,
        "sdpa": nullcontext,
        "128 keys": lambda: top_k_attention(model, 128),
        "160 units": lambda: top_k_feed_forward(model, k=160, by="size"),
        "128 keys and 160 units": lambda: both(model),
    }
    return measured({name: loss(change) for name, change in changes.items()}, *model.parameters())


@contextmanager
def by_name(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    yield
    model.set_attn_implementation(before)


def measured(computations: dict[str, Callable[[], Tensor]], *parameters: Tensor) -> dict[str, Any]:
    """Return bytes kept and seconds of a forward and a backward pass of each, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in computations}
    for _ in range(REPEATS):
        for name, compute in computations.items():
            start = time.perf_counter()
            compute().sum().backward()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"bytes": kept_bytes(compute, *parameters), "seconds": statistics.median(seconds[name])}
        for name, compute in computations.items()
    }


def kept_bytes(compute: Callable[[], Any], *parameters: Tensor) -> int:
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in known)


def table(results: dict[str, Any]) -> str:
    """Return the Markdown page."""
    texts = results["perplexity"]
    first = next(iter(texts.values()))
    lines = [
        "# Top-k attention and feed-forward layers in the reference model",
        "",
        "    python -m benchmarks.top_k DATA",
        "",
        f"{first['windows']} windows of {LENGTH} tokens a text, the last {SCORED} targets of each; the model was not trained for it. "
        "Perplexity per token, and what is lost against the model as it is, with paired bootstrap 95 % intervals over windows.",
        "",
        "| | " + " | ".join(texts) + " |",
        "|---|" + "---|" * len(texts),
        "| as it is | " + " | ".join(f"{text['perplexity']:.3f}" for text in texts.values()) + " |",
    ]
    for kind, name in KINDS.items():
        for k in first[kind]:
            lines.append(f"| {k} {name} | " + " | ".join(lost(text[kind][k]) for text in texts.values()) + " |")
    name = "128 keys and 160 units by size"
    lines.append(f"| {name} | " + " | ".join(lost(text[name]) for text in texts.values()) + " |")
    parts = {
        "attention": "Attention alone: causal, one text, four heads of width 64",
        "model": "The whole model and its loss, one text",
    }
    for part, title in parts.items():
        rows = results[part]
        methods = list(next(iter(rows.values())))
        heading = "| tokens | " + " | ".join(methods) + " |"
        lines += ["", f"## {title}", "", "MiB kept for the gradient, and in brackets the ratio to half the length:", ""]
        lines += [heading, "|---|" + "---|" * len(methods)]
        for length, row in rows.items():
            half = rows.get(str(int(length) // 2))
            cells = [
                f"{row[name]['bytes'] / 2**20:.2f}"
                + (f" ({row[name]['bytes'] / half[name]['bytes']:.2f}×)" if half else "")
                for name in methods
            ]
            lines.append(f"| {length} | " + " | ".join(cells) + " |")
        lines += [
            "",
            f"Time of a forward and a backward pass, as a ratio to sdpa's; medians of {REPEATS} in turn, on {results['threads']} threads:",
            "",
            heading,
            "|---|" + "---|" * len(methods),
        ]
        for length, row in rows.items():
            cells = [f"{row[name]['seconds'] / row['sdpa']['seconds']:.2f}×" for name in methods]
            lines.append(f"| {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def lost(row: dict[str, float]) -> str:
    loss, low, high = (f"{100 * row[name]:+z.2f}" for name in ("loss", "low", "high"))
    return f"{row['perplexity']:.3f} ({loss} %; {low} to {high})"


def draw(texts: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), sharey=True, layout="constrained")
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for name, text in texts.items():
            ks = [int(k) for k in text[kind]]
            losses = [100 * row["loss"] for row in text[kind].values()]
            axis.plot(ks, losses, STYLES[name], marker="o", markersize=3, label=name.replace(".", ", "))
        axis.axhline(1, color="0.7", linewidth=0.8)
        axis.set(xscale="log", xlabel=title)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks((-10, -1, 0, 1, 10), ("−10", "−1", "0", "1", "10"))
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("perplexity lost, %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs/top-k.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()

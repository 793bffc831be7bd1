"""A straightforward kNN-LM: the baseline of the speed comparisons, not something to use.

This is the method of Khandelwal et al. 2020 (https://arxiv.org/abs/1911.00172) written from the paper, the way the
well-known research programs do it: an fp32 model, one window at a time, the logits of every position, fp16 keys in a
raw memory map, a product-quantized FAISS index whose approximate distances are used as they come, and one dense
(tokens x vocabulary) matrix per window. It shares no code with memlm.

Two details differ from those programs. Absent neighbors (id -1) are masked, and a row without any keeps the model's
distribution. The key-value cache, which nothing here would read, is off; that can only make the baseline faster.
Keys beyond the range of fp16 become infinite without a word, as they do there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# isort: split
import faiss  # after torch

SUBQUANTIZERS = 64
BITS = 8
KEYS_PER_LIST = 64
TRAINING_KEYS = 1_000_000
ADD_CHUNK = 500_000
NPROBE = 32


class Window(NamedTuple):
    """`tokens` is the input and one token more, (T + 1,) int64; the targets `tokens[first + 1:]` are scored."""

    tokens: Tensor
    first: int

    @property
    def targets(self) -> Tensor:
        """The scored tokens, (T - first,)."""
        return self.tokens[self.first + 1 :]


@dataclass(frozen=True)
class Datastore:
    """The baseline's index and the token id of every entry."""

    index: faiss.Index
    values: np.memmap


@dataclass(frozen=True)
class Scores:
    """Natural-log target probabilities of all windows, in order, and the seconds that each part took."""

    log_probs: Tensor
    tokens: int
    seconds: float
    model_seconds: float
    search_seconds: float
    mixture_seconds: float


def last_feed_forward(model: PreTrainedModel) -> nn.Module:
    """The baseline's key site: the module whose input is the key, in the last layer of the decoder."""
    stacks = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    layer = max(stacks, key=len)[-1]
    for name in ("mlp", "ffn", "fc1"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise ValueError(f"no feed-forward module (mlp, ffn, fc1) in {type(layer).__name__}")


def build(
    model: PreTrainedModel, site_module: nn.Module, windows: Sequence[Window], directory: str | Path, *, seed: int = 0
) -> dict[str, float]:
    """Build the baseline's datastore in `directory`: keys and values first, then the index over them.

    Returns:
        `tokens`, `extraction_seconds` and `index_seconds`, the sum of `train_seconds`, `add_seconds`, `write_seconds`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    keys, extraction_seconds = _extract(model, site_module, windows, directory)
    timing = _build_index(keys, directory, seed)
    return {"tokens": len(keys), "extraction_seconds": extraction_seconds, **timing}


def load(directory: str | Path) -> Datastore:
    """Open what `build` wrote: the index in memory, the values mapped."""
    index = faiss.read_index(str(Path(directory) / "index.faiss"))
    return Datastore(index, np.memmap(Path(directory) / "values.bin", dtype=np.int32, mode="r"))


def score(
    model: PreTrainedModel,
    site_module: nn.Module,
    windows: Sequence[Window],
    datastore: Datastore,
    *,
    k: int = 1024,
    interpolation_weight: float = 0.25,
    temperature: float = 1.0,
) -> Scores:
    """The baseline's log p of every target, p = λ p_kNN + (1 - λ) p_LM with 0 < λ < 1, over the whole vocabulary."""
    parts, log_probs = np.zeros(3), []
    with torch.inference_mode(), _captured_input(site_module) as captured:
        for window in windows:
            marks = [_now(model)]
            logits = _forward(model, window)
            marks.append(_now(model))
            neighbors = _search(datastore, captured[0][window.first :], k)
            marks.append(_now(model))
            mixed = _mix(logits[window.first :], *neighbors, interpolation_weight, temperature)
            log_probs.append(mixed.gather(-1, window.targets.to(mixed.device)[:, None])[:, 0].cpu())
            marks.append(_now(model))
            parts += np.diff(marks)
    result = torch.cat(log_probs)
    return Scores(result, len(result), float(parts.sum()), *parts.tolist())


def _mix(
    logits: Tensor, distances: Tensor, values: Tensor, present: Tensor, weight: float, temperature: float
) -> Tensor:
    """Log-probabilities of the mixture, (tokens, vocabulary), by a dense scatter."""
    scaled = (-distances / temperature).masked_fill(~present, -torch.inf)
    neighbor_probs = scaled.softmax(-1).masked_fill(~present, 0.0)  # a row without neighbors: zeros, not NaN
    memory = torch.zeros_like(logits).scatter_add(-1, values, neighbor_probs).log()
    model = logits.log_softmax(-1)
    mixed = torch.logaddexp(memory + math.log(weight), model + math.log1p(-weight))
    return torch.where(present.any(-1, keepdim=True), mixed, model)


def _search(datastore: Datastore, queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances as FAISS returns them, values, and which neighbors there are, all (tokens, k)."""
    distances, ids = datastore.index.search(queries.float().cpu().contiguous().numpy(), k)
    values = datastore.values[ids].astype(np.int64)  # id -1 reads the last value here; the mask hides it
    distances, values, present = (torch.from_numpy(a).to(queries.device) for a in (distances, values, ids >= 0))
    return distances, values, present


def _extract(
    model: PreTrainedModel, site_module: nn.Module, windows: Sequence[Window], directory: Path
) -> tuple[np.memmap, float]:
    """Write the key and the value of every scored position; return the keys and the seconds."""
    total = sum(len(window.targets) for window in windows)
    width = model.config.get_text_config().hidden_size
    keys = np.memmap(directory / "keys.bin", dtype=np.float16, mode="w+", shape=(total, width))
    values = np.memmap(directory / "values.bin", dtype=np.int32, mode="w+", shape=(total,))
    start, begin = 0, _now(model)
    with torch.inference_mode(), _captured_input(site_module) as captured:
        for window in windows:
            _forward(model, window)
            stop = start + len(window.targets)
            keys[start:stop] = captured[0][window.first :].to(torch.float16).cpu().numpy()
            values[start:stop] = window.targets.cpu().numpy()
            start = stop
    return keys, _now(model) - begin


def _build_index(keys: np.memmap, directory: Path, seed: int) -> dict[str, float]:
    """Train IVF-PQ on a random sample, add every key in order (so that an id is a position), write the index."""
    total, width = keys.shape
    marks = [perf_counter()]
    sample = np.random.default_rng(seed).choice(total, min(TRAINING_KEYS, total), replace=False)
    quantizer = faiss.IndexFlatL2(width)
    index = faiss.IndexIVFPQ(quantizer, width, max(1, total // KEYS_PER_LIST), SUBQUANTIZERS, BITS)
    index.nprobe = NPROBE  # kept in the file
    index.train(keys[sample].astype(np.float32))
    marks.append(perf_counter())
    for start in range(0, total, ADD_CHUNK):
        index.add(keys[start : start + ADD_CHUNK].astype(np.float32))
    marks.append(perf_counter())
    faiss.write_index(index, str(directory / "index.faiss"))
    marks.append(perf_counter())
    train, add, write = np.diff(marks).tolist()
    return {"index_seconds": train + add + write, "train_seconds": train, "add_seconds": add, "write_seconds": write}


@contextmanager
def _captured_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list whose only element is the module's latest input, (tokens, width)."""
    captured: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        captured[:] = [inputs[0].detach().reshape(-1, inputs[0].shape[-1])]

    handle = module.register_forward_pre_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()


def _forward(model: PreTrainedModel, window: Window) -> Tensor:
    """The logits of every input position, (T, vocabulary)."""
    return model(input_ids=window.tokens[None, :-1].to(model.device), use_cache=False).logits[0]


def _now(model: PreTrainedModel) -> float:
    """Seconds, once the model's device has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return perf_counter()

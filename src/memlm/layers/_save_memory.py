"""Attention memory on disk: what was learned for it, and what it remembers, in one file that is written in one step."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import FormatVersionError, MemlmError, ModelError
from ..files import write_atomically
from ._memorize import AttentionMemories, memorize, memory_of

FILE = "attention_memory.safetensors"
_VERSION = 1


def save_attention_memory(model: Any, folder: str | Path) -> None:
    """Write the memory of a model beside it, the last pass included.

    `model.save_pretrained` writes the model itself, with whatever else was trained.

    Args:
        model: One that `memorize` gave a memory.
        folder: Where to put `attention_memory.safetensors`; it is made if it does not exist.

    Raises:
        ModelError: The model has no memory.
    """
    memories = memory_of(model)
    tensors = {f"remembered.{name}": tensor for name, tensor in memories.state_dict().items()}
    for number, memory in memories.memories.items():
        tensors |= {f"learned.{number}.{name}": tensor.detach() for name, tensor in memory.named_parameters()}
    described = {"version": _VERSION, "layers": list(memories.memories), "settings": asdict(memories.settings)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(folder / FILE, save(whole, {"memlm": json.dumps(described)}))


def load_attention_memory(model: Any, folder: str | Path) -> AttentionMemories:
    """Give a model the memory that `save_attention_memory` wrote: it goes on from there, bit for bit.

    Args:
        model: The model that was saved, without a memory.
        folder: Where `attention_memory.safetensors` is.

    Raises:
        FormatVersionError: A newer memlm wrote the file.
        ModelError: There is no such file, it is damaged, or it belongs to another model; or the model has a memory.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ModelError(f"{path} does not exist; save_attention_memory(model, folder) writes it")
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})["memlm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version, layers, settings = (described[name] for name in ("version", "layers", "settings"))
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise ValueError(f"its layers are {layers!r}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged or no attention memory: {error}") from error
    if version != _VERSION:
        raise FormatVersionError(f"{path} has version {version!r}; this memlm reads {_VERSION}")
    memories = memorize(model, layers, **_known(path, settings))
    try:
        _fill(memories, tensors)
    except (RuntimeError, MemlmError, KeyError) as error:
        memories.remove()
        raise ModelError(f"{path} does not fit this model: {error}") from error
    return memories


def _known(path: Path, settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise ModelError(f"{path} is damaged: its settings are {settings!r}")
    return settings


def _fill(memories: AttentionMemories, tensors: dict[str, Tensor]) -> None:
    """Put learned and remembered tensors where they belong."""
    for number, memory in memories.memories.items():
        start = f"learned.{number}."
        memory.load_state_dict({name.removeprefix(start): tensor for name, tensor in tensors.items() if start in name})
    device = torch.device(memories.model.device)
    start = "remembered."
    memories.load_state_dict(
        {name.removeprefix(start): tensor.to(device) for name, tensor in tensors.items() if name.startswith(start)}
    )

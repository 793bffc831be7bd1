"""Memories of product keys on disk, beside the model that they belong to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import ConfigError, ModelError
from ..files import write_atomically, write_json
from ._add_product_keys import add_product_keys, changed_layers, remove_product_keys
from ._product_keys import ProductKeySettings

_JSON, _TENSORS = "product_keys.json", "product_keys.safetensors"
_FORMAT = 1


def save_product_keys(model: Any, folder: str | Path) -> None:
    """Write the memories of a model into a folder, as `product_keys.json` and `product_keys.safetensors`.

    `model.save_pretrained(folder)` writes everything else, under the usual names.

    Raises:
        ModelError: The model has no memory of product keys.
    """
    folder, tensors, layers = Path(folder), {}, {}
    for layer, wrapper in changed_layers(model):
        memory = wrapper.product_keys
        tensors |= {f"{layer.index}.{name}": item.contiguous() for name, item in memory.state_dict().items()}
        layers[str(layer.index)] = {"placement": wrapper.placement, "settings": asdict(memory.settings)}
    if not layers:
        raise ModelError(f"{type(model).__name__} has no memory of product keys; nothing to save")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _TENSORS, save(tensors))
    write_json(folder / _JSON, {"format": _FORMAT, "layers": layers})


def load_product_keys(model: Any, folder: str | Path) -> None:
    """Add the memories in a folder to a model that has none, in place.

    Raises:
        ConfigError: A file is missing or damaged, or does not fit the model.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        tensors = load((folder / _TENSORS).read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is not there; expected what save_product_keys wrote") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} holds damaged product keys ({error}); save them again") from None
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise ConfigError(f"{folder / _JSON} is not of format {_FORMAT}; it was written by another version of memlm")
    if any(True for _ in changed_layers(model)):
        raise ConfigError("the model has product keys already; take them out first")
    try:
        _add(model, described["layers"], tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if any(True for _ in changed_layers(model)):
            remove_product_keys(model)
        problem = str(error).splitlines()[-1].strip()
        raise ConfigError(f"the product keys in {folder} do not fit the model: {problem}") from None


def _add(model: Any, layers: dict[str, Any], tensors: dict[str, Any]) -> None:
    for number, described in layers.items():
        settings = ProductKeySettings(**described["settings"])
        memory = add_product_keys(model, [int(number)], settings, placement=described["placement"])[int(number)]
        prefix = f"{number}."
        state = {name.removeprefix(prefix): item for name, item in tensors.items() if name.startswith(prefix)}
        memory.load_state_dict(state)

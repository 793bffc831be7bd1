"""A reader in a folder: its weights as safetensors, its layer and shape as JSON. The model is saved by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..errors import ConfigError, DatastoreCorrupt, DatastoreMismatch, FormatVersionError
from ..files import write_atomically, write_json
from ..models import decoder_layers
from ._around import modules_around
from ._beside import Beside, add_row_reader, remove_beside
from ._facts import reader_of
from ._reader import RowReader

VERSION = 1
_SHAPE = ("key_width", "value_width", "top_k", "window")


def save_row_reader(model: Any, folder: str | Path) -> None:
    """Save the reader of a model, without the model and without rows.

    Args:
        model: A causal LM with one reader, from `add_row_reader`.
        folder: It is made if need be; a reader in it is replaced.
    """
    folder, reader = Path(folder), reader_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    layer = next(
        layer.index
        for layer in decoder_layers(model)
        for _, module in modules_around(layer)
        if isinstance(module, Beside) and module.added is reader
    )
    described = {"format": "memlm-row-reader", "version": VERSION, "layer": layer}
    described |= {"model_type": model.config.model_type}
    shape = reader.key.out_features, reader.value.out_features, reader.top_k, reader.window
    described |= dict(zip(_SHAPE, shape, strict=True))
    tensors = {name: item.detach().cpu().contiguous() for name, item in reader.state_dict().items()}
    write_atomically(folder / "reader.safetensors", save(tensors))
    write_json(folder / "reader.json", described)


def load_row_reader(model: Any, folder: str | Path) -> RowReader:
    """Put a saved reader into the model that it was trained in; it reads nothing before it has rows (`read_from`).

    Raises:
        ConfigError: There is no reader in the folder.
        DatastoreCorrupt: Its files are damaged.
        DatastoreMismatch: It belongs to another kind of model.
        FormatVersionError: A newer memlm made it.
    """
    folder = Path(folder)
    path = folder / "reader.json"
    if not path.exists():
        raise ConfigError(f"{folder} holds no reader.json; expected a folder made by save_row_reader")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        version, layer, kind = (described[name] for name in ("version", "layer", "model_type"))
        shape = {name: int(described[name]) for name in _SHAPE}
        tensors = load_file(folder / "reader.safetensors")
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise DatastoreCorrupt(f"the reader in {folder} is damaged ({error}); restore it from a copy") from error
    if version > VERSION:
        raise FormatVersionError(
            f"{folder} has version {version} of the format, this memlm knows {VERSION}; update memlm"
        )
    reader = add_row_reader(model, layer, **shape)
    wanted = {name: item.shape for name, item in reader.state_dict().items()}
    width = reader.query.in_features // reader.window
    if kind != model.config.model_type or wanted != {name: item.shape for name, item in tensors.items()}:
        remove_beside(model, reader)
        raise DatastoreMismatch(
            f"the reader in {folder} was trained in a {kind} model of another width or kind; this is a "
            f"{model.config.model_type} of width {width}: load the model that it was trained in"
        )
    reader.load_state_dict(tensors)
    return reader

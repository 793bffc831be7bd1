"""A saved mixture on disk: JSON, and beside it a file of tensors that the JSON names by the hash of its content.

The tensors are written first, under a name that no other content has, and then the JSON that names them, each in one
step: a process that is killed leaves the old mixture or the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import ConfigError
from ..files import write_atomically, write_json

_SUFFIX = ".safetensors"
_FILE, _DIGEST = "tensors_file", "tensors_sha256"  # in the JSON, where there are tensors
_DIGITS = 12  # of the hash, in the file's name
_NAME = re.compile(rf"[^/\0]+\.[0-9a-f]{{{_DIGITS}}}{re.escape(_SUFFIX)}")
# Far above what any mixture holds: more is no mixture, and is not read
_MOST_JSON, _MOST_TENSORS = 1 << 20, 1 << 28  # bytes
# What reading tensors raises, of names, types and shapes that are made up
_DAMAGE = (SafetensorError, AssertionError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
_DEEPEST = 32  # lists and dictionaries within each other


def check_place(path: Path) -> None:
    """Raise ConfigError where no mixture can be saved, because tensors have names like this."""
    if path.suffix == _SUFFIX:
        raise ConfigError(f"{path} would be the name of tensors; expected another suffix, such as .json")


def write(path: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put values and tensors in the place of what is saved at `path`.

    The tensors are in `{name of path}.{hash}.safetensors`. Those of the mixture that stood here before go when the new
    one is in place; a kill before that may leave tensors that no JSON names.
    """
    check_place(path)
    before = _named_by(path)
    name = None
    if tensors:
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        digest = hashlib.sha256(content).hexdigest()
        name = f"{path.name}.{digest[:_DIGITS]}{_SUFFIX}"
        write_atomically(path.with_name(name), content)
        values = {**values, _FILE: name, _DIGEST: digest}
    write_json(path, values)
    # one of another name belongs to the mixture that this one's JSON was copied from
    if before is not None and before != name and before.startswith(f"{path.name}."):
        with suppress(OSError):  # what is left over does no harm
            path.with_name(before).unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the values and tensors that `write` has put there.

    Raises:
        ConfigError: A file is missing, damaged or too large, or the two do not belong together.
    """
    values = _json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a saved mixture; expected an object with a kind")
    name, digest = values.pop(_FILE, None), values.pop(_DIGEST, None)
    if name is None and digest is None:
        return values, {}
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{path} names {reprlib.repr(name)} as its file of tensors; save the mixture again")
    beside = path.with_name(name)
    try:
        content = _content(beside, _MOST_TENSORS)
    except OSError as error:
        raise ConfigError(f"{beside} cannot be read: {error}; save the mixture again") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ConfigError(f"{beside} is damaged, or was not saved together with {path}; save the mixture again")
    try:
        return values, load(content)
    except _DAMAGE as error:
        raise ConfigError(f"{beside} cannot be read: {error}; save the mixture again") from error


def _named_by(path: Path) -> str | None:
    """Return the file of tensors that belongs to what is saved here, if that can be told."""
    with suppress(OSError, ConfigError):
        values = _json(path)
        name = values.get(_FILE) if isinstance(values, dict) else None
        return name if isinstance(name, str) and _NAME.fullmatch(name) else None
    return None


def _json(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        values = json.loads(_content(path, _MOST_JSON).decode(), parse_constant=refuse)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; `memlm tune … --save {path}` makes one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}; expected a saved mixture") from error
    level = [values]
    for _ in range(_DEEPEST):
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inside for item in items]
    if level:
        raise ConfigError(f"{path} is nested over {_DEEPEST} levels deep; expected a saved mixture")
    return values


def _content(path: Path, most: int) -> bytes:
    """Read a file of at most so many bytes."""
    status = path.stat()  # before it is opened: to open a pipe is to wait
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        raise OSError(f"it is no file of up to {most:,} bytes")
    with path.open("rb") as file:
        return file.read(most)

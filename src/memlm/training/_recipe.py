"""Recipes: tables of TOML that become dataclasses, checked; and the one for training a small language model."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError

# What TOML may give for a field of a type; `type` and not `isinstance`, for which true is a whole number.
_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "list[str]": (list,)}
_TYPES |= {f"{name} | None": _TYPES[name] for name in ("int", "float", "str")}  # None where nothing is given


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Shape of a Llama model."""

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    max_position_embeddings: int = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: Optimizer steps.
        batch: Blocks a step.
        micro_batch: Blocks a forward pass; divides `batch`.
        block: Tokens a block.
        matrix_learning_rate: Peak rate of Muon, for the weight matrices inside the layers.
        other_learning_rate: Peak rate of AdamW, for embeddings and norms.
        warmup_steps: Steps of linear warm-up.
        decay_fraction: Share of the steps, at the end, in which the rates fall linearly to zero.
        evaluate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        seed: Of initialization and of the order of the blocks.
        autocast: Run matrix products in bfloat16.
        compile: Compile the model with torch.compile, which needs a C++ compiler.
    """

    steps: int = 1500
    batch: int = 16
    micro_batch: int = 8
    block: int = 512
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 0.003
    weight_decay: float = 0.05
    warmup_steps: int = 40
    decay_fraction: float = 0.6
    evaluate_every: int = 100
    checkpoint_every: int = 100
    seed: int = 0
    autocast: bool = True
    compile: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides a training run.

    Attributes:
        train: Paths of the training documents.
        valid: Paths of the validation documents.
        license: License of the data, for the model card.
        model: Shape of the model.
        schedule: Length and rates.
    """

    train: list[str]
    valid: list[str]
    license: str = "not stated"
    model: ModelShape = field(default_factory=ModelShape)
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        sizes = {name: getattr(self.schedule, name) for name in ("steps", "batch", "micro_batch", "block")}
        if min(sizes.values()) < 1 or self.schedule.batch % self.schedule.micro_batch:
            described = ", ".join(f"{name} = {value}" for name, value in sizes.items())
            raise ConfigError(f"{described}: expected whole numbers of at least 1 and a micro_batch that divides batch")
        if self.schedule.block > self.model.max_position_embeddings:
            raise ConfigError(f"block = {self.schedule.block} is longer than max_position_embeddings; shorten it")


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from TOML; unknown keys are an error, and paths are relative to the file."""
    return build(Recipe, read_table(path), str(path), {"model": ModelShape, "schedule": Schedule})


def read_table(path: str | Path) -> dict[str, Any]:
    """Read TOML; `train` and `valid` become paths that are relative to where the program runs, and so does `from` where
    a folder of that name lies beside the file.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; expected a recipe in TOML") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for split in ("train", "valid"):
        if isinstance(table.get(split), list):
            table[split] = [str(path.parent / str(name)) for name in table[split]]
    start = table.get("from")
    if isinstance(start, str) and (path.parent / start).is_dir():
        table["from"] = str(path.parent / start)
    return table


def build(kind: Any, values: Any, where: str, tables: Mapping[str, Any] | None = None) -> Any:
    """Make a dataclass of a table.

    Args:
        kind: The dataclass. A field that would be a Python keyword ends in `_`, which its key leaves out.
        values: The table.
        where: Its name, for messages.
        tables: Key → dataclass of what is a table in it.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {values!r}; expected a table, [{where}]")
    tables = tables or {}
    values = {key: build(tables[key], value, key) if key in tables else value for key, value in values.items()}
    fields = {item.name.rstrip("_"): item for item in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(fields)}"
            raise ConfigError(f"{where} has an unknown key {key!r}{hint}")
        expected = str(fields[key].type)
        if expected in _TYPES and type(value) not in _TYPES[expected]:
            raise ConfigError(f"{where} has {key} = {value!r}; expected {expected.removesuffix(' | None')}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where} has {key} = {value}; expected a finite number")
    for key, item in fields.items():
        if item.default is item.default_factory is dataclasses.MISSING and key not in values:
            raise ConfigError(f"{where} has no {key}; add it")
    return kind(**{fields[key].name: value for key, value in values.items()})

"""Recipes for training a small language model, read from TOML and checked."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError

# What TOML may give for a field of a type; `type` and not `isinstance`, for which true is a whole number.
_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "list[str]": (list,)}


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
    nested = {"model": ModelShape, "schedule": Schedule}
    values = {key: _build(nested[key], value, key) if key in nested else value for key, value in table.items()}
    return _build(Recipe, values, str(path))


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {values!r}; expected a table, [{where}]")
    types = {item.name: str(item.type) for item in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(types)}"
            raise ConfigError(f"{where} has an unknown key {key!r}{hint}")
        if types[key] in _TYPES and type(value) not in _TYPES[types[key]]:
            raise ConfigError(f"{where} has {key} = {value!r}; expected {types[key]}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error

"""The recipe of training with neighbors' next tokens: `memlm train spalm`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ._recipe import build, read_table
from ._trime_recipe import TrimeSchedule, check_numbers

_MOST = 64  # neighbors of a token
GATES, TRAINED = ("scalar", "vector"), ("all", "gate")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpalmSettings:
    """The long-term memory and its gate.

    Attributes:
        k: Neighbors a token; 4 in the paper.
        gates: "scalar", or "vector" for one gate a dimension.
        trained: "all", the model and its gate, or "gate" alone.
        own_document: Let a stored document find itself. A control: what is trained so learns to copy.

    Raises:
        ConfigError: A value is none of these.
    """

    k: int = 4
    gates: str = "scalar"
    trained: str = "all"
    own_document: bool = False

    def __post_init__(self) -> None:
        check_numbers("memory", self, "k", least=1)
        if self.k > _MOST:
            raise ConfigError(f"memory has k = {self.k}; expected at most {_MOST}, which every token brings along")
        for name, known in (("gates", GATES), ("trained", TRAINED)):
            if getattr(self, name) not in known:
                raise ConfigError(f"memory has {name} = {getattr(self, name)!r}; expected {' or '.join(known)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpalmBatches:
    """How documents become batches.

    Attributes:
        length: Tokens a segment.
        streams: Segments a batch, each at another place of the text.
        carry: Tokens before a segment whose keys and values it sees, without gradient; 0 for none.

    Raises:
        ConfigError: A number is too small.
    """

    length: int = 512
    streams: int = 4
    carry: int = 0

    def __post_init__(self) -> None:
        check_numbers("batches", self, "length", least=2)
        check_numbers("batches", self, "streams", least=1)
        check_numbers("batches", self, "carry", least=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpalmRecipe:
    """Everything that decides a run of training with neighbors' next tokens.

    Attributes:
        train: Paths of the training documents; they are what is searched, too.
        valid: Paths of the validation documents.
        from_: Model to go on with; as it is at the start, it makes the keys.
        license: License of the data, for the model card.
        memory: Neighbors and gate.
        batches: How documents become batches.
        schedule: Length and rate.

    Raises:
        ConfigError: There is no text, or settings do not go together.
    """

    train: list[str]
    valid: list[str]
    from_: str
    license: str = "not stated"
    memory: SpalmSettings = field(default_factory=SpalmSettings)
    batches: SpalmBatches = field(default_factory=SpalmBatches)
    schedule: TrimeSchedule

    def __post_init__(self) -> None:
        for split in ("train", "valid"):
            if not getattr(self, split):
                raise ConfigError(f"{split} = []; expected at least one path")
        if self.batches.carry and self.schedule.gradient_checkpointing:
            raise ConfigError("gradient checkpointing keeps no keys and values to carry; expected carry = 0 with it")

    def describe(self) -> dict[str, Any]:
        """Return the recipe as tables and values, with the keys that it has in TOML."""
        described = dataclasses.asdict(self)
        return {"method": "spalm", "from": described.pop("from_")} | described

    @staticmethod
    def fixed() -> list[str]:
        """Return what may not change when a run goes on, as `check_recipe` takes it."""
        return ["method", "train", "valid", "from", "memory", "batches", *TrimeSchedule.fixed()]


def load_spalm_recipe(path: str | Path) -> SpalmRecipe:
    """Read a recipe from TOML.

    Paths are relative to the file; so is `from` where a folder of that name lies beside it.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or missing, or a value cannot work.
    """
    tables: Mapping[str, Any] = {"memory": SpalmSettings, "batches": SpalmBatches, "schedule": TrimeSchedule}
    return build(SpalmRecipe, read_table(path), str(path), tables)

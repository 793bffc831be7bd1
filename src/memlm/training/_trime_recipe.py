"""The recipe of training with memory: `memlm train trime`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ._memories import External, Local, LongTerm, TrainingMemory
from ._recipe import ModelShape, build, read_table

KINDS = ("local", "long-term", "external")
CONSECUTIVE, BM25 = "consecutive", "bm25"
# What may change when a run goes on: how long it is, and how often it is looked at.
_MAY_CHANGE = {"steps", "epochs", "evaluate_every", "checkpoint_every", "report_to"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySettings:
    """What may be seen in training.

    Attributes:
        kinds: Any of local, long-term and external; none at all is the plain loss, on the same batches.
        drop_own: With external memory, share of the segments that may not look at themselves.
        own_document: With external memory, whether other segments of the same document are seen, too, as in the paper.
            Where the datastore will not hold the text that is read, take false; the batches then go across documents.
        warmup: Share of the updates, at the start, that take the plain loss.
        temperature: Divides similarities; 1 in the paper's training.

    Raises:
        ConfigError: A kind is unknown, or a number out of its range.
    """

    kinds: list[str] = field(default_factory=list)
    drop_own: float = 0.9
    own_document: bool = True
    warmup: float = 0.05
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS or self.kinds.count(kind) > 1:
                raise ConfigError(f"memory has kinds = {self.kinds}; expected any of {', '.join(KINDS)}, each once")
        check_numbers("memory", self, "drop_own", "warmup", least=0, most=1)
        check_numbers("memory", self, "temperature", above=0)

    def memories(self) -> list[TrainingMemory]:
        """Return the memories that the kinds name."""
        made: dict[str, TrainingMemory] = {
            "local": Local(),
            "long-term": LongTerm(),
            "external": External(drop_own=self.drop_own, own_document=self.own_document),
        }
        return [made[kind] for kind in self.kinds]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """How documents become batches; two recipes that differ in nothing but memory see the same.

    Attributes:
        order: "consecutive", see `consecutive_segments`, or "bm25", see `bm25_segments`.
        length: Tokens a segment.
        streams: With consecutive order, places in the text at which a batch reads; 1 where none is given.
        consecutive: With consecutive order, segments that a batch reads at each; 4 where none is given.
        rows: With order by BM25, segments a batch; 4 where none is given.

    Raises:
        ConfigError: The order is unknown, a number is too small, or is for the other order.
    """

    order: str = CONSECUTIVE
    length: int = 512
    streams: int | None = None
    consecutive: int | None = None
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.order not in (CONSECUTIVE, BM25):
            raise ConfigError(f"batches has order = {self.order!r}; expected {CONSECUTIVE!r} or {BM25!r}")
        check_numbers("batches", self, "length", least=2)
        check_numbers("batches", self, "streams", "consecutive", "rows", least=1)
        other = CONSECUTIVE if self.order == BM25 else BM25
        for name in ("streams", "consecutive") if self.order == BM25 else ("rows",):
            if getattr(self, name) is not None:
                raise ConfigError(f"batches has {name}, which is for order = {other!r}; leave it out")

    @property
    def layout(self) -> tuple[int, int]:
        """Streams, and segments a batch reads at each; one stream where the order is by BM25."""
        return (1, self.rows or 4) if self.order == BM25 else (self.streams or 1, self.consecutive or 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimeSchedule:
    """How long and how fast to train, and how often to look.

    Attributes:
        steps: Updates; give either these or epochs.
        epochs: Times that the text is gone through.
        learning_rate: Peak rate of AdamW.
        weight_decay: Of matrices and embeddings; norms and biases have none.
        clip: Largest norm of a gradient.
        warmup_steps: Steps of linear warm-up.
        decay_fraction: Share of the steps, at the end, in which the rate falls linearly to zero.
        accumulate: Batches an update.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        autocast: Run matrix products in bfloat16; similarities stay in float32.
        evaluate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        valid_tokens: Most tokens that are read of each validation text, from its beginning.
        seed: Of new weights, dropout, the chain by BM25, and dropped memories.
        report_to: Where the Trainer reports to besides `losses.jsonl`, such as tensorboard.

    Raises:
        ConfigError: A number is out of its range, or the length is given twice or not at all.
    """

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup_steps: int = 40
    decay_fraction: float = 0.6
    accumulate: int = 1
    gradient_checkpointing: bool = False
    autocast: bool = True
    evaluate_every: int = 100
    checkpoint_every: int = 100
    valid_tokens: int = 100_000
    seed: int = 0
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("schedule needs either steps or epochs; give one of them")
        check_numbers("schedule", self, "steps", "accumulate", "evaluate_every", "checkpoint_every", least=1)
        check_numbers("schedule", self, "valid_tokens", least=2)
        check_numbers("schedule", self, "epochs", "learning_rate", "clip", above=0)
        check_numbers("schedule", self, "weight_decay", "warmup_steps", "seed", least=0)
        check_numbers("schedule", self, "decay_fraction", least=0, most=1)

    @staticmethod
    def fixed() -> list[str]:
        """Return what may not change when a run goes on, as `check_recipe` takes it."""
        names = (item.name for item in dataclasses.fields(TrimeSchedule))
        return [f"schedule.{name}" for name in names if name not in _MAY_CHANGE]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimeRecipe:
    """Everything that decides a run of training with memory.

    Attributes:
        train: Paths of the training documents.
        valid: Paths of the validation documents.
        from_: Model to go on with: "reference", a folder made by `save_pretrained`, or a name on the hub.
        model: Shape of a new model, in the place of `from_`.
        license: License of the data, for the model card.
        memory: What may be seen.
        batches: How documents become batches.
        schedule: Length and rate.

    Raises:
        ConfigError: There is no text, none or two models to begin with, or a memory that would never see anything.
    """

    train: list[str]
    valid: list[str]
    from_: str | None = None
    model: ModelShape | None = None
    license: str = "not stated"
    memory: MemorySettings = field(default_factory=MemorySettings)
    batches: Batches = field(default_factory=Batches)
    schedule: TrimeSchedule

    def __post_init__(self) -> None:
        for split in ("train", "valid"):
            if not getattr(self, split):
                raise ConfigError(f"{split} = []; expected at least one path")
        if (self.from_ is None) == (self.model is None):
            raise ConfigError("the recipe needs either `from`, a model to go on with, or [model], a new one's shape")
        if self.model is not None and self.batches.length > self.model.max_position_embeddings:
            raise ConfigError(f"length = {self.batches.length} is longer than max_position_embeddings; shorten it")
        if "long-term" in self.memory.kinds and (self.batches.order == BM25 or self.batches.layout[1] < 2):
            raise ConfigError(
                "long-term memory sees earlier segments of the document in the batch, and there are none; expected "
                "order = 'consecutive' and consecutive of at least 2"
            )
        if "external" in self.memory.kinds and (self.batches.order == CONSECUTIVE or self.batches.layout[1] < 2):
            raise ConfigError(
                "external memory sees other segments that are like one's own, and the batch has none; expected "
                "order = 'bm25' and rows of at least 2"
            )

    def describe(self) -> dict[str, Any]:
        """Return the recipe as tables and values, with the keys that it has in TOML."""
        described = dataclasses.asdict(self)
        return {"method": "trime", "from": described.pop("from_")} | described

    @staticmethod
    def fixed() -> list[str]:
        """Return what may not change when a run goes on, as `check_recipe` takes it."""
        return ["method", "train", "valid", "from", "model", "memory", "batches", *TrimeSchedule.fixed()]


def load_trime_recipe(path: str | Path) -> TrimeRecipe:
    """Read a recipe from TOML.

    Paths are relative to the file; so is `from` where a folder of that name lies beside it.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or missing, or a value cannot work.
    """
    tables: Mapping[str, Any] = {
        "model": ModelShape,
        "memory": MemorySettings,
        "batches": Batches,
        "schedule": TrimeSchedule,
    }
    return build(TrimeRecipe, read_table(path), str(path), tables)


def check_numbers(
    where: str,
    settings: Any,
    *names: str,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> None:
    """Raise ConfigError unless the numbers that are given are in their range."""
    for name in names:
        value = getattr(settings, name)
        if value is None:
            continue
        if least is not None and most is not None:
            wrong, expected = not least <= value <= most, f"a share between {least} and {most}"
        elif least is not None:
            wrong, expected = value < least, f"at least {least}"
        else:
            wrong, expected = above is not None and value <= above, f"a number above {above}"
        if wrong:
            raise ConfigError(f"{where} has {name} = {value}; expected {expected}")

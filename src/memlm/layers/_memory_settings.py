"""What kind of attention memory a layer has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError

_OWN_KEYS = (
    "a projection of the memory's own keys or values would never learn: memory is written without gradient, so that no "
    "loss reaches it, and its search stays random. Choose 'own_queries', whose projection learns from what is read"
)
_CHOICES = {
    "combine": ("joint", "gate", "null_slot"),
    "normalize": ("none", "l2"),
    "positions": ("none", "first", "rebased"),
    "drop_off": ("none", "age"),
    "projections": ("shared", "own_queries"),
}


@dataclass(frozen=True, kw_only=True)
class AttentionMemorySettings:
    """How attention remembers and reads.

    Attributes:
        size: Tokens that are remembered of each row.
        top_k: Of these, how many a query attends to.
        combine: How what was found joins the local attention: `joint`, one softmax over both; `gate`, a learned weight
            for each head (Wu et al. 2022); `null_slot`, a softmax over memory and a learned score for "nothing here".
        normalize: `none` keeps the model's queries and keys. `l2` gives them length 1, for memory and local attention,
            and each head a learned scale, 10 at first: it changes what the model computes, and must be trained.
        positions: Of the keys that are read, in models with rotary positions: `none`, where the query stands; `first`,
            where the first key stands that the query sees in local attention (Tworkowski et al. 2023); `rebased`, one
            after the other before that one, in the order of the text.
        drop_off: `none`, or `age`: every head learns how much less an entry counts the older it is; at first its score
            falls by 0.001 a token.
        projections: `shared`, memory and local attention have all of them in common (Wu et al. 2022). `own_queries`
            adds a projection for queries to memory, which starts as a copy.
        device: Where it is remembered and searched, such as "cpu" for memories that are too large for the device of the
            layer; None is that device. A torch.device becomes its name.

    Raises:
        ConfigError: A setting has a value that cannot work.
    """

    size: int = 8192
    top_k: int = 32
    combine: str = "joint"
    normalize: str = "none"
    positions: str = "none"
    drop_off: str = "none"
    projections: str = "shared"
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        for name, least in (("size", 0), ("top_k", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}; expected a whole number, at least {least}")
        if self.projections in ("own_keys", "own_values", "own"):
            raise ConfigError(f"projections is {self.projections!r}: {_OWN_KEYS}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.device is not None:
            try:
                torch.empty(1, device=self.device).tolist()  # "meta" has no numbers to give, other names no device
            except (RuntimeError, AssertionError, TypeError):
                raise ConfigError(
                    f"device is {self.device!r}; expected a name such as 'cpu' or 'cuda:0', of a device that is there"
                ) from None
            object.__setattr__(self, "device", str(torch.device(self.device)))

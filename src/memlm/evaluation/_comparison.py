"""The result of a comparison: a table, and what explains it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_atomically, write_json
from ..mixtures import Mixture
from ..text import count
from ._analysis import Analysis
from ._bootstrap import Interval
from ._evaluate import finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method.

    Attributes:
        method: Its name.
        settings: What was fitted, in words.
        perplexity: Per token.
        over_fixed: Nats a token that it gains over the tuned fixed λ.
        over_cache: Nats a token that it gains over the better of the tuned caches.
        helped: Share of tokens that it makes more likely by over 1 % than the model alone.
        hurt: Share that it makes less likely by over 1 %.
        searched: Share of tokens for which the datastore has to be searched.
        tokens_per_second: Model, search and mixing, in the pass that all methods share: everything is searched there.
            What skipping saves is in `Comparison.saving`.
        fit_seconds: Time that fitting took; of what is fitted before it, none.
        parameters: Numbers fitted by gradient in a network; 0 where there is none.
        shuffled: Perplexity when the weights go to other tokens; None where they are the same for all.
    """

    method: str
    settings: str
    perplexity: float
    over_fixed: Interval
    over_cache: Interval
    helped: float
    hurt: float
    searched: float
    tokens_per_second: float
    fit_seconds: float
    parameters: int
    shuffled: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None for a perplexity that no float holds."""
        intervals = {"over_fixed": self.over_fixed.to_dict(), "over_cache": self.over_cache.to_dict()}
        return finite(dataclasses.asdict(self)) | intervals


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What the learned weight saves, by two passes over the test text that differ in its threshold alone.

    Attributes:
        skipped: Share of the searches that are left out.
        perplexity_always: Per token, everything being searched.
        perplexity: Per token, with skipping.
        tokens_per_second_always: Model, search and mixing, everything being searched.
        tokens_per_second: The same, with skipping.
    """

    skipped: float
    perplexity_always: float
    perplexity: float
    tokens_per_second_always: float
    tokens_per_second: float

    @property
    def speedup(self) -> float:
        """How many times as fast it is with skipping."""
        return self.tokens_per_second / self.tokens_per_second_always

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return finite({**dataclasses.asdict(self), "speedup": self.speedup})

    def __str__(self) -> str:
        return (
            f"Learned weight with {self.skipped:.0%} of the searches skipped: perplexity {self.perplexity_always:,.2f} "
            f"→ {self.perplexity:,.2f}, {self.tokens_per_second_always:,.0f} → {self.tokens_per_second:,.0f} tokens/s "
            f"({self.speedup:.2f} times the speed), each in a pass of its own"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The table, and what explains it.

    Attributes:
        rows: The model alone first.
        tokens: Targets of the test text.
        valid_tokens: Targets of the held-out text that everything was fitted to.
        unit: What was resampled for the intervals, and held together in cross-validation.
        skipping: Perplexity of the learned weight against the share of searches skipped; empty where none was fitted.
        saving: What skipping saves; None where the learned weight skips nothing.
        analysis: λ against distance, gain by frequency and overlap, reliability of λ.
        settings: Memory and windows.
        mixtures: Every fitted mixture, by method.
    """

    rows: tuple[Row, ...]
    tokens: int
    valid_tokens: int
    unit: str
    skipping: list[dict[str, float]]
    saving: Saving | None
    analysis: Analysis
    settings: dict[str, Any]
    mixtures: dict[str, Mixture]

    def row(self, method: str) -> Row:
        """Return the row of a method."""
        return next(row for row in self.rows if row.method == method)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the networks as plain values."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "tokens": self.tokens,
            "valid_tokens": self.valid_tokens,
            "unit": self.unit,
            "skipping": [finite(row) for row in self.skipping],
            "saving": None if self.saving is None else self.saving.to_dict(),
            "analysis": self.analysis.to_dict(),
            "settings": self.settings,
            "mixtures": {name: mixture.to_dict() for name, mixture in self.mixtures.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write the comparison, in one step: .json (everything), .md (the table) or .html (the table and plots)."""
        from ._comparison_page import markdown, page

        path = Path(path)
        match path.suffix.lower():
            case ".json":
                write_json(path, self.to_dict())
            case ".md":
                write_atomically(path, markdown(self))
            case ".html" | ".htm":
                write_atomically(path, page(self))
            case _:
                raise ConfigError(f"{path} ends in {path.suffix!r}; expected .json, .md or .html")

    def __str__(self) -> str:
        saving = [] if self.saving is None else [str(self.saving)]
        tokens = count(self.tokens, "test token")
        return "\n".join([*table(self), f"{tokens}; 95 % intervals over {self.unit}", *saving])


def table(comparison: Comparison) -> list[str]:
    """Return the table in lines, for a terminal."""
    fixed, alone = comparison.row("knn-lm").perplexity, comparison.row("lm").perplexity
    lines = [
        f"{'method':<22}{'perplexity':>11}{'to fixed λ':>12}{'95 % interval':>22}{'to LM':>9}{'helped':>8}{'hurt':>6}"
        f"{'searched':>10}{'tokens/s':>10}{'shuffled':>10}"
    ]
    for row in comparison.rows:
        low, high = (_percent(-value) for value in (row.over_fixed.high, row.over_fixed.low))
        interval = "" if row.method == "knn-lm" else f"{low} to {high}"
        to_fixed, to_lm = (_percent(math.log(row.perplexity) - math.log(other)) for other in (fixed, alone))
        shuffled = "" if row.shuffled is None else f"{row.shuffled:,.2f}"
        lines.append(
            f"{row.method:<22}{row.perplexity:>11,.2f}{to_fixed:>12}{interval:>22}{to_lm:>9}"
            f"{row.helped:>8.0%}{row.hurt:>6.0%}"
            f"{row.searched:>10.0%}{row.tokens_per_second:>10,.0f}{shuffled:>10}"
        )
    return lines


def _percent(nats: float) -> str:
    """Return a change of log perplexity as a change of perplexity in percent."""
    return "?" if not math.isfinite(nats) else f"{100 * math.expm1(min(nats, 50.0)):+.1f}%"


def percentages(row: Row) -> tuple[str, str]:
    """Return the gain over fixed λ as a change of perplexity with its interval, and that over the cache."""

    def text(interval: Interval) -> str:
        mean, low, high = (_percent(-value) for value in (interval.mean, interval.high, interval.low))
        return f"{mean} ({low} to {high})"

    return text(row.over_fixed), text(row.over_cache)

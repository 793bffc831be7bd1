"""What memory changed in a text, token by token: the data behind `memlm explain`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError
from ..files import write_atomically, write_json

if TYPE_CHECKING:
    from rich.console import Console

# Factors at which a change of probability is shown one step stronger. Where memory finds no support, the mixture
# multiplies by 1 − λ: for λ up to a half that stays in the palest step, so that real support and real harm stand out.
STEPS = (1.1, 2.0, 4.0, 16.0)
# Probabilities come from float32 logs; what underflowed is taken as this instead of as impossible.
_FLOOR = 1e-38
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Source:
    """A stored token that was among the neighbors, with the text around it."""

    document: str
    before: str
    token: str
    after: str
    share: float
    """Its part of p_kNN."""
    distance: float


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """A token of the text with the probabilities it was given; NaN where it was not scored."""

    text: str
    lm: float
    memory: float
    mixture: float
    weight: float
    """λ, the weight of the memory at this token; of all memories, where there are several."""
    sources: tuple[Source, ...] = ()
    weights: tuple[float, ...] = ()
    """λ of each memory."""

    @property
    def scored(self) -> bool:
        """Whether the model was asked for this token (the first token of a document may not be)."""
        return not (math.isnan(self.lm) or math.isnan(self.mixture))

    @property
    def bits(self) -> float:
        """log2(mixture / lm): what memory changed."""
        return (_log(self.mixture) - _log(self.lm)) / math.log(2) if self.scored else 0.0

    @property
    def level(self) -> int:
        """`bits` in steps, -4 to 4: the number of `STEPS` that the change reaches."""
        size = sum(abs(self.bits) >= math.log2(step) for step in STEPS)
        return size if self.bits > 0 else -size

    @property
    def memory_share(self) -> float:
        """λ p_kNN / p: the part of the token's probability that came from memory."""
        part = self.weight * self.memory
        return min(1.0, part / self.mixture) if self.scored and self.mixture > 0 and part > 0 else 0.0

    @property
    def from_memory(self) -> bool:
        """Whether most of the token's probability came from memory."""
        return self.memory_share > 0.5

    @property
    def support(self) -> dict[str, float]:
        """Probability that each document gave to this token: λ times the shares of the sources that agree with it."""
        support: dict[str, float] = {}
        for source in self.sources:
            if source.token == self.text and self.weight * source.share > 0:
                support[source.document] = support.get(source.document, 0.0) + self.weight * source.share
        return support


class Stretch(NamedTuple):
    """Consecutive tokens from memory that one document supports throughout (None: no listed source agrees)."""

    start: int
    stop: int
    document: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """A text, what memory changed in it, and where that came from.

    Summaries are over the tokens that the model wrote where there is a prompt, else over all that were scored.
    """

    tokens: tuple[ExplainedToken, ...]
    title: str
    generated_from: int | None = None
    settings: dict[str, float | int | str] = field(default_factory=dict)
    memories: tuple[str, ...] = ()
    """What each memory is, in the order of `ExplainedToken.weights`."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Mean λ of each memory; empty where there is but one, or no token."""
        if len(self.memories) < 2 or not self.summarized:
            return ()
        columns = zip(*(token.weights for token in self.summarized), strict=True)
        return tuple(_mean(list(column)) for column in columns)

    @property
    def summarized(self) -> tuple[ExplainedToken, ...]:
        """The tokens that the summaries are over."""
        return tuple(token for token in self.tokens[self.generated_from or 0 :] if token.scored)

    @property
    def perplexity_lm(self) -> float:
        """Perplexity per token of the model alone; NaN without tokens."""
        return _perplexity([token.lm for token in self.summarized])

    @property
    def perplexity(self) -> float:
        """Perplexity per token with memory; NaN without tokens."""
        return _perplexity([token.mixture for token in self.summarized])

    @property
    def gain(self) -> float:
        """Nats per token gained by memory: mean log p minus mean log p_LM."""
        return _mean([token.bits for token in self.summarized]) * math.log(2)

    @property
    def helped(self) -> float:
        """Share of tokens that memory made more likely, by a tenth or more."""
        return _mean([token.level > 0 for token in self.summarized])

    @property
    def hurt(self) -> float:
        """Share of tokens that memory made less likely, by a tenth or more."""
        return _mean([token.level < 0 for token in self.summarized])

    @property
    def documents(self) -> list[tuple[str, float]]:
        """Documents and the probability they gave to the tokens of this text, largest first."""
        total: dict[str, float] = {}
        for token in self.summarized:
            for name, probability in token.support.items():
                total[name] = total.get(name, 0.0) + probability
        return sorted(total.items(), key=lambda item: -item[1])

    @property
    def stretches(self) -> list[Stretch]:
        """The tokens from memory, cut greedily into the longest stretches that one document supports throughout.

        White space at either end is left out: nobody asks where a line break came from.
        """
        trimmed = []
        for stretch in self._stretches():
            visible = [i for i in range(stretch.start, stretch.stop) if self.tokens[i].text.strip()]
            if visible:
                trimmed.append(Stretch(visible[0], visible[-1] + 1, stretch.document))
        return trimmed

    def _stretches(self) -> Iterator[Stretch]:
        start: int | None = None
        candidates: dict[str, float] = {}
        for position, token in enumerate(self.tokens):
            if start is not None:
                support = token.support
                shared = {name: candidates[name] + support[name] for name in candidates if name in support}
                agree = shared or not candidates or not support  # a token without sources disagrees with nobody
                if token.from_memory and position != self.generated_from and agree:
                    candidates = shared or candidates or support
                    continue
                yield Stretch(start, position, _first(candidates))
                start = None
            if token.from_memory:
                start, candidates = position, token.support
        if start is not None:
            yield Stretch(start, len(self.tokens), _first(candidates))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: numbers that are not finite as None, text without lone surrogates."""
        summary = {
            "tokens": len(self.summarized),
            "perplexity_lm": self.perplexity_lm,
            "perplexity": self.perplexity,
            "gain_nats_per_token": self.gain,
            "helped": self.helped,
            "hurt": self.hurt,
            "documents": self.documents,
            "weights": self.weights,
        }
        return _plain({"format": 1, "summary": summary, **asdict(self)})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Explanation:
        """Return the explanation that `to_dict` described."""

        def filled(values: dict[str, Any]) -> dict[str, Any]:
            return {name: math.nan if value is None else value for name, value in values.items()}

        tokens = []
        for token in data["tokens"]:
            sources = tuple(Source(**filled(source)) for source in token["sources"])
            weights = tuple(token.get("weights", ()))
            tokens.append(ExplainedToken(**filled(token) | {"sources": sources, "weights": weights}))
        memories = tuple(data.get("memories", ()))
        return cls(tuple(tokens), data["title"], data["generated_from"], data["settings"], memories)

    def save(self, path: Path | str) -> None:
        """Write a self-contained page (.html) or the data (.json), in one step."""
        path = Path(path)
        match path.suffix.lower():
            case ".html" | ".htm":
                from ._explanation_html import explanation_page

                write_atomically(path, explanation_page(self))
            case ".json":
                write_json(path, self.to_dict())
            case suffix:
                raise ConfigError(f"{str(path)!r} ends in {suffix!r}: an explanation is saved as .html or .json")

    def print(self, console: Console | None = None) -> None:
        """Show the explanation in the terminal."""
        from ._explanation_terminal import print_explanation

        print_explanation(self, console)


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {_plain(name): _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case str():
            return _SURROGATES.sub("\ufffd", value)
        case float():
            return value if math.isfinite(value) else None
    return value


def _log(probability: float) -> float:
    return math.log(max(probability, _FLOOR))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _perplexity(probabilities: list[float]) -> float:
    return math.exp(-_mean([_log(p) for p in probabilities])) if probabilities else math.nan


def _first(support: dict[str, float]) -> str | None:
    return max(support, key=support.__getitem__, default=None)

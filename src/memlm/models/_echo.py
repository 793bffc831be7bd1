"""What an endpoint tells of a prompt, read and checked before anything is made of it."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, NamedTuple

from ..errors import EndpointError
from ._token_names import TokenNames

_LISTS = ("tokens", "token_logprobs", "top_logprobs")
_TOLERANCE = 0.01  # by which a server's numbers may contradict each other
_ROUNDING = 1e-3  # by which a log-probability may be above 0
_LOWEST = -1e5  # of what a server may say; many say −9999 for what is impossible


class Echo(NamedTuple):
    """Three lists, one item a token of the prompt; of the first token only the name is told.

    Attributes:
        tokens: The token as the server names it.
        log_probs: Its natural log-probability.
        top: Names and log-probabilities of the most likely tokens in its place; the token itself may be added to them.
    """

    tokens: list[str]
    log_probs: list[float]
    top: list[dict[str, float]]


def read_echo(choice: dict[str, Any], ids: list[int], names: TokenNames, top: int) -> Echo:
    """Read one of the choices of a completion with `echo` and `logprobs`.

    Args:
        choice: Of the answer's JSON.
        ids: Of the prompt's tokens, at least two.
        names: The encoder's names of tokens.
        top: Most likely tokens that must be there in every place.

    Raises:
        EndpointError: It is not about these tokens, or they are not all there, or its numbers are no log-probabilities.
    """
    told, length = choice.get("logprobs"), len(ids)
    told = told if isinstance(told, dict) else {}
    lists: list[list[Any]] = [item for item in map(told.get, _LISTS) if isinstance(item, list)]
    if len(lists) < len(_LISTS):
        raise EndpointError(
            f"gives no logprobs with {', '.join(_LISTS)}; expected completions (not chat) from a server that supports "
            "logprobs"
        )
    given = min(map(len, lists))
    if given not in (length, length + 1):  # the token that was generated may be there, too
        hint = "its tokenizer may be another, or it adds a start token of its own"
        if given < length:
            hint = "it must support echo, and its context must hold the window and one token more"
        raise EndpointError(f"tells of {given} tokens for a prompt of {length}; expected as many: {hint}")
    tokens, log_probs, tops = lists[0][:length], lists[1][1:length], lists[2][1:length]
    rows = [item.values() if isinstance(item, dict) else [None] for item in tops]
    if not all(map(_is_log_prob, chain(log_probs, *rows))) or not all(isinstance(token, str) for token in tokens):
        raise EndpointError(
            "gives something else than a log-probability behind a prompt's first token; expected numbers from "
            f"{_LOWEST:,.0f} to 0"
        )
    tops = [{name: min(value, 0.0) for name, value in row.items()} for row in tops]
    echo = Echo(tokens, [math.nan, *(min(value, 0.0) for value in log_probs)], [{}, *tops])
    _check_numbers(echo, _check_names(echo, ids, names))
    _check_count(echo, names, top)
    return echo


def _is_log_prob(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and _LOWEST <= value <= _ROUNDING  # NaN is not


def _check_names(echo: Echo, ids: list[int], names: TokenNames) -> list[int]:
    """Refuse an answer about other tokens; return the ids that its names tell."""
    named = [names[token] for token in echo.tokens]
    known = [place for place, number in enumerate(named) if number >= 0]
    wrong = [place for place in known if named[place] != ids[place]]
    # how a server writes a token as text can depend on what stands before it, so a few may differ
    if len(wrong) > (0 if all(map(names.is_id, echo.tokens)) else len(known) // 2):
        place = wrong[0]
        own, told = names.tokenizer.convert_ids_to_tokens(ids[place]), echo.tokens[place][:40]
        raise EndpointError(
            f"calls token {place} of a window {told!r}, where {ids[place]} was sent, which is {own!r} to the encoder; "
            "expected a model with the same tokenizer, and positions that are not shifted"
        )
    return named


def _check_numbers(echo: Echo, named: list[int]) -> None:
    """Refuse numbers that contradict each other."""
    for place, (token, log_prob, top) in enumerate(zip(*echo, strict=True)):
        if not top:
            continue
        if sum(map(math.exp, top.values())) > 1 + _TOLERANCE:
            raise EndpointError(
                f"gives token {place} of a window alternatives whose probabilities add up to more than 1; expected "
                "natural log-probabilities"
            )
        # a name that several tokens share may stand for another one among the alternatives
        if named[place] >= 0:
            again = top.get(token, min(log_prob, max(top.values())))
            if abs(again - log_prob) > _TOLERANCE:
                raise EndpointError(
                    f"gives token {place} of a window log-probability {log_prob:.3f}, where its list of likely tokens "
                    f"says {again:.3f} or less; expected probabilities of one model, and positions that are not shifted"
                )


def _check_count(echo: Echo, names: TokenNames, top: int) -> None:
    """Refuse fewer alternatives than were asked for: with the target added to them, a belief would depend on it."""
    asked = min(top, len(names.tokenizer))
    for row in echo.top[1:]:
        # tokens that share a name hide each other, so that there may be fewer names than alternatives
        if len(row) < asked and all(names[name] >= 0 for name in row):
            raise EndpointError(
                f"gives {len(row)} log-probabilities a token where {top} were asked for; lower top (--top-logprobs), "
                "or raise the server's limit"
            )

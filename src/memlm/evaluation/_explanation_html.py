"""The page of an explanation: one file that needs nothing else."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from ..text import printable
from ._explanation import STEPS, Explanation

# Inside a script element `<` could end it or open a comment, and old parsers take the two separators for line ends.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def explanation_page(explanation: Explanation) -> str:
    """Return the HTML page, with the data inside it as JSON."""
    page = explanation.to_dict() | {"stretches": explanation.stretches, "steps": STEPS}
    for token, shown in zip(explanation.tokens, page["tokens"], strict=True):
        shown |= {"level": token.level, "bits": token.bits, "memory_share": token.memory_share}
        for source, shown_source in zip(token.sources, shown["sources"], strict=True):
            shown_source["agrees"] = source.token == token.text
    data = json.dumps(_printable(page), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    template = files("memlm.evaluation").joinpath("explanation.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", data.translate(_ESCAPES), 1)


def _printable(value: Any) -> Any:
    match value:
        case dict():
            return {_printable(name): _printable(item) for name, item in value.items()}
        case list() | tuple():
            return [_printable(item) for item in value]
        case str():
            return printable(value)
    return value

"""`memlm explain`: what the memory changed, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import _common as common


def explain(
    model: common.Model,
    datastore: common.Memory,
    text: Annotated[str, typer.Argument(help="The text itself, or @FILE to read it from a file.")],
    mixture: common.Mixture = None,
    weight: common.Weight = None,
    temperature: common.Temperature = None,
    k: common.K = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that needs nothing else.")] = None,
    sources: Annotated[int, typer.Option(help="Neighbors shown a token.")] = 5,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Color every token by what the memory changed, and show the stored tokens that did it."""
    title = "Explained text"
    if text.startswith("@"):
        from ..documents import Corpus

        title = Path(text[1:]).name
        text = next(iter(Corpus(text[1:]))).text
    if not text.strip():
        raise ConfigError("there is no text to explain; give some, or @FILE")
    settings = common.load_mixture(mixture, weight, temperature, k)
    from ..datastore import Datastore
    from ..evaluation import explain as explain_text

    memory = Datastore(datastore)
    lm = common.load_for(memory, model, dtype, device)
    explanation = explain_text(lm, text, memory, settings, sources=sources, title=title)
    if html is not None:
        explanation.save(html)
        common.note(f"page written to {html}")
    if json:
        common.emit(explanation.to_dict(), "", True)
    else:
        explanation.print()

"""`memlm explain`: what the memory changed, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from . import _common as common


def explain(
    model: common.Model,
    datastore: common.MemoryOrNone,
    text: Annotated[str, typer.Argument(help="The text itself, or @FILE for the first document of a file.")],
    mixture: common.Mixture = None,
    weight: common.Weight = None,
    temperature: common.Temperature = None,
    k: common.K = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that needs nothing else.")] = None,
    sources: Annotated[int, typer.Option(min=1, help="Neighbors shown a token.")] = 5,
    endpoint: common.Endpoint = None,
    endpoint_model: common.EndpointModel = None,
    top_logprobs: common.TopLogprobs = 20,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Color every token by what the memory changed, and show the stored tokens that did it."""
    common.check_output(html, ".html", ".htm")
    title = "Explained text"
    if text.startswith("@"):
        from ..documents import Corpus

        path = Path(text[1:])
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; expected a file after @")
        title, text = path.name, next(iter(Corpus(path))).text
    common.check_text("text", text)
    encoder, memory, settings = common.open_all(model, datastore, mixture, weight, temperature, k, dtype, device)
    lm = common.behind(endpoint, endpoint_model, top_logprobs, encoder)
    from ..evaluation import explain as explain_text

    explanation = explain_text(lm, text, memory, settings, sources=sources, title=title)
    if html is not None:
        explanation.save(html)
        common.note(f"page written to {html}")
    if json:
        common.emit(explanation.to_dict(), "", True)
    else:
        explanation.print()

"""`memlm compare`: every way to choose λ, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _common as common


def compare(
    model: common.Model,
    datastore: common.Memory,
    valid: Annotated[list[Path], typer.Option(help="Held-out text to fit to; may be given several times.")],
    test: Annotated[list[Path], typer.Option(help="Text to report on; may be given several times.")],
    save: Annotated[
        list[Path] | None, typer.Option(help="Write the result here: .json, .md or .html with plots; several times.")
    ] = None,
    mixtures: Annotated[
        Path | None, typer.Option(help="Folder for the fitted mixtures, for --mixture FOLDER/METHOD.")
    ] = None,
    max_k: Annotated[int | None, typer.Option(help="Most neighbors a token; 1,024, or all, by default.")] = None,
    cache: Annotated[int, typer.Option(min=1, help="Tokens that the continuous cache remembers.")] = 1024,
    max_tokens: common.MaxTokens = 20_000,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Fit fixed λ, λ by distance, learned λ, kNN-Adapter and caches to held-out text; compare them on other text."""
    for path in save or []:
        common.check_output(path, ".json", ".md", ".html", ".htm")
    if mixtures is not None:
        common.check_folder(mixtures)
    from ..datastore import Datastore
    from ..evaluation import compare as measure

    memory = Datastore(datastore)
    max_k = min(1024, len(memory)) if max_k is None else max_k
    common.check_k(max_k, memory)
    lm = common.load_for(memory, model, dtype, device)
    texts = ([str(path) for path in paths] for paths in (valid, test))
    result = measure(lm, memory, *texts, max_k=max_k, cache=cache, max_tokens=max_tokens)
    common.emit(result.to_dict(), str(result), json)  # before anything is written: a full disk must not cost the result
    for path in save or []:
        result.save(path)
        common.note(f"comparison written to {path}")
    if mixtures is not None:
        mixtures.mkdir(parents=True, exist_ok=True)
        for method, mixture in result.mixtures.items():
            mixture.save(mixtures / common.mixture_name(memory, method), [memory.manifest.content_sha256])
        common.note(f"{len(result.mixtures)} mixtures written to {mixtures}")

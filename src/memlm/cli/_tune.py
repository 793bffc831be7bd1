"""`memlm tune`: λ, temperature and k from held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _common as common


def tune(
    model: common.Model,
    datastore: common.Memory,
    text: common.Text,
    save: Annotated[Path | None, typer.Option(help="Write the settings to this file or folder, for --mixture.")] = None,
    mixture: Annotated[
        str, typer.Option(help="knn (one λ), buckets, exponential, logistic, learned, adapter, or auto.")
    ] = "knn",
    max_k: Annotated[int | None, typer.Option(help="Most neighbors a token; 1,024, or all, by default.")] = None,
    max_tokens: common.MaxTokens = 20_000,
    endpoint: common.Endpoint = None,
    endpoint_model: common.EndpointModel = None,
    top_logprobs: common.TopLogprobs = 20,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Choose λ, temperature and k by the likelihood of held-out text, and say whether the memory helps at all."""
    if save is None or not save.is_dir():
        common.check_output(save)
    from ..datastore import Datastore
    from ..evaluation import check_kind, tune_report

    check_kind(mixture)

    memory = Datastore(datastore)
    max_k = min(1024, len(memory)) if max_k is None else max_k
    common.check_k(max_k, memory)
    encoder = common.load_for(memory, model, dtype, device)
    lm = common.behind(endpoint, endpoint_model, top_logprobs, encoder)
    settings = {"kind": mixture, "max_k": max_k, "max_tokens": max_tokens}
    report = tune_report(lm, memory, [str(path) for path in text], **settings)
    common.emit({**report.to_dict(), "grid": report.grid}, report.verdict(), json)
    if save is not None:
        save = save / common.mixture_name(memory, report.mixture.kind) if save.is_dir() else save
        report.mixture.save(save, [memory.manifest.content_sha256])
        common.note(f"settings written to {save}")

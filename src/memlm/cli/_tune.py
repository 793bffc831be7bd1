"""`memlm tune`: λ, temperature and k from held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from . import _common as common


def tune(
    model: common.Model,
    datastore: common.MemoryOrNone,
    text: common.Text,
    save: Annotated[Path | None, typer.Option(help="Write the settings to this file or folder, for --mixture.")] = None,
    mixture: Annotated[
        str,
        typer.Option(
            help="knn (one λ), buckets, exponential, logistic, learned, adapter, auto, spalm, steered, or trime."
        ),
    ] = "knn",
    max_k: Annotated[int | None, typer.Option(help="Most neighbors a token; 1,024, or all, by default.")] = None,
    cache: Annotated[
        int | None, typer.Option(min=0, help="With trime: tokens of the past, 0 for none; 1,024 by default.")
    ] = None,
    max_tokens: common.MaxTokens = 20_000,
    endpoint: common.Endpoint = None,
    endpoint_model: common.EndpointModel = None,
    top_logprobs: common.TopLogprobs = 20,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Choose λ, temperature and k by the likelihood of held-out text, and say whether the memory helps at all."""
    if save is not None and save.is_dir():
        common.check_folder(save)
    else:
        common.check_output(save)
    from ..cache import Cache
    from ..evaluation import check_kind, finite, tune_report
    from ..mixtures import check_place

    if save is not None:
        check_place(save)
    check_kind(mixture)
    if mixture != "trime" and cache is not None:
        raise ConfigError(f"--cache is {cache}, but {mixture} looks at the datastore alone; leave --cache out")
    memory = common.open_memory(datastore)
    if memory is None and (mixture != "trime" or cache == 0):
        raise ConfigError(f"{mixture} has nothing to look at; name a datastore in the place of none")
    if memory is None and save is not None and save.is_dir():
        raise ConfigError(f"{save} is a folder, which holds a mixture for each datastore; name a file")
    memories: list[Any] = [] if memory is None else [memory]
    if mixture == "trime" and cache != 0:
        memories.append(Cache(1024 if cache is None else cache))
    if memory is not None:
        max_k = min(1024, len(memory)) if max_k is None else max_k
        common.check_k(max_k, memory)
    encoder = common.load_for(memory, model, dtype, device)
    lm = common.behind(endpoint, endpoint_model, top_logprobs, encoder)
    settings = {"kind": mixture, "max_k": 1024 if max_k is None else max_k, "max_tokens": max_tokens}
    report = tune_report(lm, memories if mixture == "trime" else memory, [str(path) for path in text], **settings)
    common.emit({**report.to_dict(), "grid": [finite(row) for row in report.grid]}, report.verdict(), json)
    if save is not None:
        if memory is not None and save.is_dir():
            save = save / common.mixture_name(memory, report.mixture.kind)
        report.mixture.save(save, [] if memory is None else [memory.manifest.content_sha256])
        common.note(f"settings written to {save}")

"""`memlm build`: documents → datastore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from ..errors import DatastoreError, IndexError_
from . import _common as common


def build(
    model: common.Model,
    text: common.Text,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the datastore to make.")],
    index: Annotated[str, typer.Option(help="auto, exact, or a FAISS factory string such as IVF1024,SQ8.")] = "auto",
    metric: Annotated[
        str, typer.Option(help="squared-l2, or inner-product for models trained by TRIME.")
    ] = "squared-l2",
    key_dtype: Annotated[str, typer.Option(help="Type in which keys are stored: float16 or bfloat16.")] = "float16",
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    key_site: common.KeySite = None,
    context: common.Context = None,
    stride: common.Stride = None,
    json: common.Json = False,
) -> None:
    """Store every token of some documents: what the model saw before it, and which token it was."""
    from ..datastore import Datastore, Manifest
    from ..documents import Corpus

    if (output / "current.json").exists():
        reached = Manifest.load(output)
        if reached.complete:
            raise DatastoreError(
                f"{output} exists already; `memlm add` adds to it. Otherwise name a new folder, or remove it first"
            )
        common.note(f"{output} holds an unfinished build of {reached.documents:,} documents; going on")

    lm = common.load_model(model, dtype, device, key_site, context, stride)
    corpus = Corpus([str(path) for path in text])
    try:
        metric = metric.replace("-", "_")
        memory = Datastore.build(lm, corpus, output, index=index, metric=metric, key_dtype=key_dtype)
    except IndexError_ as error:
        if (output / "current.json").exists():
            raise IndexError_(
                f"{error}. All entries are stored; the same command with another --index ends it"
            ) from error
        raise
    common.note_left_out(corpus)
    info = memory.info()
    documents, search = common.count(info["documents"], "document"), common.describe_search(info["index"])
    common.emit(
        info,
        f"{output}: {info['entries']:,} entries of {documents}, {decimal(info['bytes'])}, keys from {lm.site.name}, "
        f"search: {search}",
        json,
    )

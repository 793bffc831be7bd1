"""`memlm export` and `memlm import`: a datastore as one Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from ..errors import ConfigError
from ..files import refuse_existing
from . import _common as common


def export(
    datastore: common.Memory,
    file: Annotated[Path, typer.Argument(help="Parquet file to make.", metavar="OUT.parquet")],
    keys: Annotated[bool, typer.Option("--keys", help="Also the keys, so that `memlm import` needs no model.")] = False,
    json: common.Json = False,
) -> None:
    """Write all documents into a Parquet file, a row each: id, text, metadata, token ids; with --keys their keys."""
    from ..datastore import Datastore

    refuse_existing(file)
    common.check_folder(file.parent)
    memory = Datastore(datastore)
    memory.to_parquet(file, keys=keys, show_progress=True)
    size, documents = file.stat().st_size, common.count(memory.manifest.documents, "document")
    common.emit(
        {**common.state(memory), "file": str(file), "keys": keys, "bytes": size},
        f"{file}: {documents} {'with' if keys else 'without'} keys, {decimal(size)}",
        json,
    )


def import_(
    file: Annotated[Path, typer.Argument(help="File that `memlm export` wrote.", metavar="FILE.parquet")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the datastore to make.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model that makes the keys anew: 'reference', a folder, or a name on the hub."),
    ] = None,
    index: Annotated[str, typer.Option(help="auto, exact, or a FAISS factory string such as IVF1024,SQ8.")] = "auto",
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    key_site: common.KeySite = None,
    context: common.Context = None,
    stride: common.Stride = None,
    json: common.Json = False,
) -> None:
    """Make a datastore of an exported one: without a model where the file has keys, else by --model, as `build`."""
    from ..datastore import Datastore, Export

    reached = model is not None and (output / "current.json").exists()  # an unfinished build goes on
    if not reached:
        refuse_existing(output)
    common.check_folder(output.parent)
    exported = Export(file)
    if model is None and not exported.has_keys:
        raise ConfigError(f"{file} has no keys; name the model that is to make them by --model, or export with --keys")
    lm = None if model is None else common.load_model(model, dtype, device, key_site, context, stride)
    memory = Datastore.from_parquet(file, output, lm, index=index)
    info = memory.info()
    documents, search = common.count(info["documents"], "document"), common.describe_search(info["index"])
    common.emit(
        info,
        f"{output}: {info['entries']:,} entries of {documents}, {decimal(info['bytes'])}, keys "
        f"{'as exported' if lm is None else f'from {lm.site.name}'}, search: {search}",
        json,
    )

"""`memlm verify` and `memlm audit`: is everything sound, is a document gone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _common as common


def verify(datastore: common.Memory, json: common.Json = False) -> None:
    """Look for damage in every version that is kept: checksums, structure, documents, a sample of keys. 1 if any."""
    from ..datastore import verify as look

    found = look(datastore, show_progress=True)
    text = "\n".join(f"problem: {item}" for item in found) or f"{datastore}: sound"
    common.emit({"path": str(datastore), "problems": found}, text, json)
    if found:
        raise typer.Exit(1)


def audit(
    datastore: common.Memory,
    document: Annotated[str, typer.Argument(help="Id of the document.", metavar="ID")],
    text: Annotated[
        Path | None, typer.Option(help="File with its text; pieces of it are searched for, too, in every file.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Look for traces of a document in every version and every file of the folder. 1 if there are any."""
    from ..datastore import audit as look
    from ..documents import Corpus

    content = None if text is None else next(iter(Corpus(text))).text
    found = look(datastore, document, content)
    lines = [f"{datastore}: {'traces' if found else 'no trace'} of {document!r}", *(f"  {item}" for item in found)]
    common.emit({"path": str(datastore), "document": document, "traces": found}, "\n".join(lines), json)
    if found:
        raise typer.Exit(1)

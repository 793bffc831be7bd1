"""`memlm overlap`: how much of a text the datastore holds word for word."""

from __future__ import annotations

from typing import Annotated

import typer

from . import _common as common

_LISTED = 10


def overlap(
    model: common.Model,
    datastore: common.Memory,
    text: common.Text,
    n: Annotated[int, typer.Option("--n", help="Tokens an n-gram.")] = 8,
    json: common.Json = False,
) -> None:
    """Measure the share of a text's n-grams that are stored: contamination inflates every gain."""
    from ..datastore import Datastore
    from ..evaluation import overlap as measure

    memory = Datastore(datastore)
    lm = common.load_for(memory, model, "float32", None)
    result = measure(lm, [str(path) for path in text], memory, n=n)
    lines = [f"{100 * result.share:.1f} % of {result.ngrams:,} {n}-grams are stored"]
    lines += [f"  {100 * share:5.1f} %  {name}" for name, share in list(result.documents.items())[:_LISTED]]
    if len(result.documents) > _LISTED:
        lines.append(f"  and {len(result.documents) - _LISTED:,} more documents")
    if result.stored:
        names = ", ".join(result.stored[:_LISTED]) + (", …" if len(result.stored) > _LISTED else "")
        lines.append(f"stored whole: {len(result.stored):,} of the documents ({names})")
    common.emit(result.to_dict(), "\n".join(lines), json)

"""`memlm add` and `memlm update`: more documents in a datastore."""

from __future__ import annotations

from pathlib import Path

from . import _common as common


def add(
    model: common.Model,
    datastore: common.Memory,
    text: common.Text,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Add documents; those that are stored already are left out, and an id with other content is an error."""
    _add(model, datastore, text, dtype, device, json, replace=False)


def update(
    model: common.Model,
    datastore: common.Memory,
    text: common.Text,
    dtype: common.Dtype = "float32",
    device: common.Device = None,
    json: common.Json = False,
) -> None:
    """Add documents, in the place of stored ones with the same ids."""
    _add(model, datastore, text, dtype, device, json, replace=True)


def _add(
    model: str, datastore: Path, text: list[Path], dtype: str, device: str | None, json: bool, *, replace: bool
) -> None:
    from ..datastore import Datastore
    from ..documents import Corpus

    memory = Datastore(datastore)
    lm = common.load_for(memory, model, dtype, device)
    corpus, before = Corpus([str(path) for path in text]), memory.manifest.version
    added, replaced = memory.add(lm, corpus, replace=replace, show_progress=True)
    common.note_left_out(corpus)
    common.emit(
        {"added": added, "replaced": replaced, **common.state(memory)},
        f"{datastore}: {common.count(added, 'document')} added, {replaced:,} in the place of others; "
        f"{common.described_state(memory)}" + ("" if memory.manifest.version > before else " (nothing was new)"),
        json,
    )
    if len(memory.manifest.segments) > 64:
        common.note(f"it has {len(memory.manifest.segments)} segments; `memlm compact {datastore}` joins them")

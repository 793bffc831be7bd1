"""`memlm push` and `memlm pull`: datastores in dataset repositories of a Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from . import _common as common

Repository = Annotated[str, typer.Argument(help="Dataset repository on the hub.", metavar="USER/NAME")]


def push(
    datastore: common.Memory,
    repository: Repository,
    private: Annotated[bool, typer.Option("--private", help="Only who is let in may see the repository.")] = False,
    license: Annotated[str | None, typer.Option(help="Of the documents, such as cc-by-4.0; for the card.")] = None,
    json: common.Json = False,
) -> None:
    """Share a datastore, one version in one commit. It contains its corpus: who gets it can read the documents."""
    from ..sharing import push as send

    done = send(datastore, repository, private=private, license=license, show_progress=True)
    common.emit(
        {"path": str(datastore), "repository": repository, **done._asdict()},
        f"{done.url}: version {done.version} of {datastore}, {common.count(done.files, 'file')}, "
        f"{decimal(done.bytes)}, commit {done.commit[:12]}",
        json,
    )


def pull(
    repository: Repository,
    output: Annotated[Path, typer.Argument(help="Folder of the datastore to make.", metavar="OUT")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the main branch by default.")] = None,
    json: common.Json = False,
) -> None:
    """Get a shared datastore: downloaded beside OUT, verified, and put in its place in one step."""
    from ..files import refuse_existing
    from ..sharing import pull as get

    refuse_existing(output)
    common.check_folder(output.parent)
    memory = get(repository, output, revision=revision, show_progress=True)
    common.emit(
        {"repository": repository, **common.state(memory)},
        f"{output}: {repository}, sound; {common.described_state(memory)}",
        json,
    )

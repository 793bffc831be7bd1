"""Pulling a datastore: the files of a dataset repository become a folder, once all of them are there and sound."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..datastore import Datastore, verify
from ..errors import DatastoreCorrupt, HubError
from ..files import new_folder, refuse_existing, sync_directory, sync_file
from ..progress import progress
from ._client import CARD, DATASTORE_FILES, client, talking

_AT_ONCE = 8


def pull(repository: str, path: str | Path, *, revision: str | None = None, show_progress: bool = False) -> Datastore:
    """Get a datastore from a dataset repository of a Hugging Face hub.

    It is downloaded into a folder beside `path`, verified, and appears at `path` in one step, as files of its own:
    nothing is kept in the hub's cache. On an error nothing is left.

    Args:
        repository: USER/NAME.
        path: Folder to make.
        revision: A branch, a tag or a commit; None takes the main branch.
        show_progress: Show rate and time left on stderr.

    Raises:
        ConfigError: The repository's name cannot be one, or `path` exists.
        DatastoreError: What the repository holds is damaged, or from a newer memlm.
        HubError: The hub cannot be reached, or there is no such repository, revision or datastore in it.
        OSError: The disk is full.
    """
    api = client(repository)
    refuse_existing(Path(path))
    with talking(repository):
        info = api.dataset_info(repository, revision=revision, files_metadata=True)
    files = {item.rfilename: item.size or 0 for item in info.siblings or () if isinstance(item.rfilename, str)}
    files = {name: size for name, size in files.items() if name == CARD or DATASTORE_FILES.fullmatch(name)}
    if "current.json" not in files:
        raise HubError(f"{repository} holds no datastore; `memlm push` puts one there")
    with new_folder(Path(path)) as folder:

        def fetch(name: str) -> int:
            api.hf_hub_download(repository, name, repo_type="dataset", revision=info.sha, local_dir=folder)
            return files[name]

        with (
            talking(repository),
            progress("downloading", sum(files.values()), "bytes", show=show_progress) as advance,
            ThreadPoolExecutor(_AT_ONCE) as pool,
        ):
            for size in pool.map(fetch, files):
                advance(size)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes
        found = verify(folder, show_progress=show_progress)
        if found:
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            reason = found[0].rpartition("; ")[0].replace(str(folder), repository)
            raise DatastoreCorrupt(f"what was downloaded is damaged: {reason}{more}; nothing was kept: pull it again")
        for item in folder.rglob("*"):
            sync_file(item) if item.is_file() else sync_directory(item)
    return Datastore(path, verify=False)

"""Pulling a datastore: the files of a dataset repository become a folder, once all of them are there and sound."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ..datastore import CURRENT, Datastore, Manifest, manifest_name, read_current, verify
from ..errors import DatastoreCorrupt, FormatVersionError, HubError
from ..files import new_folder, refuse_existing, sync_directory, sync_file
from ..progress import progress
from ._client import CARD, client, talking

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi

_AT_ONCE = 8
_LARGEST_MANIFEST = 1 << 26  # bytes: that of a hundred thousand segments
_LARGEST_CARD = 1 << 20


def pull(repository: str, path: str | Path, *, revision: str | None = None, show_progress: bool = False) -> Datastore:
    """Get a datastore from a dataset repository of a Hugging Face hub.

    It is downloaded into a folder beside `path`, verified, and appears at `path` in one step, as files of its own:
    nothing is kept in the hub's cache. On an error nothing is left. What the current version's manifest names is
    downloaded, and the card; nothing else that the repository holds, such as earlier versions.

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
    with new_folder(Path(path)) as folder:
        try:
            _download(api, repository, info, folder, show_progress=show_progress)
            found = verify(folder, show_progress=show_progress)
            if found:
                reason, _, advice = found[0].rpartition("; ")
                raise DatastoreCorrupt(f"{reason}{f', and {len(found) - 1} more' if found[1:] else ''}; {advice}")
        except FormatVersionError as error:
            raise FormatVersionError(str(error).replace(str(folder), repository)) from error
        except DatastoreCorrupt as error:
            reason = str(error).rpartition("; ")[0].replace(str(folder), repository)
            raise DatastoreCorrupt(
                f"what was downloaded is damaged: {reason}; nothing was kept: pull it again"
            ) from error
        for item in folder.rglob("*"):
            sync_file(item) if item.is_file() else sync_directory(item)
    return Datastore(path, verify=False)


def _download(api: HfApi, repository: str, info: DatasetInfo, folder: Path, *, show_progress: bool) -> None:
    """Download the manifest of the current version, and then what it names and the card."""
    listed = {item.rfilename: item.size or 0 for item in info.siblings or ()}

    def fetch(name: str) -> int:
        api.hf_hub_download(repository, name, repo_type="dataset", revision=info.sha, local_dir=folder)
        return listed[name]

    def fetch_small(name: str) -> None:
        if not listed.get(name, 0) < _LARGEST_MANIFEST:
            raise DatastoreCorrupt(f"{name} has {listed[name]} bytes, too many for a manifest; push it again")
        with talking(repository):
            fetch(name)

    if CURRENT not in listed:
        raise HubError(f"{repository} holds no datastore; `memlm push` puts one there")
    fetch_small(CURRENT)
    named = manifest_name(read_current(folder)["version"])
    if named in listed:  # its absence is told by who reads it
        fetch_small(named)
    manifest = Manifest.load(folder)
    files = manifest.files
    for name, size in files.items():
        if listed.get(name) != size:
            raise DatastoreCorrupt(f"{name} has {listed.get(name, 'no')} bytes; expected {size}; push it again")
    if listed.get(CARD, _LARGEST_CARD) < _LARGEST_CARD:
        files[CARD] = listed[CARD]
    with (
        talking(repository),
        progress("downloading", sum(files.values()), "bytes", show=show_progress) as advance,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        for size in pool.map(fetch, files):
            advance(size)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's notes
    if manifest.parent is not None:  # a whole folder was put there by hand; its earlier versions stay there
        manifest.alone().publish(folder)

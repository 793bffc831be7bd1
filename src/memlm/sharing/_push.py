"""Pushing a datastore: one version of it becomes one commit of a dataset repository."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from ..datastore import Datastore, Manifest
from ..errors import DatastoreError, HubError
from ..progress import progress
from ._card import card, check_license
from ._client import CARD, DATASTORE_FILES, client, talking


class Pushed(NamedTuple):
    """What a push made.

    Attributes:
        url: Of the repository.
        commit: Its new commit, 40 hexadecimal digits.
        version: Of the datastore.
        files: Number of files of the datastore.
        bytes: Their size.
    """

    url: str
    commit: str
    version: int
    files: int
    bytes: int


def push(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    license: str | None = None,
    show_progress: bool = False,
) -> Pushed:
    """Put the current version of a datastore into a dataset repository of a Hugging Face hub, in one commit.

    A datastore contains its corpus: whoever may read the repository can read the documents. The repository is made if
    it is not there. What it held of another version leaves it in the same commit, but stays in its history. A card
    (README.md) says what it is.

    Args:
        path: Folder of the datastore; it is only read, and checked before.
        repository: USER/NAME.
        private: Only who is let in may see it; a repository that is there and public is refused.
        license: Of the documents, as hubs name them, such as "cc-by-4.0"; None says nothing of it.
        show_progress: Show rate and time left on stderr.

    Raises:
        ConfigError: The repository's or the license's name cannot be one.
        DatastoreError: There is none, it is damaged or unfinished, or holds removed documents.
        HubError: The hub cannot be reached, or refuses.
    """
    api = client(repository)
    if license is not None:
        check_license(license)
    manifest = Datastore(path).manifest
    check_whole(Path(path), manifest)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with TemporaryDirectory() as folder, talking(repository):
        alone = manifest.alone()
        alone.publish(Path(folder))
        files = {item.name: item for item in Path(folder).iterdir()}
        files |= {name: Path(path) / name for name in alone.files}
        size = sum(file.stat().st_size for file in files.values())
        url = api.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
        before = api.dataset_info(repository)
        if private and not before.private:
            raise HubError(f"{repository} is there, and public; make it private on its page, or name another one")
        names = [item.rfilename for item in before.siblings or ()]
        gone = [name for name in names if DATASTORE_FILES.fullmatch(name) and name not in files]
        additions = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        with progress("uploading", size, "bytes", show=show_progress) as advance:
            for addition in additions:
                # one by one, for the sake of progress; content stays, for what the hub takes in the commit itself
                api.preupload_lfs_files(repository, [addition], repo_type="dataset", free_memory=False)
                advance(addition.upload_info.size)
        commit = api.create_commit(
            repository,
            [
                CommitOperationAdd(CARD, card(alone, repository, license).encode()),
                *additions,
                *(CommitOperationDelete(name, is_folder=False) for name in gone),
            ],
            commit_message=f"Version {manifest.version} of a datastore",
            repo_type="dataset",
            parent_commit=before.sha,
        )
        return Pushed(str(url), commit.oid, manifest.version, len(files), size)


def check_whole(path: Path, manifest: Manifest) -> None:
    """Raise DatastoreError where the files hold more, or the datastore less, than whoever gets them should get."""
    if not manifest.complete:
        raise DatastoreError(f"{path} is unfinished; run the same build again, which goes on, and push then")
    removed = sum(int(part.deleted.sum()) for part in manifest.segments)
    if removed:
        raise DatastoreError(
            f"{path} still has the text of {removed:,} removed document{'s' if removed > 1 else ''} on the disk, which "
            f"would be shared, too; `memlm compact {path}` takes it off"
        )

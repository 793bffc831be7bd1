"""The hub's client: what it raises becomes one line, what it prints is left to memlm's own progress."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ConfigError, HubError, MemlmError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What of a repository belongs to a datastore: no name in it can lead out of a folder.
DATASTORE_FILES = re.compile(
    r"current\.json|manifest-\d{6,}\.json|(segments|index|codec)/[0-9a-z-]+/[0-9a-z]+\.[0-9a-z]+", re.ASCII
)
CARD = "README.md"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def client(repository: str) -> HfApi:
    """Return the hub's client, with endpoint and token as it takes them: HF_ENDPOINT, HF_TOKEN, `hf auth login`.

    Raises:
        ConfigError: The repository's name cannot be one.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from .. import __version__

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"the repository is {repository!r}; expected USER/NAME ({error})") from error
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"the repository is {repository!r}; expected USER/NAME")
    return HfApi(library_name="memlm", library_version=__version__)


@contextmanager
def talking(repository: str) -> Iterator[None]:
    """Turn what the client raises within the block into HubError, and keep its bars and notes off stderr."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    quiet, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    except MemlmError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine: a full disk, say
        raise HubError(_reason(error, repository)) from error
    except Exception as error:
        from huggingface_hub.errors import HTTPError

        if not isinstance(error, HTTPError):
            raise
        raise HubError(_reason(error, repository)) from error
    finally:
        logging.set_verbosity(verbosity)
        if not quiet:
            enable_progress_bars()


def _reason(error: BaseException, repository: str) -> str:
    """Return what the client's error means for who asked for a repository."""
    from huggingface_hub import constants, errors

    while isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__  # what it was that made the client look elsewhere
    log_in = "log in by `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repository} cannot be reached in offline mode; unset HF_HUB_OFFLINE"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no such revision; expected a branch, a tag or a commit"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is open to those alone whom its owner lets in; ask for access on its page, and {log_in}"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return f"{repository} is no dataset repository that you may see ({status}); check the name, or {log_in}"
        if status == 401:
            return f"the hub knows no such user (401); {log_in}"
        if status == 403:
            return f"{repository} may not be changed or read with this token (403); use one that may"
        said = f": {error.server_message}" if error.server_message else ""
        return f"the hub answered {status} for {repository}{said}; try again"
    if isinstance(error, errors.HTTPError):
        reason = f"{type(error).__name__}: {error}"
        return f"the hub at {constants.ENDPOINT} cannot be reached ({reason}); check the network and HF_ENDPOINT"
    reason = f"{type(error).__name__}: {error}"
    return f"the hub at {constants.ENDPOINT} answered something else than expected ({reason}); try again"

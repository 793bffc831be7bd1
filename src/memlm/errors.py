"""Every error that memlm raises on purpose.

MemlmError
├── ConfigError            a setting has a value that cannot work (also a ValueError)
├── ShapeError             tensors that do not fit together (also a ValueError)
├── CorpusError            text that cannot be read, or no text at all
├── ModelError             a model or tokenizer that cannot be loaded or used
│   ├── UnsupportedArchitecture   no key site was found in the model
│   └── EndpointError      a model behind an endpoint that cannot be reached, or answers something else
├── HubError               a repository on a hub that cannot be reached, read or written
└── DatastoreError         a datastore that cannot be opened or used
    ├── DatastoreMismatch  it was built with another model, tokenizer, key site or metric
    ├── DatastoreCorrupt   its files are damaged or unsafe
    ├── FormatVersionError it was written by a newer memlm
    ├── KeyOverflow        keys are not finite, as computed or in the stored type
    └── IndexError_        a search index that is missing or unusable

Each message says what was wrong with the value, what was expected, and what to do. The command line prints it as one
line and exits with code 2.
"""


class MemlmError(Exception):
    """Base of every error below."""


class ConfigError(MemlmError, ValueError):
    """A setting has a value that cannot work."""


class ShapeError(MemlmError, ValueError):
    """Tensors have shapes that do not fit together."""


class CorpusError(MemlmError):
    """Text could not be read, or there was none."""


class ModelError(MemlmError):
    """A model or tokenizer could not be loaded or used."""


class UnsupportedArchitecture(ModelError):
    """No key site was found in the model."""


class EndpointError(ModelError):
    """A model behind an endpoint could not be reached, or did not answer as it should."""


class HubError(MemlmError):
    """A repository on a hub could not be reached, or may not be read or written."""


class DatastoreError(MemlmError):
    """A datastore could not be opened or used."""


class DatastoreMismatch(DatastoreError):
    """A datastore was built with another model, tokenizer or key site, or is searched by another metric."""


class DatastoreCorrupt(DatastoreError):
    """Files of a datastore are damaged or unsafe to read."""


class FormatVersionError(DatastoreError):
    """A datastore was written by a newer memlm."""


class KeyOverflow(DatastoreError):
    """Keys are not finite, as computed or in the type in which they are stored."""


class IndexError_(DatastoreError):
    """A search index is missing, damaged or cannot be built."""

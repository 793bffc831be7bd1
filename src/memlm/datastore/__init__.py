"""The datastore: entries and documents on disk."""

from ._change import rollback_to as rollback_to
from ._datastore import Datastore as Datastore
from ._datastore import compact as compact
from ._import import Export as Export
from ._manifest import CURRENT as CURRENT
from ._manifest import FORMAT_VERSION as FORMAT_VERSION
from ._manifest import Manifest as Manifest
from ._manifest import manifest_name as manifest_name
from ._manifest import read_current as read_current
from ._pointers import Pointed as Pointed
from ._pointers import Pointers as Pointers
from ._pointers import follow as follow
from ._verify import audit as audit
from ._verify import verify as verify
from ._version import Provenance as Provenance
from ._version import Version as Version

__all__ = [
    "CURRENT",
    "FORMAT_VERSION",
    "Datastore",
    "Export",
    "Manifest",
    "Pointed",
    "Pointers",
    "Provenance",
    "Version",
    "audit",
    "compact",
    "follow",
    "manifest_name",
    "read_current",
    "rollback_to",
    "verify",
]

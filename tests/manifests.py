"""The manifest of a datastore's current version, to read and to forge."""

import hashlib
import json


def current(folder):
    """Return the file of the current version."""
    version = json.loads((folder / "current.json").read_text())["version"]
    return folder / f"manifest-{version:06d}.json"


def forge(folder, content):
    """Replace the current version's manifest, with checksums that fit."""
    content = {name: value for name, value in content.items() if name != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    file = current(folder)
    file.write_text(json.dumps({**content, "sha256": digest}) + "\n")
    version = int(file.stem.removeprefix("manifest-"))
    (folder / "current.json").write_text(json.dumps({"version": version, "sha256": digest}) + "\n")

"""The card of a datastore that is shared."""

from __future__ import annotations

import re

from ..datastore import Manifest
from ..errors import ConfigError
from ..text import printable

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*", re.ASCII)


def check_license(name: str) -> None:
    """Raise ConfigError unless a license is named as hubs name them."""
    if not _LICENSE.fullmatch(name):
        raise ConfigError(f"the license is {name!r}; expected an identifier such as cc-by-4.0, mit or other")


def card(manifest: Manifest, repository: str, license: str | None) -> str:
    """Return the card of a datastore, in Markdown with a YAML head.

    Args:
        manifest: Of the version.
        repository: USER/NAME.
        license: Of the documents; None if it is not known.
    """
    encoder, site, windows, keys = manifest.encoder, manifest.encoder["key_site"], manifest.windows, manifest.keys
    index = {"kind": "exact"} if manifest.index is None else manifest.index.details
    rows = {
        "entries": f"{manifest.entries:,}",
        "documents": f"{manifest.documents:,}",
        "license of the documents": license or "not stated",
        "encoder": f"{encoder['name']} ({encoder['architecture']}), fingerprint {encoder['sha256'][:12]}",
        "tokenizer": f"{manifest.tokenizer['vocab_size']:,} tokens, fingerprint {manifest.tokenizer['sha256'][:12]}",
        "keys": f"{site['name']} ({site['path']}, {site['tensor']}), {keys['width']} × {keys['dtype']}",
        "windows": f"{windows['stride']} tokens after {windows['context']} of context",
        "metric": manifest.metric.replace("_", " "),
        "search": index.get("factory", index["kind"]),
        "made": f"{manifest.created}, version {manifest.version}, by {manifest.created_by}",
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    head = "" if license is None else f"license: {license}\n"
    return f"""---
{head}tags:
- memlm
- knn-lm
viewer: false
---
# A datastore: memory for a language model outside its weights

**A datastore contains its corpus.** Whoever gets it can read the documents: their whole text is in it, and where the
tokens of every key stand in it.

| | |
|---|---|
{table}

It is bound to the encoder and the tokenizer above: another model is refused.

```
memlm pull {repository} memory/
memlm info memory/
```

Made by `memlm push`.
"""


def _cell(text: str) -> str:
    """Return text that stays within a cell of a table and means nothing in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(printable(text).split()))

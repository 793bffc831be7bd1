"""An encoder without a model: keys are drawn at random, so that tests of datastores can say what they are."""

from typing import NamedTuple

import numpy as np
import torch

from memlm import Document


class Tokenized(NamedTuple):
    document: Document
    ids: np.ndarray
    spans: np.ndarray


class FakeEncoder:
    """Every character is a token, its code point the id; a start token comes first.

    Args:
        width: Numbers in a key.
        vocab_size: As the manifest will say.
        scale: Of the keys.
        change: Called with (number of the batch, keys) for every batch; returns the keys to yield.
    """

    def __init__(self, width=8, vocab_size=1 << 21, scale=1.0, change=None):
        self.key_width = width
        self.scale = scale
        self.change = change or (lambda number, keys: keys)
        self.batches = 0
        self.identity = {
            "encoder": {
                "name": "fake",
                "architecture": "Fake",
                "sha256": "0" * 64,
                "dtype": "float32",
                "key_site": {"name": "last_ffn_input", "path": "mlp", "tensor": "input"},
            },
            "tokenizer": {"sha256": "1" * 64, "vocab_size": vocab_size, "start": 0, "end": None},
            "windows": {"context": 1, "stride": 1},
        }

    def tokenize(self, document):
        ids = np.array([0, *map(ord, document.text)], np.int64)
        ends = np.arange(len(ids))
        return Tokenized(document, ids, np.stack([np.maximum(ends - 1, 0), ends], axis=1).astype(np.uint32))

    def keys(self, sequences):
        """Yield keys in batches of ten, in a mixed order; the key of an entry depends on the tokens up to it."""
        keys, row = [], 0
        for ids in sequences:
            for stop in range(1, len(ids)):
                generator = np.random.default_rng([*ids[max(0, stop - 3) : stop], stop])
                keys.append((row, generator.normal(size=self.key_width) * self.scale))
                row += 1
        order = np.random.default_rng(0).permutation(len(keys))
        for start in range(0, len(keys), 10):
            rows = order[start : start + 10]
            batch = torch.tensor(np.array([keys[row][1] for row in rows]), dtype=torch.float32)
            self.batches += 1
            yield torch.from_numpy(rows), self.change(self.batches, batch)


def random_documents(count=6, length=100, seed=0):
    """Return documents of random letters, a few words long."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefgh "))
    return [Document(id=f"d{number}", text="x" + "".join(generator.choice(letters, length))) for number in range(count)]

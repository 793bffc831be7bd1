"""A language of two kinds of text: facts "name name answer", other in each document, sentences of a Markov chain."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._sizes import Sizes

START = 0
_BRANCHES = 4  # words that may follow a word


class Language:
    """Draws text; the chain of words is the same for every seed.

    Args:
        sizes: How many symbols there are.
        seed: Of what is drawn, and of which names are left for the test.
        use: What it is drawn for; others draw other text.
    """

    def __init__(self, sizes: Sizes, seed: int, use: int) -> None:
        self.sizes = sizes
        self.generator = np.random.default_rng((seed, use))
        chain = np.random.default_rng(0)
        self._next = np.stack([chain.permutation(sizes.words)[:_BRANCHES] for _ in range(sizes.words)])
        keys = np.random.default_rng(seed).permutation(sizes.names**2)
        self.known, self.unseen = keys[: len(keys) // 2], keys[len(keys) // 2 :]  # for the reader

    def name(self, keys: np.ndarray) -> np.ndarray:
        """Return the two tokens of each key, shape (n, 2)."""
        names = self.sizes.names
        return np.stack([1 + keys // names, 1 + names + keys % names], axis=1)

    def answer(self, count: int) -> np.ndarray:
        """Draw answers, shape (count,)."""
        return 1 + 2 * self.sizes.names + self.generator.integers(self.sizes.answers, size=count)

    def sentences(self, count: int, length: int) -> np.ndarray:
        """Draw text without facts, shape (count, length)."""
        words = np.empty((count, length), np.int64)
        words[:, 0] = self.generator.integers(self.sizes.words, size=count)
        for place in range(1, length):
            choice = np.minimum(self.generator.geometric(0.5, size=count) - 1, _BRANCHES - 1)
            words[:, place] = self._next[words[:, place - 1], choice]
        return words + 1 + 2 * self.sizes.names + self.sizes.answers

    def documents(self, count: int) -> Tensor:
        """Draw documents for the model, half of them of facts that come again and again; shape (count, length)."""
        length = self.sizes.length
        made = np.full((count, length), START, np.int64)
        made[::2, 1:] = self.sentences(len(made[::2]), length - 1)
        for document in made[1::2]:
            keys = self.generator.choice(self.sizes.names**2, size=max(2, length // 8), replace=False)
            answers = self.answer(len(keys))
            chosen = self.generator.integers(len(keys), size=length // 3 + 1)
            facts = np.concatenate([self.name(keys[chosen]), answers[chosen][:, None]], axis=1)
            document[1:] = facts.flatten()[: length - 1]
        return torch.from_numpy(made)

    def text(self, count: int) -> Tensor:
        """Draw documents without facts, shape (count, length)."""
        words = self.sentences(count, self.sizes.length - 1)
        return torch.from_numpy(np.concatenate([np.full((count, 1), START), words], axis=1))

    def fact(self, key: int, answer: int) -> list[int]:
        """Return the tokens of a fact, as it is written."""
        return [START, *self.name(np.array([key]))[0].tolist(), int(answer)]

    def question(self, key: int, answer: int) -> list[int]:
        """Return a question, the answer at its end: the name comes after some words."""
        words = self.sentences(1, int(self.generator.integers(2, 9)))[0]
        return [START, *words.tolist(), *self.fact(key, answer)[1:]]

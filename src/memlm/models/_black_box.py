"""A black box: a model behind an endpoint, of which nothing but log-probabilities is known, with another one's keys.

A small encoder on this machine makes the keys of datastore and queries; the endpoint says p_LM. So kNN-LM, and the
kNN-Adapter that is made for this (Huang et al. 2023, arXiv:2302.10879), work with models that show no hidden states.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..documents import Document
from ..errors import ConfigError, ModelError
from ..evidence import Belief, OutputEmbedding
from ._echo import Echo
from ._endpoint import Endpoint
from ._language_model import LanguageModel, ScoredBatch
from ._token_names import UNKNOWN, TokenNames
from ._windows import TokenizedDocument, WindowBatch, WindowScheme, batch_windows

_ROUNDING = 1e-3  # by which a log-probability may be off
_ENTRIES = 1 << 20  # alternatives in one answer, about: some 30 MB of JSON


class BlackBox:
    """A model behind an OpenAI-compatible completions endpoint, in the place of a `LanguageModel`.

    It can be evaluated, tuned and explained, but nothing can be attached to it. Datastores are bound to the encoder.

    The belief that mixtures see is made of the `top` most likely tokens. By the *rest-bucket rule* all other tokens
    count as one outcome in the entropy, with the probability that remains: it is then never too high, and exact where
    `top` covers the vocabulary. A target outside the top is in the rest, too, though its probability is known: λ must
    not depend on the token that it is to predict. Logits stay unknown, and their normalizer is NaN; the mixture that
    needs it, one softmax with a cache, refuses a black box.

    Tokens are sent as ids. Servers that return them as "token_id:17" (vLLM) are understood best. Others name them by
    text: by the vocabulary's own string or the decoded one. A name that several tokens share, such as "�" for a part of
    a character, tells no id, and which of their numbers it carries may depend on the target; see `likeliest`.

    Args:
        url: Base of the API, such as http://localhost:8000/v1.
        model: Name of the model there; its tokenizer must be the encoder's.
        encoder: Makes the keys; its windows are the endpoint's, so that both see the same left context. The server must
            take `context` + `stride` + 1 tokens.
        top: Most likely tokens asked for; servers have limits (vLLM: `--max-logprobs`, 20 by default).
        api_key: None takes the environment's OPENAI_API_KEY, if there is one.
        timeout: Seconds to wait for the server, each time.
        retries: Further attempts after 429, 5xx, time-outs and broken connections.

    Raises:
        ConfigError: The URL or a number cannot work.
    """

    def __init__(
        self,
        url: str,
        model: str,
        encoder: LanguageModel,
        *,
        top: int = 20,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
    ) -> None:
        if type(top) is not int or not 1 <= top <= _ENTRIES:
            raise ConfigError(
                f"top is {reprlib.repr(top)}; expected a whole number of log-probabilities a token, 1 to {_ENTRIES:,}"
            )
        self.endpoint = Endpoint(url, model, api_key, timeout, retries)
        self.encoder = encoder
        self.name = model
        self.top = top
        self.tokenizer: Any = encoder.tokenizer
        self._names = TokenNames(encoder.tokenizer)

    @property
    def windows(self) -> WindowScheme:
        """The encoder's."""
        return self.encoder.windows

    @property
    def device(self) -> torch.device:
        """The encoder's."""
        return self.encoder.device

    @property
    def identity(self) -> dict[str, Any]:
        """The encoder's: a datastore is bound to what makes its keys."""
        return self.encoder.identity

    def tokenize(self, document: Document) -> TokenizedDocument:
        """Return a document's token ids and where they stand in its text."""
        return self.encoder.tokenize(document)

    @property
    def output(self) -> OutputEmbedding:
        """Not known of a black box.

        Raises:
            ModelError: Always.
        """
        raise self._shows_no_states()

    def score(
        self, sequences: Iterable[np.ndarray], *, beliefs: bool = False, hidden: bool = False
    ) -> Iterator[ScoredBatch]:
        """Ask for log p_LM of every target of some token sequences, and compute the encoder's keys.

        Args:
            sequences: Token ids of documents, each int64 of shape (length,).
            beliefs: Ask for the most likely tokens, too.
            hidden: Refused, as `output` is.

        Raises:
            EndpointError: The endpoint cannot be reached, refuses, or does not answer as it should.
        """
        if hidden:
            raise self._shows_no_states()
        kept, encoder = list(sequences), self.encoder
        # the encoder cuts by the same rule, so that its batches have the same rows
        batches = batch_windows(kept, encoder.windows, encoder.batch_tokens)
        for batch, (_, keys) in zip(batches, encoder.keys(kept), strict=True):
            echoes = self._ask(_prompts(batch), self.top if beliefs else 0)
            lines = [(line.nonzero().squeeze(1) + 1).tolist() for line in batch.scored]  # places in the prompts
            places = [(echo, place) for echo, line in zip(echoes, lines, strict=True) for place in line]
            log_probs = torch.tensor([echo.log_probs[place] for echo, place in places], dtype=torch.float32)
            belief = None
            if beliefs:
                known = [
                    likeliest(echo.top[place], echo.tokens[place], self._names, self.top) for echo, place in places
                ]
                confidence, entropy = rest_bucket([list(ids.values()) for ids in known], self.top)
                belief = Belief(
                    keys=keys.float().cpu(),
                    last=batch.input_ids[batch.scored],
                    top=torch.tensor([max(ids, key=ids.__getitem__, default=UNKNOWN) for ids in known]),
                    confidence=torch.from_numpy(confidence).float(),
                    entropy=torch.from_numpy(entropy).float(),
                    normalizer=torch.full((len(known),), torch.nan),
                )
            yield ScoredBatch(batch.rows, batch.targets, log_probs, keys, belief)

    def _shows_no_states(self) -> ModelError:
        return ModelError(
            f"this mixture changes the model's last hidden state, and {self.name} is behind an endpoint, which shows "
            "none; use a mixture of probabilities, such as adapter"
        )

    def _ask(self, prompts: list[list[int]], top: int) -> list[Echo]:
        """Send several windows a request, as many as an answer can hold."""
        together = max(1, _ENTRIES // (max(1, top) * len(prompts[0])))
        echoes = []
        for start in range(0, len(prompts), together):
            echoes += self.endpoint.echo(prompts[start : start + together], top, self._names)
        return echoes

    def __repr__(self) -> str:
        return f"BlackBox({self.endpoint.url!r}, {self.name!r}, keys from {self.encoder.name!r})"


def likeliest(told: dict[str, float], target: str, names: TokenNames, top: int) -> dict[int, float]:
    """Return what is known of the most likely tokens, whatever the target is: λ is made of it.

    A server tells its `top` most likely tokens and the target. Where each has a name of its own, these are known, and
    the target is left out if it is one more. Names that several tokens share hide tokens: then it cannot be told
    whether the target is among the most likely, nor whose number such a name carries. What is certain all the same are
    tokens of unique name that are more likely than 1 / (top + 1), because those outside the top are not.

    Args:
        told: Log-probabilities by name.
        target: Name of the target.
        names: The encoder's names.
        top: Tokens asked for.

    Returns:
        Log-probabilities by id, at most `top`; none where nothing is certain.
    """
    rest = dict(told)
    if len(rest) > top and rest.get(target, math.inf) <= min(rest.values()):
        del rest[target]
    known = {names[name]: value for name, value in rest.items()}
    if UNKNOWN not in known:
        return dict(sorted(known.items(), key=lambda item: -item[1])[:top])
    everything = top >= len(names.tokenizer)  # no token is outside
    least = -math.inf if everything else -math.log(top + 1) + _ROUNDING
    return {number: value for number, value in known.items() if number != UNKNOWN and value > least}


def rest_bucket(log_probs: list[list[float]], top: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return confidence and entropy, in nats, of distributions of which only the likeliest outcomes are known.

    All that is not among the `top` likeliest counts as one outcome.

    Args:
        log_probs: One list a row, in any order.
        top: Outcomes that count by themselves.

    Returns:
        Log-probability of the likeliest outcome and −Σ p log p, float64, shape (rows,) each. Of a row without numbers
        the former is log(1 / (top + 1)), the most that an outcome outside the top can have.
    """
    kept = [sorted(row, reverse=True)[:top] for row in log_probs]
    table = np.full((len(kept), max([1, *map(len, kept)])), -np.inf)
    for line, row in zip(table, kept, strict=True):
        line[: len(row)] = row
    rest = np.clip(1 - np.exp(table).sum(axis=1, keepdims=True), 0, None)
    probs = np.concatenate([np.exp(table), rest], axis=1)
    confidence = np.where(np.isinf(table[:, 0]), -math.log(top + 1), table[:, 0])
    return confidence, -(probs * np.log(np.where(probs > 0, probs, 1))).sum(axis=1)


def _prompts(batch: WindowBatch) -> list[list[int]]:
    """Return the token ids of every window, its last target included."""
    last = batch.scored.sum(dim=1).cumsum(dim=0) - 1  # number of each window's last target
    lengths = [int(line.nonzero()[-1]) + 1 for line in batch.scored]
    ends = batch.targets[last].tolist()
    return [[*ids[:length].tolist(), end] for ids, length, end in zip(batch.input_ids, lengths, ends, strict=True)]

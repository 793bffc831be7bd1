"""A causal language model with its tokenizer, its key site and its windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..documents import Document
from ..errors import ModelError
from ..evidence import Belief, OutputEmbedding
from ._capture import capture, check_key_site, forward_to_site, keys_of
from ._identity import encoder_fingerprint, tokenizer_fingerprint
from ._layers import find_decoder
from ._output import capture_hidden, output_embedding
from ._sites import KeySite, find_key_site
from ._windows import TokenizedDocument, WindowScheme, batch_windows, tokenize

_LOGITS_BUDGET = {"cpu": 1 << 25}  # bytes of float32 logits alive at once: on a CPU, about what its caches hold


class ScoredBatch(NamedTuple):
    """What one forward pass tells about some targets.

    Attributes:
        rows: Int64, shape (n,): number of each target within the documents given.
        targets: Int64, shape (n,).
        log_probs: log p_LM of the targets, float32, shape (n,).
        keys: What the model saw before each target, shape (n, key width), in the model's type.
        belief: What it thinks there, if that was asked for: on the CPU, with the keys as float32.
    """

    rows: Tensor
    targets: Tensor
    log_probs: Tensor
    keys: Tensor
    belief: Belief | None = None


class Scorer(Protocol):
    """What evaluation needs of a model: a `LanguageModel` or a `BlackBox`."""

    name: str
    tokenizer: Any

    @property
    def windows(self) -> WindowScheme:
        """How documents are cut."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What a datastore with such keys is bound to."""
        ...

    def tokenize(self, document: Document) -> TokenizedDocument:
        """Return a document's token ids and where they stand in its text."""
        ...

    @property
    def output(self) -> OutputEmbedding:
        """Its last layer."""
        ...

    def score(
        self, sequences: Iterable[np.ndarray], *, beliefs: bool = False, hidden: bool = False
    ) -> Iterator[ScoredBatch]:
        """Yield log p_LM and key of every target, and what the model believes."""
        ...


class LanguageModel:
    """Any Hugging Face causal LM, as memlm uses it.

    Args:
        model: The model, in evaluation mode; it is not changed, but for a note of the key site, for `attach`.
        tokenizer: Its fast tokenizer.
        name: What to call it in messages and manifests.
        key_site: See `find_key_site`.
        context: Tokens of left context a window; None means a quarter of what the model takes, at most 256.
        stride: Targets a window; None means what remains of the model's length, up to 1,024 tokens in all.
        batch_tokens: Input tokens a forward pass.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        key_site: str | None = None,
        context: int | None = None,
        stride: int | None = None,
        batch_tokens: int = 2048,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.site: KeySite = find_key_site(model, key_site)
        model._memlm_site = self.site  # where `attach`, which sees the model alone, lets a cache read keys
        self.positions = _positions(model)
        width = min(1024, self.positions)
        context = width // 4 if context is None else context
        if stride is None and context >= width:
            raise ModelError(
                f"context {context} leaves no room for a stride in {width} positions; lower it, or give both"
            )
        self.windows = WindowScheme(context, width - context if stride is None else stride)
        if self.windows.context + self.windows.stride - 1 > self.positions:
            raise ModelError(
                f"context {self.windows.context} + stride {self.windows.stride} is longer than the {self.positions} "
                f"positions of {name}; lower one of them"
            )
        self.batch_tokens = batch_tokens
        check_key_site(model, self.site)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a datastore made by this model is bound to; see the datastore's format, "encoder" and "tokenizer"."""
        dtype = str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
        return {
            "encoder": {
                "name": self.name,
                "architecture": type(self.model).__name__,
                "sha256": encoder_fingerprint(find_decoder(self.model)),
                "dtype": dtype,
                "key_site": {"name": self.site.name, "path": self.site.path, "tensor": self.site.tensor},
            },
            "tokenizer": {
                "sha256": tokenizer_fingerprint(self.tokenizer),
                "vocab_size": max(len(self.tokenizer), self.model.get_input_embeddings().weight.shape[0]),
                "start": self.tokenizer.bos_token_id,
                "end": self.tokenizer.eos_token_id,
            },
            "windows": {"context": self.windows.context, "stride": self.windows.stride},
        }

    @cached_property
    def key_width(self) -> int:
        """Numbers in a key."""
        return forward_to_site(self.model, self.site, torch.zeros((1, 2), dtype=torch.long, device=self.device)).shape[
            -1
        ]

    def tokenize(self, document: Document) -> TokenizedDocument:
        """Return a document's token ids and where they stand in its text."""
        return tokenize(self.tokenizer, document)

    def keys(self, sequences: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute the key of every target of some token sequences, without logits.

        Yields:
            (rows, keys): row numbers among all targets, int64 (n,), and keys (n, key width), in no given order.
        """
        self._check_mode()
        for batch in batch_windows(sequences, self.windows, self.batch_tokens):
            keys = forward_to_site(self.model, self.site, batch.input_ids.to(self.device))
            yield batch.rows, keys[batch.scored.to(keys.device)]

    @cached_property
    def output(self) -> OutputEmbedding:
        """The last layer, which makes logits of hidden states.

        Raises:
            ModelError: It does more than that; see `output_embedding`.
        """
        return output_embedding(self.model)

    def score(
        self, sequences: Iterable[np.ndarray], *, beliefs: bool = False, hidden: bool = False
    ) -> Iterator[ScoredBatch]:
        """Compute log p_LM of every target of some token sequences, and the keys, in one pass.

        Logits exist only for the positions that are scored, of one window, or of so many as fit a fixed budget.

        Args:
            sequences: Token ids of documents, each int64 of shape (length,).
            beliefs: Tell the model's beliefs, too; that costs another look at the logits.
            hidden: In them, tell what the output embedding reads.
        """
        self._check_mode()
        vocabulary = self.identity["tokenizer"]["vocab_size"]
        budget = _LOGITS_BUDGET.get(self.device.type, 1 << 28)
        tokens = max(1, min(self.batch_tokens, budget // (4 * vocabulary)))
        for batch in batch_windows(sequences, self.windows, tokens):
            scored = batch.scored.to(self.device)
            kept = scored.any(dim=0).nonzero().squeeze(1)  # positions that any window of the batch scores
            with (
                torch.no_grad(),
                capture(self.model, self.site) as captured,
                capture_hidden(self.model, hidden) as last,
            ):
                output = self.model(
                    input_ids=batch.input_ids.to(self.device), use_cache=False, logits_to_keep=kept, return_dict=True
                )
                keys = keys_of(captured, self.site, *batch.input_ids.shape)
            labels = torch.full(scored.shape, -100, device=scored.device)
            labels[scored] = batch.targets.to(scored.device)
            log_probs = torch.cat(
                [_target_log_probs(*window) for window in zip(output.logits, labels[:, kept], strict=True)]
            )
            belief = None
            if beliefs:
                at_scored = output.logits[scored[:, kept]].float()
                found = Belief.from_logits(at_scored, keys[scored].float(), batch.input_ids[batch.scored])
                belief = Belief(*(part.cpu() for part in found if part is not None))
                if hidden:
                    belief = belief._replace(hidden=last.states()[scored[:, kept]].float().cpu())
            yield ScoredBatch(batch.rows, batch.targets, log_probs.cpu(), keys[scored], belief)

    def _check_mode(self) -> None:
        if self.model.training:
            raise ModelError(
                f"{self.name} is in training mode, where dropout changes its keys; call model.eval() first"
            )

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, keys from {self.site.path} {self.site.tensor})"


def _target_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p of every label that is none of the ignored, from one window's logits (length, vocabulary)."""
    losses = torch.nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="none")
    return -losses[labels.to(losses.device) != -100]


def _positions(model: Any) -> int:
    """Longest input that the model's positions allow; relative and rotary models say it in their config too."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return 2048  # ALiBi models name no limit

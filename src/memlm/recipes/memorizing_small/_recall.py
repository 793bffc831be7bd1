"""Documents in which every second token can be known only by whoever remembers, and a model that could."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ._sizes import Sizes

KINDS = ("first", "short", "long")  # of targets: never seen, seen in this segment, seen in earlier segments alone


class Documents(NamedTuple):
    """Documents "K V K V …"; each gives its keys values of its own.

    Attributes:
        tokens: Int64, shape (documents, segments, segment).
        kinds: Of every value, a place in `KINDS`, shape (documents, segments, segment / 2).
    """

    tokens: Tensor
    kinds: Tensor


def recall_documents(sizes: Sizes, count: int, generator: torch.Generator) -> Documents:
    """Draw documents."""
    pairs = sizes.segments * sizes.segment // 2
    names = torch.rand(count, sizes.keys, generator=generator).argsort(dim=1)[:, : sizes.names]
    means = torch.randint(0, sizes.values, (count, sizes.names), generator=generator)
    which = torch.randint(0, sizes.names, (count, pairs), generator=generator)
    keys, values = names.gather(1, which), means.gather(1, which) + sizes.keys
    tokens = torch.stack([keys, values], dim=2).view(count, sizes.segments, sizes.segment)
    same = which[:, :, None] == which[:, None, :]
    earlier = torch.ones(pairs, pairs, dtype=torch.bool).tril(-1)
    segment = torch.arange(pairs) // (sizes.segment // 2)
    here = segment[:, None] == segment
    short, seen = (same & earlier & here).any(dim=2), (same & earlier).any(dim=2)
    kinds = torch.where(short, 1, torch.where(seen, 2, 0)).view(count, sizes.segments, -1)
    return Documents(tokens, kinds)


class RecallModel(nn.Module):
    """A Llama of one layer that sees each token and the one before it.

    A key is looked up where the key before a value was the same: with one layer that needs the token before in the
    embedding.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        vocabulary = sizes.keys + sizes.values
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=sizes.width,
            intermediate_size=2 * sizes.width,
            num_hidden_layers=1,
            num_attention_heads=sizes.heads,
            max_position_embeddings=sizes.segment,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.lm = LlamaForCausalLM(config)
        self.before = nn.Embedding(vocabulary + 1, sizes.width)
        nn.init.normal_(self.before.weight, std=config.initializer_range)

    def losses(self, tokens: Tensor) -> Tensor:
        """Return the nats of every value, shape (rows, tokens / 2), of tokens of shape (rows, tokens)."""
        shifted = nn.functional.pad(tokens, (1, 0), value=self.before.num_embeddings - 1)[:, :-1]
        states = self.lm.get_input_embeddings()(tokens) + self.before(shifted)
        logits = self.lm(inputs_embeds=states, use_cache=False).logits[:, ::2]
        return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1::2], reduction="none")

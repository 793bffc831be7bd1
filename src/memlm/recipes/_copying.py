"""Small language models: one that begins as one that copies, which an attention memory needs, and a plain one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from ..layers import AttentionMemories, memorize
from ..training import ModelShape, StreamBatch

_SCALE = 20.0  # of the last layer's queries and keys, whose length is 1


class CopyingLM(nn.Module):
    """A Llama whose embedding sees the token before, and whose last layer starts as an induction head.

    To find in a memory what followed the present token, a layer must compare it with the token *before* each entry.
    Here every state holds both, e(x_t) + T e(x_{t−1}); T starts as a random rotation, and the last layer's queries,
    keys and values so that it looks where the token before was the present one, and copies what stands there. Training
    finds such a circuit by itself, but not in minutes. As in Wu et al. 2022, that layer has no positions, and its
    queries and keys have length 1.

    Args:
        shape: Of the Llama; its last layer may have a memory.
        seed: Of the random weights.
    """

    def __init__(self, shape: ModelShape, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers, width = shape.num_hidden_layers, shape.hidden_size
        config = SmolLM3Config(**_settings(shape), no_rope_layers=[1] * (layers - 1) + [0])
        self.lm = SmolLM3ForCausalLM(config)
        self.turn = nn.Linear(width, width, bias=False)
        last, one = self.lm.model.layers[-1].self_attn, torch.eye(width)
        with torch.no_grad():
            turn = torch.linalg.qr(torch.randn(width, width)).Q
            self.turn.weight.copy_(turn)
            starts = {"q_proj": turn, "k_proj": one, "v_proj": one, "o_proj": config.initializer_range * one}
            for name, weight in starts.items():
                getattr(last, name).weight.copy_(weight)

    def forward(self, batch: StreamBatch, before: Tensor) -> Tensor:
        """Return logits, shape (rows, length, vocabulary).

        Args:
            batch: Segments of `length` tokens.
            before: The token before each segment, int64, shape (rows, 1); it is not seen where a document begins.
        """
        before = torch.cat([before, batch.input_ids[:, :-1]], dim=1)
        embed = self.lm.model.embed_tokens
        turned = self.turn(embed(before))  # (rows, length, width)
        first = torch.arange(before.shape[1]) == 0
        states = embed(batch.input_ids) + turned.masked_fill((batch.begins[:, None] & first)[..., None], 0.0)
        return self.lm(inputs_embeds=states, attention_mask=batch.known, use_cache=False).logits

    def remember(self, size: int, top_k: int, drop_off: str = "age") -> AttentionMemories:
        """Give the last layer a memory and queries and keys of length 1; a size of 0 gives it the latter alone."""
        memory = memorize(self.lm, [-1], size=size, top_k=top_k, normalize="l2", drop_off=drop_off if size else "none")
        (added,) = memory.memories.values()
        added.scale.data.fill_(_SCALE)
        return memory


class PlainLM(nn.Module):
    """A Llama as it comes, to compare with; the arguments are those of `CopyingLM`."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lm = LlamaForCausalLM(LlamaConfig(**_settings(shape)))

    def forward(self, batch: StreamBatch, before: Tensor) -> Tensor:
        """Return logits, shape (rows, length, vocabulary); the token before is not looked at."""
        return self.lm(input_ids=batch.input_ids, attention_mask=batch.known, use_cache=False).logits

    def remember(self, size: int, top_k: int) -> AttentionMemories:
        """Give the last layer a memory; a size of 0 changes nothing."""
        return memorize(self.lm, [-1], size=size, top_k=top_k)


def losses_of(model: CopyingLM | PlainLM, batch: StreamBatch, before: Tensor) -> Tensor:
    """Return the nats of every target, shape (rows, length); 0 for padding."""
    logits = model(batch, before)
    return nn.functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")


def _settings(shape: ModelShape) -> dict[str, Any]:
    """Return what a configuration needs to be told."""
    tied = {"num_key_value_heads": shape.num_attention_heads, "tie_word_embeddings": True}
    return dataclasses.asdict(shape) | tied | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))

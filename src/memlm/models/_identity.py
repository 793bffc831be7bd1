"""What a datastore is bound to: fingerprints of the encoder and of the tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

_SAMPLE = 1024  # values hashed of each parameter: enough to notice any training step, at any model size


def encoder_fingerprint(decoder: nn.Module) -> str:
    """Hash the names, shapes and a sample of the values of every parameter below the output embedding.

    Values are rounded to bfloat16 first, so that a model loaded in float32 and in bfloat16 has one fingerprint. In
    float16 it may have another: its weights are then rounded twice, or out of range.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(decoder.named_parameters()):
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // _SAMPLE)
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(flat[::step].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what decides a tokenizer's ids: vocabulary, merges, normalization, added tokens, start and end."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation", "post_processor"):
        backend.pop(setting, None)  # these change with use, and memlm places the special tokens itself
    described = {"backend": backend, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

"""What a datastore is bound to: fingerprints of the encoder and of the tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

# Settings that change what the same weights compute. Others (names, dropout, versions) must not part a model from its
# datastore, so the configuration is not hashed whole.
_SETTINGS = [
    "activation",
    "activation_function",
    "alibi",
    "apply_residual_connection_post_layernorm",
    "attention_multiplier",
    "attn_config",
    "attn_logit_softcapping",
    "clip_qkv",
    "do_layer_norm_before",
    "embedding_multiplier",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layer_types",
    "model_type",
    "new_decoder_architecture",
    "no_rope_layers",
    "norm_epsilon",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_key_value_heads",
    "parallel_attn",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "rope_parameters",
    "rotary_dim",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "sliding_window",
    "use_parallel_residual",
    "use_sliding_window",
    "window_size",
]
_SAMPLE = 1024  # values hashed of each parameter: enough to notice any training step, at any model size


def encoder_fingerprint(decoder: Any) -> str:
    """Hash the names, shapes and a sample of the values of every parameter below the output embedding, and settings.

    Values are rounded to bfloat16 first, so that a model loaded in float32 and in bfloat16 has one fingerprint. In
    float16 it may have another: its weights are then rounded twice, or out of range.
    """
    settings = {name: getattr(decoder.config, name, None) for name in _SETTINGS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
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

"""Tiny random causal language models, one for each family, and a tokenizer for them; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# Byte-pair merges in order of priority: every part is a byte or the result of an earlier merge.
_MERGES_TEXT = """
Ġ t, Ġ a, h e, i n, r e, o n, Ġt he, e r, Ġ s, a t, o r, e n, Ġ o, Ġ w, i s, Ġ c,
Ġ b, Ġa n, e s, e d, in g, Ġo f, Ġan d, i t, Ġt o, Ġ in, a l, l y, o u, a s, Ġw as
"""
_MERGES = [tuple(pair.split()) for pair in _MERGES_TEXT.split(",")]

VOCAB_SIZE = 256 + len(_MERGES) + 1
END_OF_TEXT_ID = VOCAB_SIZE - 1
MAX_POSITIONS = 128

# The same sizes in the spellings of the different configuration classes.
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_GQA = _LLAMA | {"num_key_value_heads": 2}  # grouped queries: two heads share a key head
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS}
_GPT_NEO = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 8,
}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "dropout": 0.0,
}
_FALCON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Family name -> (model type of transformers, settings of its configuration).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT | _NO_DROPOUT),
    "gpt_neo": ("gpt_neo", _GPT_NEO),
    "gptj": ("gptj", _GPT | _NO_DROPOUT | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", _LLAMA | {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", _LLAMA | {"use_parallel_residual": False}),
    "opt": ("opt", _OPT),
    # OPT-350m: norms after the sub-layers, no final norm, embeddings narrower than the layers
    "opt_post_norm": ("opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": MAX_POSITIONS, "use_cache": True}),
    "falcon": ("falcon", _FALCON | {"parallel_attn": True}),
    # Falcon-RW: ALiBi, one key head for each query head, biases
    "falcon_sequential": (
        "falcon",
        _FALCON | {"parallel_attn": False, "alibi": True, "multi_query": False, "bias": True},
    ),
    "llama": ("llama", _GQA),
    "mistral": ("mistral", _GQA | {"sliding_window": 8}),
    "mixtral": ("mixtral", _GQA | _EXPERTS),
    "qwen2": ("qwen2", _GQA),
    "qwen3": ("qwen3", _GQA | {"head_dim": 8}),
    "qwen3_moe": (
        "qwen3_moe",
        _GQA | {"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    # plain rotary positions: the YaRN scaling of the released model does not fit 128 positions
    "gpt_oss": ("gpt_oss", _GQA | _SLIDING | _EXPERTS | {"head_dim": 8, "rope_parameters": _PLAIN_ROPE}),
    "gemma": ("gemma", _GQA | {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        # tighter than the released 30, so that the cap shows on small logits
        _GQA | _SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": ("gemma3_text", _GQA | _SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": ("phi", _LLAMA),
    "phi3": ("phi3", _GQA | {"original_max_position_embeddings": MAX_POSITIONS}),
    "olmo": ("olmo", _LLAMA),
    "olmo2": ("olmo2", _LLAMA),
    "olmo3": ("olmo3", _LLAMA | _SLIDING),
    "stablelm": ("stablelm", _GQA | {"use_parallel_residual": False}),
    "stablelm_parallel": ("stablelm", _GQA | {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", _GQA),
    # the second layer has no rotary positions
    "smollm3": ("smollm3", _GQA | {"no_rope_layer_interval": 2}),
    "granite": (
        "granite",
        _GQA
        | {
            "logits_scaling": 2.0,
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
        },
    ),
    "cohere": ("cohere", _GQA | {"logit_scale": 0.5}),
    "cohere2": ("cohere2", _GQA | _SLIDING | {"logit_scale": 0.5}),
}

# Families whose last feed-forward layer reads the input of the last attention layer, not its output.
PARALLEL_FAMILIES = frozenset({"gptj", "gpt_neox", "falcon", "phi", "stablelm_parallel", "cohere", "cohere2"})


def tiny_config(family: str, vocab_size: int = VOCAB_SIZE) -> PreTrainedConfig:
    """Return a new configuration of `family` with the special token ids of `tiny_tokenizer`."""
    model_type, settings = FAMILIES[family]
    return AutoConfig.for_model(
        model_type,
        **settings,
        vocab_size=vocab_size,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB_SIZE
) -> PreTrainedModel:
    """Return a new random model of `family` in eval mode; the same arguments give the same weights.

    The usual initial weights (std 0.02) would give nearly the same state after every context at this width. Matrices
    are therefore drawn with std 0.25. Norm weights and biases get noise, so that two norms of one input are told apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, vocab_size), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.ndim > 1:
                    parameter.copy_(0.25 * noise)
                else:
                    parameter.add_((0.1 * noise).to(dtype))
    return model.eval()


def tiny_tokenizer(kind: Literal["bytes", "reversed"] = "bytes") -> PreTrainedTokenizerFast:
    """Return a new byte-level BPE tokenizer with one special token, its own begin, end and padding.

    `reversed` has the same tokens, vocabulary size and special token id, but gives every other token another id.
    """
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in _MERGES]
    if kind == "reversed":
        tokens.reverse()
    vocabulary = {token: number for number, token in enumerate([*tokens, END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def tiny_folder(
    family: str, path: str | Path, seed: int = 0, tokenizer: Literal["bytes", "reversed"] = "bytes"
) -> Path:
    """Save a tiny model and its tokenizer in the folder `path`, as `from_pretrained` expects them."""
    tiny_model(family, seed).save_pretrained(path)
    tiny_tokenizer(tokenizer).save_pretrained(path)
    return Path(path)

"""Models from scratch: a tokenizer trained on the documents, and the configuration of a small Llama model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ..documents import Corpus
from ._recipe import ModelShape

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(vocabulary: int, positions: int, train: list[str], path: Path) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with one special token, which begins and ends every document; if `path` has it, load it.

    Args:
        vocabulary: Tokens, at least 257.
        positions: Of the model that it is for.
        train: Files or folders of documents.
        path: Folder of the tokenizer, written at once or not at all.
    """
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((document.text for document in Corpus(train)), trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
        fast.model_max_length = positions
        staging = path.with_name("tokenizer.tmp")
        fast.save_pretrained(staging)
        staging.rename(path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def llama_config(shape: ModelShape, tokenizer: Any) -> LlamaConfig:
    """Return the configuration of a new model."""
    return LlamaConfig(
        **dataclasses.asdict(shape),
        num_key_value_heads=shape.num_attention_heads,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

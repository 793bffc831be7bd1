"""A tokenizer for source code: identifiers, numbers, signs, blanks, and line ends with indentation are tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
_PIECE = r"\n\s*|[^\S\n]+|[^\W\d]\w*|\d\w*|'''|\"\"\"|[^\w\s]"  # whatever it is, some piece holds it


def code_tokenizer(texts: Iterable[str], vocabulary: int, positions: int) -> Any:
    """Make a tokenizer with the most frequent tokens of some texts.

    Args:
        texts: What to count.
        vocabulary: Tokens, with the one for all that is not among them and the end of the text.
        positions: Of the model that it is for.

    Returns:
        A `PreTrainedTokenizerFast`, with an end of text and no beginning.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "removed", invert=True)  # type: ignore[assignment]
    special = [UNKNOWN, END_OF_TEXT]
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)  # type: ignore[call-arg]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END_OF_TEXT, model_max_length=positions
    )

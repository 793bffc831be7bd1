"""Language models, datastores and texts that several test files share; see also `tiny_models`."""

from functools import cache

import numpy as np
import torch

from memlm import Datastore, Document, KnnMixture
from memlm.models import LanguageModel
from oracle import stored_entries
from tiny_models import END_OF_TEXT_ID, tiny_model, tiny_tokenizer

FIVE = ["llama", "gpt2", "gpt_neox", "opt", "gemma2"]
TEXTS = [
    "the cat was in the house and the rain was on the roof",
    "in the morning the rain was over and a bird was singing",
    "a letter was in the box; it said that the house is sold",
]


def documents(texts):
    """Name texts, given as a list or as a mapping of names to texts."""
    named = texts if isinstance(texts, dict) else {f"document {number}": text for number, text in enumerate(texts)}
    return [Document(id=str(name), text=text) for name, text in named.items()]


def store(lm, texts, path, **settings):
    return Datastore.build(lm, documents(texts), path, index="exact", show_progress=False, **settings)


def bare_tokenizer(start=None, end=None):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = start, end
    return tokenizer


@cache
def lm_of(family, dtype=torch.float32, **settings):
    return LanguageModel(tiny_model(family, dtype=dtype), tiny_tokenizer(), family, **settings)


@cache
def attachable(folder, family, key_dtype="float16", dtype=torch.float32):
    """Return a language model, a datastore of `TEXTS` and a mixture that changes what the model says."""
    lm = lm_of(family, dtype)
    memory = store(lm, TEXTS, folder / f"{family}-{key_dtype}-{lm.model.dtype}", key_dtype=key_dtype)
    keys = stored_entries(memory.path)[0]
    typical = float(np.median(np.square(keys[:, None] - keys[None]).sum(axis=2)))
    return lm, memory, KnnMixture(interpolation_weight=0.6, temperature=0.1 * typical, k=9)


def ids_of(text):
    return torch.tensor([[END_OF_TEXT_ID, *tiny_tokenizer()(text)["input_ids"]]])


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

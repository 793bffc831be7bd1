"""What tests share: a quiet and reproducible environment, tiny language models, and one small datastore."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before transformers is imported

import shutil

import pytest
from hypothesis import settings

from memlm import Datastore, Document
from memlm.mixtures._folds import folds

settings.register_profile("memlm", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("memlm")

# A trained-on-nothing model cannot tell good text from bad; these only have to be varied. The last has another length.
TEXTS = {
    "cats": "the cat was in the house and the rain was on the roof of the house",
    "birds": "in the morning the rain was over, and a bird was singing on the roof",
    "letters": "a letter was in the box; it said that the house is sold. And the cat?",
    "unicode": "naïve café, 日本語, 🙂 and the end.\nA second line\twith a tab",
    "short": "on",
}


@pytest.fixture(scope="session")
def documents():
    """Five documents with metadata, one of them of a single token."""
    return [Document(id=name, text=text, metadata={"length": len(text)}) for name, text in TEXTS.items()]


@pytest.fixture(scope="session")
def tiny_lm():
    """Return a function that makes a `LanguageModel` over a new tiny random model."""

    def make(family="llama", seed=0, tokenizer="bytes", **settings):
        from memlm.models import LanguageModel
        from tiny_models import tiny_model, tiny_tokenizer

        return LanguageModel(tiny_model(family, seed), tiny_tokenizer(tokenizer), f"tiny-{family}-{seed}", **settings)

    return make


@pytest.fixture(scope="session")
def lm(tiny_lm):
    """A tiny Llama; no test may change it."""
    return tiny_lm()


@pytest.fixture(scope="session")
def memory(lm, documents, tmp_path_factory):
    """A datastore of the five documents in two segments, with exact search; no test may change it."""
    path = tmp_path_factory.mktemp("shared") / "memory"
    return Datastore.build(lm, documents, path, segment_entries=80, show_progress=False)


@pytest.fixture
def copied(memory, tmp_path):
    """The folder of a copy of `memory`, to be damaged."""
    return shutil.copytree(memory.path, tmp_path / "memory")


@pytest.fixture
def quick_choice(monkeypatch):
    """Fit kinds of mixture at one temperature and choose among them in two folds: five times five are slow."""
    from memlm.mixtures import _families

    monkeypatch.setattr(_families, "_TEMPERATURES", (1.0,))
    monkeypatch.setattr(_families, "folds", lambda groups: folds(groups, 2))

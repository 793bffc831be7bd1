"""Mistakes that a fresh reader found, each held by a test."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch

import faiss  # isort: skip

import memlm
from memlm.errors import IndexError_, ModelError
from memlm.evaluation import tune_report
from memlm.index._faiss import FaissIndex
from memlm.models import LanguageModel
from memlm.models._windows import tokenize
from memlm.text import printable
from tiny_memories import TEXTS, lm_of, store
from tiny_models import END_OF_TEXT_ID, tiny_model, tiny_tokenizer


def test_generated_text_that_is_a_stored_document_may_name_that_document(tmp_path):
    lm = lm_of("llama")
    memory = store(lm, TEXTS, tmp_path / "memory")
    mixture = memlm.KnnMixture(interpolation_weight=0.95, temperature=1e-2, k=8)
    assert memlm.explain(lm, TEXTS[2], memory, mixture, leave_out_own=False).documents[0][0] == "document 2"
    assert "document 2" not in dict(memlm.explain(lm, TEXTS[2], memory, mixture).documents)


def test_tuned_weight_leaves_every_token_possible(tmp_path):
    lm = lm_of("llama")
    line = "| a | b | c |\n"
    memory = store(lm, {"x": line * 20, "y": line * 33}, tmp_path / "memory")
    report = tune_report(lm, memory, [{"text": line * 26}], show_progress=False)
    assert report.best.interpolation_weight < 1
    evaluation = memlm.evaluate(lm, [{"text": "Quite other text."}], memory, report.best, show_progress=False)
    assert math.isfinite(evaluation.results[1].perplexity)


def test_text_that_spells_a_special_token_is_text():
    tokenized = tokenize(tiny_tokenizer(), memlm.Document(id="x", text="a <|endoftext|> b"))
    assert (tokenized.ids == END_OF_TEXT_ID).sum() == 2  # the start and the end alone


def test_other_windows_than_the_datastore_are_reported(tmp_path):
    memory = store(lm_of("llama"), TEXTS, tmp_path / "memory")
    mixture = memlm.KnnMixture(interpolation_weight=0.5, temperature=1.0, k=2)
    with pytest.warns(UserWarning, match="built with windows"):
        memlm.evaluate(lm_of("llama", context=1, stride=2), [{"text": "a b"}], memory, mixture, show_progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memlm.evaluate(lm_of("llama"), [{"text": "a b"}], memory, mixture, show_progress=False)


def test_model_in_training_mode_is_refused():
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(), "tiny")
    lm.model.train()
    for work in (lm.keys, lm.score):
        with pytest.raises(ModelError, match="training mode"):
            next(iter(work([np.arange(4)])))


def test_context_that_leaves_no_stride_is_refused():
    with pytest.raises(ModelError, match="leaves no room"):
        LanguageModel(tiny_model("llama"), tiny_tokenizer(), "tiny", context=128)


def test_index_whose_lists_lie_in_another_file_is_refused(tmp_path):
    keys = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    index = faiss.index_factory(8, "IVF4,Flat")
    index.train(keys)
    outside = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(tmp_path / "outside.bin"))
    index.replace_invlists(outside)
    index.add(keys)
    (tmp_path / "000002").mkdir()
    faiss.write_index(index, str(tmp_path / "000002" / "index.faiss"))

    class Keys(list):
        width, metric = 8, "squared_l2"

    class Part:
        name, files, details = "000002", {"index.faiss": {}}, {"nprobe": 1, "stores_keys": True, "entries": 200}

    with pytest.raises(IndexError_, match="another file"):
        FaissIndex(Keys([0] * 200), tmp_path, Part)


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("mistral", "sliding_window", 3),
        ("starcoder2", "norm_epsilon", 1.0),
        ("olmo", "clip_qkv", 0.5),
    ],
)
def test_setting_that_changes_keys_changes_the_fingerprint(family, setting, value):
    lm = lm_of(family)
    other = copy.deepcopy(lm.model)
    setattr(other.config, setting, value)
    assert LanguageModel(other, lm.tokenizer, family).identity["encoder"]["sha256"] != lm.identity["encoder"]["sha256"]


def test_no_excluded_entry_is_returned_by_any_kind_of_index(tmp_path):
    lm = lm_of("llama")
    memory = store(lm, [TEXTS[0] * 3, TEXTS[0] * 3 + "!", TEXTS[1] * 3], tmp_path / "memory")
    queries = memory.keys.gather_keys(np.arange(40)).float().numpy()
    exclude = np.tile(np.array([memory.document_range(TEXTS[0] * 3)]), (40, 1))
    assert exclude[0, 1] > 40
    for factory in ("IVF2,Flat", "IVF2,FlatDedup", "IVF2,SQ8", "HNSW8", "PCA8,Flat", "Flat"):
        memory.build_index(factory)
        found = memory.search(queries, 5, exclude)
        assert not ((found.entries < exclude[0, 1]) & found.present).any(), factory
        assert found.present.any()


def test_escape_sequences_do_not_reach_the_terminal():
    assert "\x1b" not in printable("\x1b]0;title\x07 text")
    assert torch.tensor([ord(character) >= 32 for character in printable("\x1b]0;title\x07")]).all()

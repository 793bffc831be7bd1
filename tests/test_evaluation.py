"""Evaluation: numbers that add up, text that is cut, and whatever cannot be evaluated."""

import json
import math

import numpy as np
import pytest
import torch

from memlm import Cache, KnnMixture, evaluate, tune
from memlm.errors import ConfigError, CorpusError, DatastoreMismatch
from memlm.evaluation import _retrieval, tune_report
from memlm.evaluation._retrieval import Text, gather, retrieve
from memlm.mixtures import CacheMixture
from memlm.models import LanguageModel
from tiny_memories import TEXTS, bare_tokenizer, documents, lm_of, store
from tiny_models import tiny_model, tiny_tokenizer

NEW = ["the letter was in the hôtel — and it was the morning", "x", "rain was on the bird and the cat is in a box"]
MIXTURE = KnnMixture(interpolation_weight=0.5, temperature=10.0, k=8)


def bare_lm():
    return LanguageModel(tiny_model("llama"), bare_tokenizer(), "llama")


@pytest.fixture(scope="module")
def lm():
    return lm_of("llama")


@pytest.fixture(scope="module")
def memory(lm, tmp_path_factory):
    return store(lm, TEXTS, tmp_path_factory.mktemp("evaluation") / "memory")


def test_numbers_add_up(lm, memory):
    result = evaluate(lm, documents(NEW), memory, MIXTURE, show_progress=False)
    alone, mixed = result.results
    assert (alone.method, mixed.method) == ("lm", "knn-lm")
    tokens = sum(len(lm.tokenizer(text)["input_ids"]) + 1 for text in NEW)  # and the end of each
    for method, log_probs in ((alone, result.lm_log_probs), (mixed, result.log_probs)):
        assert (method.tokens, method.words, method.bytes) == (tokens, 25, sum(len(text.encode()) for text in NEW))
        assert len(log_probs) == tokens
        assert method.nats == pytest.approx(-log_probs.sum())
        assert method.perplexity == pytest.approx(math.exp(method.nats / tokens))
        assert method.word_perplexity == pytest.approx(math.exp(method.nats / 25))
        assert method.bits_per_byte * method.bytes * math.log(2) == pytest.approx(method.nats)
        assert method.to_dict()["byte_perplexity"] == pytest.approx(math.exp(method.nats / method.bytes))
        assert method.tokens_per_second == pytest.approx(tokens / method.seconds)
    assert mixed.seconds > alone.seconds > 0
    assert result.gain.mean == pytest.approx((alone.nats - mixed.nats) / tokens)
    change = result.log_probs - result.lm_log_probs
    assert (result.helped, result.hurt) == ((change > 0.01).mean(), (change < -0.01).mean())
    assert result.documents.tolist() == sorted(result.documents) and len(set(result.documents)) == 3  # noqa: PT018
    assert f"{alone.perplexity:,.2f}" in str(result)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["results"][1]["nats"] == mixed.nats


@pytest.mark.parametrize("copies", [1, 25])
def test_memory_alone_can_make_a_token_impossible(lm, memory, copies):
    """λ = 1 where no neighbor carries the target: infinite perplexity, still a table and valid JSON."""
    alone = KnnMixture(interpolation_weight=1.0, temperature=1.0, k=4)
    texts = documents([f"{text} {n}" for n in range(copies) for text in NEW])
    result = evaluate(lm, texts, memory, alone, show_progress=False)
    assert result.results[1].perplexity == math.inf
    assert result.gain.mean == -math.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["results"][1]["perplexity"] is None
    assert "inf" in str(result)


def test_cut_after_a_number_of_tokens(lm, memory):
    whole = Text(lm, documents(NEW))
    assert whole.names == ["document 0", "document 1", "document 2"], "in order"
    for wanted in (1, 2, 7, whole.tokens - 1, whole.tokens, whole.tokens + 5):
        text = Text(lm, documents(NEW), wanted)
        assert text.tokens == min(wanted, whole.tokens) == sum(len(ids) - 1 for ids in text.ids)
        assert len(text.document_of_target) == text.tokens
        for name, ids in zip(text.names, text.ids, strict=True):
            original = whole.ids[whole.names.index(name)]
            assert ids.tolist() == original[: len(ids)].tolist()
        # the last document is cut; a part of the first word is a word, a part of a character is the character
        scored = [lm.tokenizer.decode(ids[1:], skip_special_tokens=True) for ids in text.ids]
        assert text.words == sum(len(part.split()) for part in scored)
        assert abs(text.bytes - sum(len(part.encode()) for part in scored)) <= 2
    result = evaluate(lm, documents(NEW), memory, MIXTURE, max_tokens=7, show_progress=False)
    assert result.results[0].tokens == len(result.targets) == 7
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        evaluate(lm, documents(NEW), memory, MIXTURE, max_tokens=0, show_progress=False)


def test_long_texts_are_scored_group_by_group(lm, memory, monkeypatch):
    whole = evaluate(lm, documents(NEW), memory, MIXTURE, show_progress=False)
    monkeypatch.setattr(_retrieval, "_GROUP", 20)  # tokens; a document is never divided
    parts = evaluate(lm, documents(NEW), memory, MIXTURE, show_progress=False)
    assert parts.targets.tolist() == whole.targets.tolist()
    assert np.allclose(parts.lm_log_probs, whole.lm_log_probs, atol=1e-5)
    assert np.allclose(parts.log_probs, whole.log_probs, atol=1e-4)


def test_batches_in_any_order_are_put_in_the_order_of_the_text(lm, memory, monkeypatch):
    text = Text(lm, documents(NEW))

    def passed():
        return list(retrieve(lm, text, [memory, Cache(9)], [8, 9], beliefs=True, show_progress=False))

    (whole,) = passed()
    monkeypatch.setattr(_retrieval, "_SEARCHED_TOGETHER", 7)
    parts = passed()[::-1]
    assert len(parts) > 5
    for wrong in (text.tokens - len(parts[-1].rows), text.tokens + 1):
        with pytest.raises((AssertionError, IndexError)):
            gather(iter(parts), wrong)
    for result in (gather(parts), gather(iter(parts), text.tokens)):
        assert result.rows.tolist() == list(range(text.tokens))
        assert result.targets.equal(whole.targets)
        assert result.lm_log_probs.equal(whole.lm_log_probs)
        for found, expected in zip(result.evidence.memories, whole.evidence.memories, strict=True):
            assert torch.allclose(found.distances, expected.distances, atol=1e-4)
            assert found.present.equal(expected.present)
            assert found.tokens[found.present].equal(expected.tokens[found.present])
            assert found.entries.equal(expected.entries[:, :1])
            assert found.entries.untyped_storage().nbytes() == 8 * text.tokens, "nobody needs the others"
        assert result.evidence.memories[1].ages.equal(whole.evidence.memories[1].ages)
        assert result.evidence.memories[0].ages is None
        assert result.evidence.belief.keys.equal(whole.evidence.belief.keys)
        assert result.search_seconds == pytest.approx(
            [sum(part.search_seconds[place] for part in parts) for place in (0, 1)]
        )


def test_a_cache_alone_searches_no_datastore(lm, memory):
    """With a datastore beside it everything is searched."""
    cache = CacheMixture(interpolation_weight=0.2, scale=0.1, length=9)
    for memories, mixture, searched in ((Cache(9), cache, 0.0), (memory, MIXTURE, 1.0)):
        result = evaluate(lm, documents(NEW), memories, mixture, show_progress=False)
        assert result.settings["searched"] == searched
    both = next(retrieve(lm, Text(lm, documents(NEW)), [Cache(9), memory], [9, 8], show_progress=False))
    assert both.searched == 1.0


def test_documents_of_one_token(lm, memory, tmp_path):
    result = evaluate(lm, documents(["x", "y"]), memory, MIXTURE, show_progress=False)
    end = lm.tokenizer.encode("<|endoftext|>")
    assert result.targets.tolist() == [*lm.tokenizer.encode("x"), *end, *lm.tokenizer.encode("y"), *end]
    bare = bare_lm()  # without a start token a document's first token is no target
    bare_memory = store(bare, TEXTS, tmp_path / "memory")
    result = evaluate(bare, documents(["x", "yz"]), bare_memory, MIXTURE, show_progress=False)
    assert result.targets.tolist() == bare.tokenizer.encode("z")
    for use in (lambda: evaluate(bare, documents(["x"]), bare_memory, MIXTURE, show_progress=False),
                lambda: tune(bare, bare_memory, documents(["x"]), show_progress=False)):  # fmt: skip
        with pytest.raises(CorpusError, match="no token of list can be scored"):
            use()


def test_more_neighbors_than_entries(lm, memory):
    with pytest.raises(ConfigError, match=f"k is 1024; expected 1 to {len(memory)}"):
        evaluate(lm, documents(NEW), memory, KnnMixture(interpolation_weight=0.5, temperature=1.0), show_progress=False)
    report = tune_report(lm, memory, documents(NEW), show_progress=False)  # tuning caps it
    assert max(row["k"] for row in report.grid) == len(memory)


@pytest.mark.parametrize("what", ["model", "tokenizer", "key site"])
def test_other_model_tokenizer_or_site_is_refused(what, memory):
    model = tiny_model("llama", seed=int(what == "model"))
    tokenizer = tiny_tokenizer("reversed" if what == "tokenizer" else "bytes")
    site = "final_norm_output" if what == "key site" else None
    other = LanguageModel(model, tokenizer, "the other", key_site=site)
    said = {"model": "llama .*the other", "tokenizer": "of llama.*of the other", "key site": "mlp .*model .output"}[
        what
    ]
    for use in (lambda: evaluate(other, documents(NEW), memory, MIXTURE), lambda: tune(other, memory, documents(NEW))):
        with pytest.raises(DatastoreMismatch, match=said):
            use()


def test_key_site_is_the_same_under_another_name(memory):
    named = LanguageModel(tiny_model("llama"), tiny_tokenizer(), "llama", key_site="model.layers.1.mlp")
    evaluate(named, documents(NEW), memory, MIXTURE, show_progress=False)

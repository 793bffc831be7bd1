"""Explaining a text, and finding how much of it is stored word for word."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm import Document, KnnMixture, evaluate, explain, overlap
from memlm.cache import Cache
from memlm.errors import ConfigError, CorpusError, DatastoreMismatch
from memlm.evaluation import Explanation
from memlm.mixtures import CacheMixture
from memlm.models import LanguageModel
from oracle import knn_lm, stored_entries, teacher_forced
from test_cache import gate_over
from tiny_memories import bare_tokenizer, documents, store
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = {
    "weather": "in the morning the rain was over and a bird was singing",
    "letter": "a letter was in the box; it said that the hôtel — is sold",
    "cat": "the cat was in the house and the rain was on the roof",
}
MIXTURE = KnnMixture(interpolation_weight=0.5, temperature=10.0, k=12)


def make_lm(start="<|endoftext|>", end="<|endoftext|>"):
    return LanguageModel(tiny_model("llama"), bare_tokenizer(start, end), "llama", context=20, stride=9)


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.fixture(scope="module")
def memory(lm, tmp_path_factory):
    return store(lm, TEXTS, tmp_path_factory.mktemp("explain") / "memory")


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from("aehrt \n\tôü—🜁 é́"), max_size=30))
def test_tokens_join_to_the_text(lm, memory, text):
    explanation = explain(lm, text, memory, MIXTURE)
    assert "".join(token.text for token in explanation.tokens) == text
    assert len(explanation.tokens) == len(lm.tokenizer(text)["input_ids"])
    assert all(token.scored for token in explanation.tokens)


@pytest.mark.parametrize("start", ["<|endoftext|>", None])
@pytest.mark.parametrize("end", ["<|endoftext|>", None])
def test_probabilities_are_those_of_evaluate(start, end, tmp_path):
    lm = make_lm(start, end)
    memory = store(lm, TEXTS, tmp_path / "memory")
    text = "the letter was in the hôtel and it rained"
    explanation = explain(lm, text, memory, MIXTURE)
    result = evaluate(lm, [Document(id="new", text=text)], memory, MIXTURE, show_progress=False)
    tokens = list(explanation.tokens)
    assert "".join(token.text for token in tokens) == text
    if start is None:
        first = tokens.pop(0)
        assert not first.scored, "the first token is shown, but the model was not asked for it"
        assert (first.text, first.sources, first.level) == ("t", (), 0)
    scored = slice(None, -1 if end else None)  # the end of the text is scored, but not shown
    assert len(tokens) == len(result.targets[scored])
    assert np.allclose([math.log(token.lm) for token in tokens], result.lm_log_probs[scored], atol=1e-5)
    assert np.allclose([math.log(token.mixture) for token in tokens], result.log_probs[scored], atol=1e-5)
    assert np.allclose([0.5 * token.lm + 0.5 * token.memory for token in tokens], [token.mixture for token in tokens])
    assert {token.weight for token in tokens} == {0.5}
    assert explanation.perplexity == pytest.approx(math.exp(-result.log_probs[scored].mean()), rel=1e-4)


def test_sources_are_the_nearest_entries_and_name_their_place(lm, memory):
    """Queries of the first window, where the oracle's plain forward of the whole text sees the same."""
    text = "in the morning the rain was on a bird"
    explanation = explain(lm, text, memory, MIXTURE, sources=3)
    keys, values = stored_entries(memory.path)
    ids = lm.tokenize(Document(id="new", text=text)).ids
    lm_log_probs, states = teacher_forced(lm.model, lm.site, ids)
    distances = np.square(states[:, None] - keys[None]).sum(axis=2)
    expected = np.exp(knn_lm(lm_log_probs, states, keys, values, MIXTURE)[0])
    places = []  # of every entry: its document, and the text before it
    for document in documents(TEXTS):
        stored = lm.tokenize(document).ids[1:]
        places += [(document.id, lm.tokenizer.decode(stored[:number])) for number in range(len(stored))]
    for place, token in enumerate(explanation.tokens[:9]):
        assert token.mixture == pytest.approx(expected[place, ids[place + 1]], abs=1e-4)
        shares = np.exp(-np.sort(distances[place])[:12] / 10.0)
        heaviest = token.sources[0]
        assert heaviest.share == pytest.approx(shares[0] / shares.sum(), abs=1e-3)
        assert heaviest.distance == pytest.approx(distances[place].min(), abs=1e-3)
        assert [source.share for source in token.sources] == sorted((s.share for s in token.sources), reverse=True)
        tied = [places[entry] for entry in np.flatnonzero(distances[place] < distances[place].min() + 1e-3)]
        assert (heaviest.document, heaviest.before) in tied
        for source in token.sources:
            assert source.before + source.token + source.after in TEXTS[source.document]
    shared = "in the morning the rain was"  # so far "weather" is stored word for word, and is the nearest
    sharp = explain(lm, text, memory, KnnMixture(interpolation_weight=0.5, temperature=0.05, k=4), sources=1)
    written = ""
    for token in sharp.tokens:
        if written and len(written + token.text) <= len(shared):
            source = token.sources[0]
            assert (source.document, source.before, source.token) == ("weather", written, token.text)
            assert token.support == {"weather": pytest.approx(0.5, abs=1e-3)}
        written += token.text


def test_stored_text_does_not_explain_itself(lm, memory):
    sharp = KnnMixture(interpolation_weight=0.5, temperature=0.05, k=4)
    explanation = explain(lm, TEXTS["cat"], memory, sharp)
    names = {source.document for token in explanation.tokens for source in token.sources}
    assert names == {"weather", "letter"}


def test_where_the_model_began_to_write(lm, memory):
    text = "the rain was over and"
    for offset in (0, 8, 9, 12, len(text)):
        explanation = explain(lm, text, memory, MIXTURE, title="written", generated_from=offset)
        prompt = "".join(token.text for token in explanation.tokens[: explanation.generated_from])
        assert prompt == text[:offset] or len(prompt) < offset, "a token across the border is the model's"
        assert len(text[:offset]) - len(prompt) < 4
        assert explanation.title == "written"
    assert explain(lm, text, memory, MIXTURE).generated_from is None


def test_one_of_something_is_not_said_to_be_several(lm, memory, tmp_path):
    one = store(lm, {"alone": "a"}, tmp_path / "memory")
    few = KnnMixture(interpolation_weight=0.5, temperature=10.0, k=2)
    assert explain(lm, "the", one, few).settings["memory"] == "2 entries, 1 document"
    assert repr(one).endswith("2 entries, 1 document)")
    assert explain(lm, "the", memory, MIXTURE).settings["memory"].endswith(" entries, 3 documents")
    cache = CacheMixture(interpolation_weight=0.1, scale=1.0, length=1)
    assert explain(lm, "the", Cache(1), cache).settings["memory"] == "the last token"


def test_several_memories_are_told_apart(lm, memory):
    explanation = explain(lm, "the cat was in the rain", [memory, Cache(64)], gate_over(lm, memory, MIXTURE))
    assert explanation.memories == tuple(explanation.settings["memory"].split(" + "))
    assert explanation.memories[1] == "the last 64 tokens"
    means = np.mean([token.weights for token in explanation.tokens], axis=0)
    assert explanation.weights == pytest.approx(tuple(means))
    assert abs(means[0] - means[1]) > 0.01
    assert Explanation.from_dict(explanation.to_dict()) == explanation
    assert explain(lm, TEXTS["cat"], memory, MIXTURE).weights == (), "there is nothing to tell apart"


def test_another_model_cannot_explain(memory):
    other = LanguageModel(tiny_model("llama", seed=1), tiny_tokenizer(), "the other")
    for use in (lambda: explain(other, "the", memory, MIXTURE), lambda: overlap(other, documents(TEXTS), memory)):
        with pytest.raises(DatastoreMismatch, match=r"llama .*the other"):
            use()


def test_overlap_of_known_texts(lm, memory):
    new = {
        "same": TEXTS["cat"],
        "half": TEXTS["cat"] + " 0123456789" * 5,
        "other": "0123456789 9876543210",
        "short": "a",
    }
    result = overlap(lm, documents(new), memory, n=4)
    assert result.n == 4
    assert result.stored == ["same"]
    assert result.documents["same"] == 1.0
    assert result.documents["other"] == 0.0
    assert "short" not in result.documents
    lengths = {name: len(lm.tokenizer(text)["input_ids"]) + 1 - 3 for name, text in new.items()}
    known = lengths["same"] - 1  # all but the last, which ends with the end of the text
    assert result.documents["half"] == pytest.approx(known / lengths["half"])
    assert list(result.documents.values()) == sorted(result.documents.values(), reverse=True)
    assert result.ngrams == sum(length for length in lengths.values() if length > 0)
    assert result.share == pytest.approx((lengths["same"] + known) / result.ngrams)
    assert result.to_dict()["stored"] == ["same"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abc", min_size=2, max_size=20), min_size=1, max_size=4, unique=True), st.integers(1, 6))
def test_overlap_is_that_of_sets_of_n_grams(bare, texts, n):
    """Without start and end: nothing but n-grams that cross a document's border could tell documents apart."""
    lm, memory, stored = bare

    def n_grams(text):
        ids = lm.tokenizer(text)["input_ids"][1:]  # the first token is no target
        return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]

    known = {gram for text in stored.values() for gram in n_grams(text)}
    grams = [gram for text in texts for gram in n_grams(text)]
    result = overlap(lm, documents(texts), memory, n=n)
    assert result.ngrams == len(grams)
    assert result.share == pytest.approx(sum(gram in known for gram in grams) / max(1, len(grams)))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    lm = make_lm(None, None)
    stored = {"one": "abcabbc", "two": "cabcacab", "three": "bbacc"}
    return lm, store(lm, stored, tmp_path_factory.mktemp("overlap") / "memory"), stored


def test_bad_overlap(lm, memory):
    with pytest.raises(ConfigError, match="n is 0"):
        overlap(lm, documents(TEXTS), memory, n=0)
    with pytest.raises(CorpusError, match="no text"):
        overlap(lm, documents({"empty": " "}), memory)

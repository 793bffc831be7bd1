"""One softmax over vocabulary and memories (TRIME at inference): its equation, its fit, text scored and written."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import logging

from memlm import Document, KnnMixture, attach, compare, evaluate, explain, ops, tune
from memlm.cache import Cache
from memlm.errors import ConfigError, DatastoreMismatch
from memlm.evaluation import tune_report, tune_trime
from memlm.evaluation._retrieval import Text, retrieve
from memlm.evidence import Belief, Evidence, Found
from memlm.mixtures import CacheMixture, SharedCacheMixture, TrimeMixture, fit_trime, load_mixture
from memlm.models import LanguageModel
from oracle import stored_entries, teacher_forced
from planted import held_out
from tiny_memories import TEXTS, documents, ids_of, lm_of, store
from tiny_models import END_OF_TEXT_ID, tiny_model, tiny_tokenizer

VOCABULARY, WIDTH, LENGTH, K = 13, 4, 12, 7
NEW = ["the cat was in the rain and the cat was in the rain", "x", "the bird, the bird and the bird in the bird house"]
PROMPTS = ["the rain was", "in the house and the letter, and in the house"]
BOTH = TrimeMixture(temperature=0.6, forgetting=0.02, length=LENGTH, k=K)
TWICE = dataclasses.replace(BOTH, interpolation_weight=0.3, interpolation_temperature=2.0)
FORMS = {
    "cache": TrimeMixture(temperature=0.6, forgetting=0.02, length=LENGTH),
    "datastore": TrimeMixture(temperature=0.6, k=K),
    "both": BOTH,
    "twice": TWICE,
}


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.set_verbosity_error()  # hints about generation settings
    yield
    logging.set_verbosity_warning()


def asked(mixture, places=20, seed=0, size=1.0, absent=0.0):
    """Return evidence for the places of one document, and in float64 all that it was made of."""
    generator = torch.Generator().manual_seed(seed)
    keys, stored = (size * torch.randn(n, WIDTH, generator=generator) for n in (places, K))
    output = torch.randn(VOCABULARY, WIDTH, generator=generator)
    tokens, values = (torch.randint(VOCABULARY, (n,), generator=generator) for n in (places, K))
    present = torch.rand(places, K, generator=generator) >= absent
    products = (keys @ stored.T).masked_fill(~present, -torch.inf)
    external = Found(-products, values.expand(places, K), present, torch.arange(K).expand(places, K))
    memories = [external] * bool(mixture.k) + [Cache(LENGTH).recall(keys, tokens)] * bool(mixture.length)
    logits = keys @ output.T
    evidence = Evidence(tuple(memories), Belief.from_logits(logits, keys, tokens))
    return logits, evidence, *(part.double().numpy() for part in (keys, output, stored)), tokens, values, present


def explicit(mixture, keys, output, stored, tokens, values, present):
    """P of every place over the vocabulary by the sum over all of it and all entries, float64 (n, vocabulary)."""
    result = []
    for place, query in enumerate(keys):
        whole, again = np.exp(output @ query), np.zeros(VOCABULARY)
        for age in range(1, min(mixture.length, place) + 1):
            score = query @ keys[place - age] / np.sqrt(WIDTH) / mixture.temperature - age * mixture.forgetting
            whole[tokens[place - age + 1]] += np.exp(score)
        for entry in np.flatnonzero(present[place]) if mixture.k else ():
            similarity = query @ stored[entry] / np.sqrt(WIDTH)
            whole[values[entry]] += np.exp(similarity / mixture.temperature)
            again[values[entry]] += np.exp(similarity / mixture.interpolation_temperature)
        weight = mixture.interpolation_weight * bool(again.sum())
        result.append((1 - weight) * whole / whole.sum() + weight * again / max(again.sum(), 1e-300))
    return np.array(result)


@settings(max_examples=25)
@given(
    st.floats(0.3, 5),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0, 1, LENGTH]),
    st.sampled_from([0, K]),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 3),
)
def test_it_is_the_softmax_over_vocabulary_and_memories(temperature, forgetting, length, k, weight, absent, seed):
    if not length and not k:
        length = 3
    mixture = TrimeMixture(
        temperature=temperature,
        forgetting=forgetting,
        length=length,
        k=k,
        interpolation_weight=weight * bool(k),
        interpolation_temperature=1.7,
    )
    logits, evidence, *parts = asked(mixture, seed=seed, absent=absent)
    lm = logits.log_softmax(dim=1)
    mixed = mixture.log_probs(lm, evidence)
    np.testing.assert_allclose(mixed.exp(), explicit(mixture, *parts), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(mixed.double().exp().sum(dim=1), 1, atol=1e-5)
    for target in range(VOCABULARY):
        one = mixture.target_log_probs(lm[:, target], torch.full((len(lm),), target), evidence)
        np.testing.assert_allclose(one.exp(), mixed[:, target].exp(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_empty_memories_give_the_model(form):
    mixture = FORMS[form]
    logits, evidence, *_ = asked(mixture, places=1, absent=1.0)
    lm = logits.log_softmax(dim=1)
    assert mixture.mix(evidence).weights.eq(0).all()
    assert mixture.log_probs(lm, evidence).equal(lm)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_neighbors_changes_nothing(form):
    mixture = FORMS[form]
    logits, evidence, *_ = asked(mixture, absent=0.3)
    lm = logits.log_softmax(dim=1)
    shuffled = []
    for found in evidence.memories:
        order = torch.randperm(found.tokens.shape[1], generator=torch.Generator().manual_seed(0))
        shuffled.append(Found(*(None if part is None else part[:, order] for part in found)))
    again = mixture.log_probs(lm, evidence._replace(memories=tuple(shuffled)))
    np.testing.assert_allclose(again.exp(), mixture.log_probs(lm, evidence).exp(), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_however_similar_memories_are_what_they_lack_stays_possible(form):
    mixture = FORMS[form]
    logits, evidence, *_ = asked(mixture, size=40.0)
    lm = torch.zeros_like(logits).log_softmax(dim=1)
    weights = mixture.mix(evidence).weights
    assert float(weights.sum(dim=1).max()) == pytest.approx(1 - 1e-4, abs=1e-6)
    mixed = mixture.log_probs(lm, evidence)
    assert mixed.isfinite().all()
    np.testing.assert_allclose(mixed.double().exp().sum(dim=1), 1, atol=1e-5)


def test_ages_weigh_as_the_drop_off_says():
    """Where all keys are alike, the shares fall by exp(−1 / τ) from one token to the next, whatever T."""
    keys, tokens = torch.ones(6, WIDTH), torch.arange(6)
    recalled = Cache(LENGTH).recall(keys, tokens)
    evidence = Evidence((recalled,), Belief.from_logits(torch.zeros(6, 6), keys, tokens))
    for temperature in (0.5, 2.0):
        mixture = TrimeMixture(temperature=temperature, forgetting=0.7, length=LENGTH)
        shares = mixture.mix(evidence).log_shares[0][5, :5]
        np.testing.assert_allclose(np.diff(shares), -0.7, atol=1e-5)
    mass = sum(np.exp(np.sqrt(WIDTH) / 2 - 0.7 * age) for age in range(1, 6))
    assert float(mixture.mix(evidence).weights[5, 0]) == pytest.approx(mass / (mass + 6), rel=1e-5)


def test_with_a_cache_alone_it_is_the_shared_cache_without_a_bias():
    mixture = FORMS["cache"]
    logits, evidence, *_ = asked(mixture)
    scale = 1 / (0.6 * WIDTH**0.5)
    other = SharedCacheMixture(bias=0.0, scale=scale, forgetting=0.02, length=LENGTH)
    lm = logits.log_softmax(dim=1)
    np.testing.assert_allclose(mixture.log_probs(lm, evidence), other.log_probs(lm, evidence), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive"),
        ({"interpolation_temperature": -1.0}, "interpolation_temperature is -1.0; expected a positive"),
        ({"interpolation_weight": 1.1}, "expected a number from 0"),
        ({"forgetting": -0.1}, "forgetting is -0.1; expected"),
        ({"forgetting": float("nan")}, "forgetting is nan; expected"),
        ({"length": -1}, "length is -1; expected"),
        ({"k": 2.5}, "k is 2.5; expected"),
        ({"length": 0, "k": 0}, "length and k are 0; expected"),
        ({"k": 0, "interpolation_weight": 0.1}, "k is 0; the second interpolation"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        TrimeMixture(**{"temperature": 1.0, "length": 3, "k": 3} | wrong)


def test_evidence_that_does_not_fit_is_refused():
    logits, evidence, *_ = asked(BOTH)
    lm = logits.log_softmax(dim=1)
    with pytest.raises(ConfigError, match="beliefs=True"):
        BOTH.log_probs(lm, evidence._replace(belief=None))
    nan = evidence.belief._replace(normalizer=torch.full((len(lm),), torch.nan))
    with pytest.raises(ConfigError, match="black box"):
        BOTH.log_probs(lm, evidence._replace(belief=nan))
    with pytest.raises(ConfigError, match="the datastore, then a Cache"):
        BOTH.log_probs(lm, evidence._replace(memories=evidence.memories[::-1]))


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded(form, tmp_path):
    FORMS[form].save(tmp_path / "trime.json")
    loaded = load_mixture(tmp_path / "trime.json")
    assert loaded == FORMS[form]
    assert "\n" not in loaded.describe()
    named = [("k 7" in loaded.describe(), bool(loaded.k)), ("last 12" in loaded.describe(), bool(loaded.length))]
    assert all(shown == is_there for shown, is_there in named)


# The fit: every target is drawn from the mixture itself.


def drawn(truth, places=2000, vocabulary=60, width=8, seed=0, alone=False):
    """Return a pass in which the truth is `truth`; without memory where `alone`."""
    generator = torch.Generator().manual_seed(seed)
    keys, stored = (2 * torch.randn(n, width, generator=generator) for n in (places, 300))
    tokens = torch.randint(vocabulary, (places,), generator=generator)
    values = torch.randint(vocabulary, (300,), generator=generator)
    logits = torch.randn(places, vocabulary, generator=generator) - 2.0  # a normalizer that memories can outweigh
    memories = []
    if truth.k:
        nearest = (keys @ stored.T).topk(truth.k)
        memories.append(
            Found(-nearest.values, values[nearest.indices], torch.ones_like(nearest.indices).bool(), nearest.indices)
        )
    if truth.length:
        memories.append(Cache(truth.length).recall(keys, tokens))
    lm, thinks = logits.log_softmax(dim=1), Belief.from_logits(logits, keys, tokens)
    evidence = Evidence(tuple(memories), thinks)
    targets = (lm if alone else truth.log_probs(lm, evidence)).exp().multinomial(1, generator=generator)[:, 0]
    return held_out(targets, lm.gather(1, targets[:, None])[:, 0], memories, thinks)


def test_the_fit_finds_the_temperature_and_the_forgetting_that_made_the_text():
    truth = TrimeMixture(temperature=1.6, forgetting=1 / 25, length=60)
    held = drawn(truth)
    fitted = fit_trime(held)
    assert fitted.temperature == pytest.approx(1.6, rel=0.1)
    assert fitted.forgetting == pytest.approx(1 / 25, rel=0.3)
    assert (fitted.length, fitted.k, fitted.interpolation_weight) == (60, 0, 0.0)
    score = float(held.log_probs(fitted).mean())
    assert score >= float(held.log_probs(truth).mean()) - 1e-5, "the fit is the optimum on its own text"
    assert fit_trime(held, forgets=False).forgetting == 0
    ageless = fit_trime(drawn(dataclasses.replace(truth, forgetting=0.0)))
    assert ageless.forgetting * 60 < 0.4, "the oldest weighs about as much as the newest"


@pytest.mark.parametrize("length", [0, 40])
def test_the_fit_finds_the_second_interpolation_that_made_the_text(length):
    settings = {"forgetting": 1 / 10} if length else {}
    truth = TrimeMixture(
        temperature=1.4, length=length, k=32, interpolation_weight=0.35, interpolation_temperature=0.5, **settings
    )
    held = drawn(truth, places=4000)
    fitted = fit_trime(held)
    assert fitted.temperature == pytest.approx(1.4, rel=0.2)
    assert fitted.interpolation_weight == pytest.approx(0.35, abs=0.07)
    assert fitted.interpolation_temperature == pytest.approx(0.5, rel=0.3)
    assert (fitted.length, fitted.k) == (length, 32)
    assert float(held.log_probs(fitted).mean()) >= float(held.log_probs(truth).mean()) - 1e-5
    once = fit_trime(held, interpolates=False)
    assert once.interpolation_weight == 0
    assert float(held.log_probs(once).mean()) < float(held.log_probs(fitted).mean()) - 0.01


def test_the_second_interpolation_is_left_out_where_it_gains_nothing():
    truth = TrimeMixture(temperature=1.4, k=32)
    fitted = fit_trime(drawn(truth, places=4000))
    assert fitted.interpolation_weight == 0
    assert fitted.temperature == pytest.approx(1.4, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_memories_that_found_nothing_can_be_fitted(form):
    _, evidence, *_ = asked(FORMS[form], places=1, absent=1.0)
    one = held_out(torch.tensor([3]), torch.tensor([-2.0]), evidence.memories, evidence.belief)
    np.testing.assert_allclose(one.log_probs(fit_trime(one)), -2, atol=1e-6)


def test_the_fit_needs_what_the_mixture_needs():
    truth = TrimeMixture(temperature=1.0, length=5)
    held = drawn(truth, places=50)
    with pytest.raises(ConfigError, match="beliefs=True"):
        fit_trime(dataclasses.replace(held, evidence=held.evidence._replace(belief=None)))


# With models.


@pytest.fixture(scope="module")
def memories(tmp_path_factory):
    """Return a function from a language model to a datastore of `TEXTS` with a metric."""
    folder, made = tmp_path_factory.mktemp("trime"), {}

    def make(lm, metric="inner_product", **settings):
        name = f"{lm.name}-{lm.windows.stride}-{metric}"
        if name not in made:
            made[name] = store(lm, TEXTS, folder / name, metric=metric, **settings)
        return made[name]

    return make


def of(form, memory):
    """Return the memories that a form is for."""
    mixture = FORMS[form]
    return [memory] * bool(mixture.k) + [Cache(LENGTH)] * bool(mixture.length)


def naive(lm, memory, mixture, ids):
    """log p of every target of one document that fits into a window, in float64."""
    lm_log_probs, queries = teacher_forced(lm.model, lm.site, ids[:-1])
    with torch.no_grad():
        normalizer = lm.model(input_ids=torch.as_tensor(ids[:-1])[None]).logits[0].double().logsumexp(dim=1).numpy()
    stored, values = stored_entries(memory.path)
    result = []
    for place, query in enumerate(queries):
        whole, again = np.exp(normalizer[place] + lm_log_probs[place]), np.zeros(lm_log_probs.shape[1])
        root = np.sqrt(len(query))
        for age in range(1, min(mixture.length, place) + 1):
            score = query @ queries[place - age] / root / mixture.temperature - age * mixture.forgetting
            whole[ids[place - age + 1]] += np.exp(score)
        if mixture.k:
            products = stored @ query
            nearest = products.argsort()[::-1][: mixture.k]
            np.add.at(whole, values[nearest], np.exp(products[nearest] / root / mixture.temperature))
            np.add.at(again, values[nearest], np.exp(products[nearest] / root / mixture.interpolation_temperature))
            again /= again.sum()
        weight, target = mixture.interpolation_weight, ids[place + 1]
        result.append(np.log((1 - weight) * whole[target] / whole.sum() + weight * again[target]))
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_evaluation_is_the_equation_within_each_document(family, form, memories):
    lm = lm_of(family)
    memory, mixture = memories(lm), FORMS[form]
    result = evaluate(lm, documents(NEW), of(form, memory), mixture, show_progress=False)
    expected = np.concatenate([naive(lm, memory, mixture, lm.tokenize(one).ids) for one in documents(NEW)])
    np.testing.assert_allclose(result.log_probs, expected, atol=2e-3)
    assert abs(result.log_probs - result.lm_log_probs).max() > 0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_attached_model_says_what_evaluation_says(family, form, memories):
    lm = lm_of(family)
    memory, mixture = of(form, memories(lm)), FORMS[form]
    document = Document(id="new", text=NEW[0])
    result = evaluate(lm, [document], memory, mixture, show_progress=False)
    ids = torch.from_numpy(lm.tokenize(document).ids)[None]
    with attach(lm.model, memory, mixture), torch.no_grad():
        out = lm.model(ids, labels=ids)
        first = lm.model(ids[:, :9], use_cache=True)
        second = lm.model(ids[:, 9:], past_key_values=first.past_key_values).logits
    found = out.logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(found, result.log_probs, atol=1e-4)
    assert float(out.loss) == pytest.approx(-result.log_probs.mean(), abs=1e-5)
    np.testing.assert_allclose(out.logits.logsumexp(dim=-1), 0, atol=1e-5)
    np.testing.assert_allclose(torch.cat([first.logits, second], dim=1), out.logits, atol=1e-3, err_msg="in two calls")


def greedy(model, ids, **settings):
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | settings
    return model.generate(ids, **({"attention_mask": torch.ones_like(ids)} | settings))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_written_text_is_what_whole_passes_say(family, memories):
    lm = lm_of(family)
    memory, ids = of("twice", memories(lm)), ids_of(PROMPTS[1])
    batch = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    assert batch["attention_mask"].min() == 0
    with attach(lm.model, memory, TWICE), torch.no_grad():
        whole = greedy(lm.model, ids)
        chunked = greedy(lm.model, ids, prefill_chunk_size=4)
        mixed = lm.model(whole, use_cache=False).logits
        mask = batch["attention_mask"]
        together = greedy(lm.model, batch["input_ids"], attention_mask=mask, pad_token_id=END_OF_TEXT_ID)
        alone = [greedy(lm.model, torch.tensor([lm.tokenizer(prompt)["input_ids"]])) for prompt in PROMPTS]
    mixed[..., END_OF_TEXT_ID] = -torch.inf  # `greedy` forbids it
    assert mixed[0, ids.shape[1] - 1 : -1].argmax(dim=-1).equal(whole[0, ids.shape[1] :])
    assert chunked.equal(whole)
    assert not whole.equal(greedy(lm.model, ids)), "the model alone writes something else"
    for row, single in zip(together, alone, strict=True):
        assert row[-12:].tolist() == single[0, -12:].tolist()


def overlapping():
    return LanguageModel(tiny_model("llama"), tiny_tokenizer(), "llama", context=4, stride=6, batch_tokens=20)


def test_documents_begin_with_nothing_and_windows_count_nothing_twice():
    lm, one = overlapping(), Document(id="long", text=" ".join(NEW))
    [found] = [batch.found for batch in retrieve(lm, Text(lm, one), Cache(LENGTH), [LENGTH], show_progress=False)]
    for place, (entries, present) in enumerate(zip(found.entries, found.present, strict=True)):
        assert entries[present].tolist() == list(range(place - 1, max(-1, place - 1 - LENGTH), -1))
    whole = evaluate(lm, documents(NEW), Cache(LENGTH), FORMS["cache"], show_progress=False)
    alone = [evaluate(lm, [item], Cache(LENGTH), FORMS["cache"], show_progress=False) for item in documents(NEW)]
    np.testing.assert_allclose(np.concatenate([item.log_probs for item in alone]), whole.log_probs, atol=1e-4)
    for item in alone:
        assert item.log_probs[0] == pytest.approx(item.lm_log_probs[0], abs=1e-6), "the first token has no past"


def test_windows_that_overlap_give_the_equation_over_their_own_keys(memories):
    """Each position's key and logits are those of the window that scores it."""
    lm = overlapping()
    memory, document = memories(lm), Document(id="new", text=NEW[0])
    result = evaluate(lm, [document], [memory, Cache(LENGTH)], TWICE, show_progress=False)
    [scored] = [_whole(lm.score([lm.tokenize(document).ids], beliefs=True))]
    rows, keys, normalizer, lm_log_probs, targets = scored
    assert rows.tolist() == list(range(len(rows)))
    stored, values = stored_entries(memory.path)
    for place, query in enumerate(keys):
        ages = range(1, 1 + min(LENGTH, place))
        scores = [query @ keys[place - age] / np.sqrt(32) / 0.6 - 0.02 * age for age in ages]
        tokens = [targets[place - age] for age in ages]
        products = stored @ query
        nearest = products.argsort()[::-1][:K]
        scores += (products[nearest] / np.sqrt(32) / 0.6).tolist()
        tokens += values[nearest].tolist()
        hits = np.array(tokens) == targets[place]
        right = np.exp(normalizer[place] + lm_log_probs[place]) + np.exp(scores) @ hits
        again = np.exp(products[nearest] / np.sqrt(32) / 2.0)
        again_right = again @ (values[nearest] == targets[place]) / again.sum()
        expected = 0.7 * right / (np.exp(normalizer[place]) + np.exp(scores).sum()) + 0.3 * again_right
        assert result.log_probs[place] == pytest.approx(np.log(expected), abs=2e-3)


def _whole(batches):
    """Join scored batches in the order of the text: rows, keys, normalizers, log p_LM, targets."""
    parts = [(b.rows, b.keys.double(), b.belief.normalizer.double(), b.log_probs.double(), b.targets) for b in batches]
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = joined[0].argsort()
    return [part[order].detach().numpy() for part in joined]


def test_long_caches_are_recalled_in_smaller_batches(monkeypatch):
    lm = overlapping()
    whole = evaluate(lm, documents(NEW), Cache(LENGTH), FORMS["cache"], show_progress=False)
    monkeypatch.setattr("memlm.evaluation._retrieval._FOUND_TOGETHER", 5 * LENGTH)
    batches = list(retrieve(lm, Text(lm, documents(NEW)), Cache(LENGTH), [LENGTH], show_progress=False))
    assert max(len(batch.rows) for batch in batches) == 5
    parts = evaluate(lm, documents(NEW), Cache(LENGTH), FORMS["cache"], show_progress=False)
    np.testing.assert_allclose(parts.log_probs, whole.log_probs, atol=1e-5)


def test_explanations_name_the_sources_of_both_memories(memories):
    lm = lm_of("llama")
    memory = of("twice", memories(lm))
    explanation = explain(lm, NEW[0], memory, TWICE, sources=20)
    result = evaluate(lm, [Document(id="new", text=NEW[0])], memory, TWICE, show_progress=False)
    tokens = explanation.tokens
    np.testing.assert_allclose([np.log(token.mixture) for token in tokens], result.log_probs[: len(tokens)], atol=1e-4)
    last = tokens[-1]
    assert {"this text", "document 0"} <= {source.document for token in tokens for source in token.sources}
    assert sum(source.share for source in last.sources) == pytest.approx(1, abs=1e-4)
    assert len(last.weights) == 2
    assert sum(last.weights) == pytest.approx(last.weight)
    assert "one softmax, temperature 0.6, k 7, last 12 tokens" in explanation.settings["mixture"]


# Memories and mixtures of other metrics.


KNN = KnnMixture(interpolation_weight=0.5, temperature=10.0, k=K)
MISMATCHES = {
    "kNN over inner products": (KNN, ["inner_product"], "squared L2 .* by inner product"),
    "TRIME over squared L2": (FORMS["datastore"], ["squared_l2"], "by inner product .* by squared L2"),
    "TRIME over both, the wrong way round": (BOTH, [None, "inner_product"], "by inner product .* is a Cache"),
    "a cache's over a datastore": (
        CacheMixture(interpolation_weight=0.1, scale=1.0, length=LENGTH),
        ["inner_product"],
        "is for a Cache, .* by inner product",
    ),
    "kNN over a cache": (KNN, [None], "squared L2 .* is a Cache"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_memory_of_another_metric_is_refused_wherever_it_meets_the_mixture(case, memories):
    mixture, metrics, message = MISMATCHES[case]
    lm = lm_of("llama")
    given = [Cache(LENGTH) if metric is None else memories(lm, metric) for metric in metrics]
    with pytest.raises(DatastoreMismatch, match=message):
        evaluate(lm, documents(NEW), given, mixture, show_progress=False)
    with pytest.raises(DatastoreMismatch, match=message):
        explain(lm, NEW[0], given, mixture)
    with pytest.raises(DatastoreMismatch, match=message), attach(lm.model, given, mixture):
        pytest.fail("it was attached")
    assert not hasattr(lm.model, "_memlm_attached")


def test_tuning_and_comparing_refuse_a_datastore_of_another_metric(memories):
    lm = lm_of("llama")
    by_product, by_distance = memories(lm), memories(lm, "squared_l2")
    for kind in ("knn", "exponential", "adapter", "auto"):
        with pytest.raises(DatastoreMismatch, match=f"'{kind}' is for .* squared L2 .* by inner product"):
            tune(lm, by_product, documents(NEW), kind=kind, show_progress=False)
    with pytest.raises(DatastoreMismatch, match=r"squared L2 .* by inner product"):
        compare(lm, by_product, documents(NEW), documents(NEW), show_progress=False)
    for wrong in (by_distance, [by_distance, Cache(5)]):
        with pytest.raises(DatastoreMismatch, match=r"'trime' is for .* inner product .* by squared L2"):
            tune(lm, wrong, documents(NEW), kind="trime", show_progress=False)
    for wrong in ([Cache(5), by_product], [by_product, by_product], [Cache(5), Cache(5)]):
        with pytest.raises(ConfigError, match="a datastore, a Cache, or both in this order"):
            tune(lm, wrong, documents(NEW), kind="trime", show_progress=False)


def test_tuning_reports_what_evaluation_finds(memories, monkeypatch):
    lm = lm_of("llama")
    own = [text + " again" for text in TEXTS]  # not the stored documents themselves
    memory = [memories(lm), Cache(LENGTH)]
    report = tune_report(lm, memory, documents(own), kind="trime", max_k=K, show_progress=False)
    result = evaluate(lm, documents(own), memory, report.mixture, show_progress=False)
    assert report.helps
    assert isinstance(report.mixture, TrimeMixture)
    assert (report.mixture.k, report.mixture.length) == (K, LENGTH)
    assert report.perplexity == pytest.approx(result.results[1].perplexity, rel=1e-4)
    assert report.lm_perplexity == pytest.approx(result.results[0].perplexity, rel=1e-4)
    assert report.perplexity < 0.3 * report.lm_perplexity
    assert "memory helps: perplexity" in report.verdict()
    json.dumps(report.to_dict(), allow_nan=False)
    monkeypatch.setattr("memlm.evaluation._tune_trime._KEPT", -(-report.tokens * (K + LENGTH) // 2))
    thinned = tune_trime(lm, memory, documents(own), max_k=K, max_tokens=None, show_progress=False)
    assert thinned.tokens == -(-report.tokens // 2)
    assert thinned.lm_perplexity == pytest.approx(np.exp(-result.lm_log_probs[::2].mean()), rel=1e-4)


def test_a_useless_memory_is_said_to_be_one(memories):
    lm = lm_of("llama")
    with pytest.warns(UserWarning, match="memory does not help here: .*; leave the memory out"):
        mixture = tune(lm, Cache(4), documents(["0123456789", "abcdefghij"]), kind="trime", show_progress=False)
    assert mixture.length == 4


def test_weights_are_capped_together():
    weights = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.0, 0.0], [0.5, 0.2]])
    capped = ops.capped(weights)
    np.testing.assert_allclose(capped.sum(dim=1), [1 - 1e-4, 1 - 1e-4, 0, 0.7], atol=1e-6)
    np.testing.assert_allclose(capped[0] / capped[0].sum(), [0.7, 0.3], atol=1e-6)

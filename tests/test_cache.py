"""The continuous cache: what it recalls, the paper's equations, its fits, and text written with it."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

import tiny_memories
from memlm import Document, attach, evaluate, explain, ops
from memlm.cache import Cache
from memlm.errors import ConfigError, KeyOverflow, ModelError
from memlm.evidence import MOST_ENTRIES, Belief, Evidence
from memlm.mixtures import CacheMixture, GateMixture, SharedCacheMixture, TrimeMixture, fit_cache, fit_shared_cache
from memlm.mixtures._gate import gate_features, member_mixes
from memlm.models import LanguageModel
from oracle import teacher_forced
from planted import belief, held_out, indifferent, memory, network
from tiny_memories import FIVE, documents, ids_of, lm_of
from tiny_models import END_OF_TEXT_ID, tiny_model, tiny_tokenizer

VOCABULARY, WIDTH, LENGTH = 13, 4, 24
PROMPTS = ["the rain was", "in the house and the letter, and in the house"]
NEW = ["the cat was in the rain and the cat was in the rain", "x", "the bird, the bird and the bird in the bird house"]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.set_verbosity_error()  # hints about generation settings
    yield
    logging.set_verbosity_warning()


def past(places, seed=0):
    """Keys and tokens of one document."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(places, WIDTH, generator=generator), torch.randint(VOCABULARY, (places,), generator=generator)


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 29), st.sampled_from([0.0, 0.3]))
def test_recall_is_a_look_at_every_earlier_place(places, length, first, padding):
    keys, tokens = past(places)
    first = min(first, places - 1)
    known = torch.rand(places, generator=torch.Generator().manual_seed(places)) >= padding
    found = Cache(length).recall(keys, tokens, first, known=known if padding else None)
    assert found.tokens.shape == (places - first, length)
    exact = keys.double().numpy()
    for line, place in enumerate(range(first, places)):
        for column, age in enumerate(range(1, length + 1)):
            entry = place - age
            exists = entry >= 0 and (not padding or bool(known[entry] & known[entry + 1]))
            assert bool(found.present[line, column]) == exists
            if exists:
                assert int(found.ages[line, column]) == age
                assert int(found.entries[line, column]) == entry
                assert int(found.tokens[line, column]) == int(tokens[entry + 1])
                assert float(found.distances[line, column]) == pytest.approx(-exact[place] @ exact[entry], abs=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_that_are_not_finite_are_refused(wrong, dtype):
    keys, tokens = past(30)
    keys = keys.to(dtype)
    keys[12, 1] = wrong
    for asking in (slice(None), slice(12, 13), slice(13, 14), slice(20, 21)):
        first, stop, _ = asking.indices(30)
        with pytest.raises(KeyOverflow, match="keys that are NaN or infinite; check its weights and its dtype"):
            Cache(8).recall(keys, tokens, first, stop)
    Cache(8).recall(keys, tokens, 21, 30)  # which looks back no further than to 13
    Cache(8).recall(keys, tokens, 0, 12)


def test_padding_may_have_any_keys():
    keys, tokens = past(30)
    known = torch.arange(30) >= 5
    expected = Cache(8).recall(keys, tokens, known=known)
    keys[:5] = torch.nan
    found = Cache(8).recall(keys, tokens, known=known)
    pairs = zip(found, expected, strict=True)
    assert all(part[5:].equal(other[5:]) for part, other in pairs if part is not None)
    assert not found.distances.isnan().any()


def test_a_model_whose_keys_overflow_is_refused_wherever_a_cache_is_used():
    """Only one token's embedding is NaN, so that the model passes for sound until it is read."""
    model, (token,) = tiny_model("llama"), tiny_tokenizer()("z")["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    lm = LanguageModel(model, tiny_tokenizer(), "overflowing")
    text, ids = documents(["the cat. z. the cat"]), ids_of("the cat. z. the cat")
    for use in (
        lambda: evaluate(lm, text, Cache(64), sharp(lm_of("llama")), show_progress=False),
        lambda: explain(lm, text[0].text, Cache(64), sharp(lm_of("llama"))),
        lambda: lm.model(ids),
        lambda: greedy(lm.model, ids),
    ):
        with attach(model, Cache(64), sharp(lm_of("llama"))), pytest.raises(KeyOverflow, match="NaN or infinite"):
            use()


def test_long_texts_are_recalled_block_by_block(monkeypatch):
    keys, tokens = past(50)
    whole = Cache(7).recall(keys, tokens, 3, 41)
    monkeypatch.setattr("memlm.cache._BLOCK", 8)
    for one, other in zip(whole[:5], Cache(7).recall(keys, tokens, 3, 41)[:5], strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert Cache(7).recall(keys, tokens, 3, 3).tokens.shape == (0, 7)


@pytest.mark.parametrize("length", [0, -1, 2.0, True, "8"])
def test_lengths_that_cannot_be_are_refused(length):
    with pytest.raises(ConfigError, match="expected a whole number"):
        Cache(length)


def asked(places=20, length=LENGTH, seed=0):
    """Return (what the places of a document find, logits made by an output embedding, that embedding, keys, tokens)."""
    keys, tokens = past(places, seed)
    output = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    logits = keys @ output.T
    evidence = Evidence((Cache(length).recall(keys, tokens),), Belief.from_logits(logits, keys, tokens))
    return evidence, logits, output.double().numpy(), keys.double().numpy(), tokens.numpy()


@settings(max_examples=20)
@given(st.integers(1, 12), st.floats(0, 3), st.sampled_from([0.0, 0.2]), st.floats(-4, 4), st.floats(0, 1))
def test_both_forms_are_the_equations_of_the_paper(length, scale, forgetting, bias, weight):
    """Linear: eq. 3–4. One softmax: the explicit sum over vocabulary and cache, eq. 5."""
    evidence, logits, output, keys, tokens = asked(length=length)
    shared = {"scale": scale, "forgetting": forgetting, "length": length}
    one_softmax = SharedCacheMixture(bias=bias, **shared).log_probs(logits.log_softmax(1), evidence).exp()
    linear = CacheMixture(interpolation_weight=weight, **shared).log_probs(logits.log_softmax(1), evidence).exp()
    lambdas = SharedCacheMixture(bias=bias, **shared).mix(evidence).weights[:, 0]
    for place in range(len(keys)):
        of_vocabulary, cache = np.exp(output @ keys[place]), np.zeros(VOCABULARY)
        for age in range(1, min(length, place) + 1):
            score = scale * keys[place] @ keys[place - age] - age * forgetting
            cache[tokens[place - age + 1]] += np.exp(score)
        whole = of_vocabulary + np.exp(bias) * cache
        lm = of_vocabulary / of_vocabulary.sum()
        uncapped = np.exp(bias) * cache.sum() / whole.sum()
        assert float(lambdas[place]) == pytest.approx(uncapped, rel=1e-3, abs=1e-6)
        if uncapped < ops.LARGEST:
            np.testing.assert_allclose(one_softmax[place], whole / whole.sum(), rtol=1e-3, atol=1e-6)
        else:
            expected = ops.LARGEST * cache / cache.sum() + (1 - ops.LARGEST) * lm
            np.testing.assert_allclose(one_softmax[place], expected, rtol=2e-3, atol=1e-6)
        if place:
            expected = weight * cache / cache.sum() + (1 - weight) * lm
            np.testing.assert_allclose(linear[place], expected, rtol=1e-3, atol=1e-6)
        else:
            np.testing.assert_allclose(linear[0], lm, rtol=1e-5)


@pytest.mark.parametrize("mass", [9.2, 9.22, 20.0, 60.0, 1e4])
def test_one_softmax_never_erases_the_model(mass):
    """Ten equal logits and a cache that holds token 0 alone; σ(17) and more is 1 in float32."""
    found = memory(torch.tensor([[0]]), torch.tensor([[-mass]]))._replace(ages=torch.tensor([[1]]))
    logits = torch.full((1, 10), -math.log(10))
    evidence = Evidence((found,), Belief.from_logits(logits, torch.zeros(1, 2), torch.zeros(1).long()))
    mixture = SharedCacheMixture(bias=0.0, scale=1.0, length=1)
    weight = min(1 / (1 + math.exp(-mass)), ops.LARGEST)
    expected = math.log(1 - weight) - math.log(10)
    for target, log_prob in ((3, expected), (0, math.log(weight + math.exp(expected)))):
        said = mixture.target_log_probs(logits[:, 0], torch.tensor([target]), evidence)
        assert float(said) == pytest.approx(log_prob, abs=2e-3)
        assert float(mixture.log_probs(logits, evidence)[0, target]) == pytest.approx(log_prob, abs=2e-3)


MIXTURES = {
    "linear": CacheMixture(interpolation_weight=0.4, scale=1.0, forgetting=0.01, length=LENGTH),
    "shared": SharedCacheMixture(bias=-1.0, scale=1.0, forgetting=0.01, length=LENGTH),
}


@pytest.mark.parametrize("form", MIXTURES)
def test_both_forms_are_distributions(form):
    mixture = MIXTURES[form]
    for length in (1, 5, LENGTH, LENGTH + 9):  # a cache may remember more than the mixture looks at
        evidence, logits, *_ = asked(40, length)
        lm = logits.log_softmax(dim=1)
        mixed = mixture.log_probs(lm, evidence)
        np.testing.assert_allclose(mixed.double().exp().sum(dim=1), 1, atol=1e-5)
        np.testing.assert_allclose(mixed[0], lm[0], atol=1e-6, err_msg="the first place has no past")
        for target in range(VOCABULARY):
            one = mixture.target_log_probs(lm[:, target], torch.full((len(lm),), target), evidence)
            np.testing.assert_allclose(one.exp(), mixed[:, target].exp(), rtol=1e-4, atol=1e-6)
        order = torch.randperm(min(length, LENGTH), generator=torch.Generator().manual_seed(0))
        found = evidence.memories[0]
        permuted = evidence._replace(memories=(found.each(lambda part, order=order: part[:, order]),))
        again = mixture.log_probs(lm, permuted)
        np.testing.assert_allclose(again.exp(), mixed.exp(), atol=1e-6)
    longer, same = asked(40, LENGTH + 9), asked(40, LENGTH)
    lm = same[1].log_softmax(dim=1)
    np.testing.assert_allclose(mixture.log_probs(lm, longer[0]), mixture.log_probs(lm, same[0]), atol=1e-6)


def test_descriptions_name_the_past():
    def said(**more):
        return CacheMixture(interpolation_weight=0.1, scale=2.0, **more).describe()

    assert said(length=1) == "λ 0.100, θ 2, the last token"
    assert said(length=2048, forgetting=1 / 1500) == "λ 0.100, θ 2, last 2,048 tokens, forgetting in 1,500 tokens"
    assert said(length=5, forgetting=math.exp(4)).endswith(", forgetting in 0.018 tokens")
    assert (
        TrimeMixture(temperature=1.0, length=5, forgetting=0.4)
        .describe()
        .endswith("last 5 tokens, forgetting in 2.5 tokens")
    )


def test_what_cannot_work_is_refused():
    evidence, logits, *_ = asked()
    for wrong in ({"scale": -1.0}, {"scale": float("inf")}, {"forgetting": -0.1}, {"length": 0}):
        for make in (partial(CacheMixture, interpolation_weight=0.1), partial(SharedCacheMixture, bias=0.0)):
            with pytest.raises(ConfigError, match="expected"):
                make(**{"scale": 1.0} | wrong)
    with pytest.raises(ConfigError, match="expected"):
        SharedCacheMixture(bias=float("nan"), scale=1.0)
    with pytest.raises(ConfigError, match="beliefs=True"):
        MIXTURES["shared"].log_probs(logits, evidence._replace(belief=None))
    of_black_box = belief(logits)._replace(normalizer=torch.full((len(logits),), torch.nan))
    with pytest.raises(ConfigError, match="black box"):
        MIXTURES["shared"].log_probs(logits, evidence._replace(belief=of_black_box))
    datastore = memory(torch.zeros(20, 2).long(), torch.zeros(20, 2))
    with pytest.raises(ConfigError, match="pass a Cache"):
        MIXTURES["linear"].log_probs(logits, Evidence((datastore,)))


def written(scale, forgetting, weight=0.7, places=1500, length=60, seed=0):
    """A text whose every token is drawn from its past with probability `weight`, and else from 50 tokens alike."""
    generator = np.random.default_rng(seed)
    keys = generator.standard_normal((places, 8))
    tokens = np.zeros(places + 1, np.int64)
    for place in range(places):
        tokens[place + 1] = generator.integers(50)
        if place and generator.random() < weight:
            entries = np.arange(max(0, place - length), place)
            scores = scale * keys[entries] @ keys[place] - forgetting * (place - entries)
            shares = np.exp(scores - scores.max())
            tokens[place + 1] = tokens[generator.choice(entries, p=shares / shares.sum()) + 1]
    tokens = torch.from_numpy(tokens)
    found = Cache(length).recall(torch.from_numpy(keys).float(), tokens[:-1])
    return held_out(tokens[1:], torch.full((places,), 1 / 50).log(), [found], indifferent(places))


def test_fits_find_the_scale_and_the_forgetting_that_made_the_text():
    held = written(scale=0.6, forgetting=1 / 15)
    fitted = fit_cache(held, forgets=True)
    assert fitted.scale == pytest.approx(0.6, rel=0.15)
    assert 1 / fitted.forgetting == pytest.approx(15, rel=0.25)
    assert fitted.interpolation_weight == pytest.approx(0.7, abs=0.05)
    ageless = fit_cache(held, forgets=False)
    assert ageless.forgetting == 0
    test = written(scale=0.6, forgetting=1 / 15, seed=1)
    score = float(test.log_probs(fitted).mean())
    assert score > float(test.log_probs(ageless).mean()) + 0.03
    truth = CacheMixture(interpolation_weight=0.7, scale=0.6, forgetting=1 / 15, length=60)
    assert score > float(test.log_probs(truth).mean()) - 0.01


def test_fits_forget_nothing_where_nothing_is_forgotten():
    fitted = fit_cache(written(scale=0.6, forgetting=0.0), forgets=True)
    assert fitted.forgetting * 60 < 0.3, "the oldest weighs about as much as the newest"
    assert fitted.scale == pytest.approx(0.6, rel=0.15)


def test_the_fit_of_one_softmax_finds_the_bias_that_made_the_text():
    """Every target is drawn from the mixture itself; the cache weighs more where it resembles the present."""
    generator = torch.Generator().manual_seed(0)
    keys, tokens = torch.randn(1500, 8, generator=generator), torch.randint(50, (1500,), generator=generator)
    lm = torch.randn(1500, 50, generator=generator).log_softmax(dim=1)
    evidence = Evidence((Cache(40).recall(keys, tokens),), Belief.from_logits(lm + 2.0, keys, tokens))
    truth = SharedCacheMixture(bias=-3.0, scale=0.7, forgetting=0.05, length=40)
    targets = truth.log_probs(lm, evidence).exp().multinomial(1, generator=generator)[:, 0]
    held = held_out(targets, lm.gather(1, targets[:, None])[:, 0], evidence.memories, evidence.belief)
    fitted = fit_shared_cache(held, forgets=True)
    assert fitted.scale == pytest.approx(0.7, rel=0.2)
    assert fitted.bias == pytest.approx(-3.0, abs=0.5)
    assert fitted.forgetting == pytest.approx(0.05, rel=0.5)
    assert fit_shared_cache(held, forgets=False).forgetting == 0
    assert float(held.log_probs(fitted).mean()) >= float(held.log_probs(truth).mean()) - 1e-4


@pytest.mark.parametrize("fit", [fit_cache, fit_shared_cache])
def test_texts_without_a_past_can_be_fitted(fit):
    """One target a document: every cache is empty."""
    found = Cache(5).recall(*past(1))
    found = found.each(lambda part: part.repeat(30, 1))
    held = held_out(torch.zeros(30).long(), torch.full((30,), -1.0), [found], indifferent(30))
    np.testing.assert_allclose(held.log_probs(fit(held, forgets=True)), -1, atol=1e-6)


@pytest.fixture(scope="module")
def attachable(tmp_path_factory):
    return partial(tiny_memories.attachable, tmp_path_factory.mktemp("memories"))


def sharp(lm, form="linear", length=64):
    """A cache mixture that changes what the model says."""
    with torch.no_grad():
        keys = torch.cat([keys for _, keys in lm.keys([lm.tokenize(document).ids for document in documents(NEW)])])
    scale = 2 / float((keys.float() @ keys.float().T).std())
    if form == "linear":
        return CacheMixture(interpolation_weight=0.6, scale=scale, forgetting=0.05, length=length)
    with torch.no_grad():
        output = lm.model(ids_of(NEW[0])).logits.logsumexp(dim=-1).mean()
    return SharedCacheMixture(bias=float(output) - 3.0, scale=scale, forgetting=0.05, length=length)


def naive(lm, mixture, ids):
    """log p of every target of one document that fits into a window, in float64, by the linear form's equation."""
    site = lm.site
    lm_log_probs, keys = teacher_forced(lm.model, site, ids[:-1])
    result = []
    for place, target in enumerate(ids[1:]):
        cache = np.zeros(lm_log_probs.shape[1])
        for age in range(1, min(mixture.length, place) + 1):
            cache[ids[place - age + 1]] += np.exp(
                mixture.scale * keys[place] @ keys[place - age] - age * mixture.forgetting
            )
        weight = mixture.interpolation_weight * bool(place)
        share = cache[target] / max(cache.sum(), 1e-300)
        result.append(np.log(weight * share + (1 - weight) * np.exp(lm_log_probs[place, target])))
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_evaluation_is_the_equation_within_each_document(family):
    lm = lm_of(family)
    mixture = sharp(lm, length=9)
    result = evaluate(lm, documents(NEW), Cache(9), mixture, show_progress=False)
    expected = np.concatenate([naive(lm, mixture, lm.tokenize(document).ids) for document in documents(NEW)])
    np.testing.assert_allclose(result.log_probs, expected, atol=1e-3)
    assert abs(result.log_probs - result.lm_log_probs).max() > 1
    assert result.settings["memories"] == [{"cache": 9}]
    longer = evaluate(lm, documents(NEW), Cache(30), mixture, show_progress=False)
    np.testing.assert_allclose(longer.log_probs, result.log_probs, atol=1e-6, err_msg="the mixture looks at nine")


def test_a_cache_that_remembers_less_than_the_mixture_looks_at_is_refused(attachable):
    lm, store, knn = attachable("llama")
    for remembered, mixture in (
        (Cache(9), sharp(lm, length=10)),
        (Cache(9), sharp(lm, "shared", length=10)),
        (Cache(9), TrimeMixture(temperature=1.0, length=10)),
        ([store, Cache(63)], gate_over(lm, store, knn)),
    ):
        said = r"looks at the last (10|64) tokens, but the cache remembers (9|63); pass Cache\((10|64)\)"
        with pytest.raises(ConfigError, match=said):
            evaluate(lm, documents(NEW), remembered, mixture, show_progress=False)
        with pytest.raises(ConfigError, match=said):
            explain(lm, NEW[0], remembered, mixture)
        with pytest.raises(ConfigError, match=said), attach(lm.model, remembered, mixture):
            pytest.fail("it was attached")


def test_a_cache_reaches_over_windows_and_groups(monkeypatch):
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(), "llama", context=4, stride=6, batch_tokens=20)
    mixture = sharp(lm, length=30)
    whole = evaluate(lm, documents(NEW), Cache(30), mixture, show_progress=False)
    monkeypatch.setattr("memlm.evaluation._retrieval._GROUP", 10)
    monkeypatch.setattr("memlm.evaluation._retrieval._SEARCHED_TOGETHER", 7)
    parts = evaluate(lm, documents(NEW), Cache(30), mixture, show_progress=False)
    np.testing.assert_allclose(parts.log_probs, whole.log_probs, atol=1e-4)
    alone = [evaluate(lm, [one], Cache(30), mixture, show_progress=False).log_probs for one in documents(NEW)]
    np.testing.assert_allclose(np.concatenate(alone), whole.log_probs, atol=1e-4)


@pytest.mark.parametrize("form", MIXTURES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_pass_of_an_attached_model_says_what_evaluation_says(family, form):
    lm = lm_of(family)
    mixture = sharp(lm, form)
    document = Document(id="new", text=NEW[0])
    result = evaluate(lm, [document], Cache(64), mixture, show_progress=False)
    ids = torch.from_numpy(lm.tokenize(document).ids)[None]
    with attach(lm.model, Cache(70), mixture), torch.no_grad():
        out = lm.model(ids, labels=ids)
        kept = lm.model(ids, logits_to_keep=torch.tensor([2, 9])).logits
    found = out.logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(found, result.log_probs, atol=1e-4)
    assert float(out.loss) == pytest.approx(-result.log_probs.mean(), abs=1e-5)
    np.testing.assert_allclose(kept, out.logits[:, [2, 9]], atol=1e-5)
    np.testing.assert_allclose(out.logits.logsumexp(dim=-1), 0, atol=1e-5)
    assert abs(result.log_probs - result.lm_log_probs).max() > 0.5


@pytest.mark.parametrize("site", ["final_norm_output", "model.layers.0.mlp"])
def test_a_cache_alone_reads_keys_where_the_language_model_does(site):
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer(), "llama", key_site=site)
    assert lm.site != lm_of("llama").site
    mixture, document = sharp(lm), Document(id="new", text=NEW[0])
    result = evaluate(lm, [document], Cache(64), mixture, show_progress=False)
    usual = evaluate(lm_of("llama"), [document], Cache(64), mixture, show_progress=False)
    assert abs(usual.log_probs - result.log_probs).max() > 0.1, "the site makes no difference"
    ids = torch.from_numpy(lm.tokenize(document).ids)[None]
    with attach(lm.model, Cache(64), mixture), torch.no_grad():
        mixed = lm.model(ids).logits[0, :-1]
    np.testing.assert_allclose(mixed.gather(1, ids[0, 1:, None])[:, 0], result.log_probs, atol=1e-4)


def gate_over(lm, store, knn):
    """A gate of random weights over a datastore and a cache."""
    members = (knn, sharp(lm))
    found = store.lookup(np.zeros((3, store.width), np.float32), knn.k)
    recalled = Cache(64).recall(torch.zeros(3, 2), torch.zeros(3).long())
    evidence = Evidence((found, recalled), belief(torch.zeros(3, 5)))
    inputs = gate_features(members, member_mixes(members, evidence), evidence).shape[1]
    return GateMixture(members=members, network=network(inputs, 3, size=0.2))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_datastore_and_a_cache_under_one_gate(family, attachable):
    lm, store, knn = attachable(family)
    mixture, memories = gate_over(lm, store, knn), [store, Cache(64)]
    document = Document(id="new", text=NEW[0])
    result = evaluate(lm, [document], memories, mixture, show_progress=False)
    assert result.settings["memories"][1] == {"cache": 64}
    ids = torch.from_numpy(lm.tokenize(document).ids)[None]
    with attach(lm.model, memories, mixture), torch.no_grad():
        mixed = lm.model(ids).logits
        written = greedy(lm.model, ids[:, :8])
        again = greedy(lm.model, ids[:, :8], use_cache=False)
    np.testing.assert_allclose(mixed[0, :-1].gather(1, ids[0, 1:, None])[:, 0], result.log_probs, atol=1e-4)
    np.testing.assert_allclose(mixed.logsumexp(dim=-1), 0, atol=1e-5)
    assert written.equal(again)
    for place, memory_alone in enumerate((store, Cache(64))):
        alone = evaluate(lm, [document], memory_alone, mixture.members[place], show_progress=False)
        assert abs(alone.log_probs - result.log_probs).max() > 0.1


def test_positions_are_mixed_in_parts_where_much_is_found(monkeypatch):
    lm = lm_of("llama")
    ids = ids_of(NEW[0]).repeat(2, 1)
    ids[1] = ids[1].flip(0)
    longest = sharp(lm, length=MOST_ENTRIES)
    with torch.no_grad(), attach(lm.model, Cache(64), sharp(lm)):
        expected = lm.model(ids, logits_to_keep=torch.tensor([9, 2, 20])).logits
    with torch.no_grad(), attach(lm.model, Cache(MOST_ENTRIES), longest):
        assert lm.model(ids, logits_to_keep=torch.tensor([9, 2, 20])).logits.equal(expected), "the past is no longer"
        monkeypatch.setattr("memlm.models._attach._FOUND_TOGETHER", 2 * ids.shape[1])
        seen = []
        recall = Cache.recall
        monkeypatch.setattr(Cache, "recall", lambda *given, **more: seen.append(given) or recall(*given, **more))
        parts = lm.model(ids, logits_to_keep=torch.tensor([9, 2, 20])).logits
    np.testing.assert_allclose(parts, expected, atol=1e-5)
    assert len(seen) == 6, "three places, one at a time, in two rows"


def greedy(model, ids, tokens=12, **settings):
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False} | settings
    return model.generate(ids, **({"attention_mask": torch.ones_like(ids)} | settings))


@pytest.mark.parametrize("family", [*FIVE, "mistral", "bloom"])
def test_written_step_by_step_is_what_whole_passes_say(family):
    """Greedy text is the argmax of one pass over it, which has no cache of keys and values to carry anything in."""
    lm = lm_of(family)
    ids = ids_of(PROMPTS[1])
    with attach(lm.model, Cache(16), sharp(lm, length=16)), torch.no_grad():
        whole = greedy(lm.model, ids)
        mixed = lm.model(whole, use_cache=False).logits
    mixed[..., END_OF_TEXT_ID] = -torch.inf  # `greedy` forbids it
    assert mixed[0, ids.shape[1] - 1 : -1].argmax(dim=-1).equal(whole[0, ids.shape[1] :])
    assert not whole.equal(greedy(lm.model, ids)), "the model alone writes something else"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant", "chunked prefill", "no cache"])
def test_other_ways_to_decode_give_the_same_text(family, way):
    lm = lm_of(family)
    ids = ids_of("the rain was in the rain was in the")
    settings = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": tiny_model(family, seed=1)},
        "chunked prefill": {"prefill_chunk_size": 4},
        "no cache": {"use_cache": False},
    }[way]
    with attach(lm.model, Cache(16), sharp(lm, "shared", 16)):
        assert greedy(lm.model, ids, **settings).equal(greedy(lm.model, ids))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_past_follows_beams(family):
    lm = lm_of(family)
    ids = ids_of(PROMPTS[1])
    settings = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    with attach(lm.model, Cache(16), sharp(lm, length=16)), torch.no_grad():
        out = greedy(lm.model, ids, 6, length_penalty=0.0, min_new_tokens=None, eos_token_id=None, **settings)
        log_probs = lm.model(out.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    new = out.sequences[:, ids.shape[1] :, None]
    assert new.shape[1] == 6
    assert torch.allclose(log_probs.gather(2, new).sum(dim=(1, 2)), out.sequences_scores, atol=1e-4)
    indices = out.beam_indices[:, :6].numpy()
    assert (np.diff(indices, axis=1) != 0).any(), "beams were reordered"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_left_padded_batch_is_as_one_at_a_time(family):
    lm = lm_of(family)
    batch = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    assert batch["attention_mask"].min() == 0
    with attach(lm.model, Cache(16), sharp(lm, length=16)):
        together = greedy(
            lm.model, batch["input_ids"], attention_mask=batch["attention_mask"], pad_token_id=END_OF_TEXT_ID
        )
        alone = [greedy(lm.model, torch.tensor([lm.tokenizer(prompt)["input_ids"]])) for prompt in PROMPTS]
    for row, single in zip(together, alone, strict=True):
        assert row[-12:].tolist() == single[0, -12:].tolist()


@pytest.mark.parametrize("ways", ["names", "places"])
def test_padding_is_no_past_however_the_mask_is_passed(ways):
    lm = lm_of("llama")
    batch = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    blank = int((mask[0] == 0).sum())
    with attach(lm.model, Cache(16), sharp(lm, length=16)), torch.no_grad():
        alone = lm.model(ids[:1, blank:]).logits
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        together = (
            lm.model(ids, mask, positions) if ways == "places"
            else lm.model(input_ids=ids, attention_mask=mask, position_ids=positions)
        ).logits  # fmt: skip
    np.testing.assert_allclose(together[0, blank:], alone[0], atol=1e-3)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_a_text_can_be_read_in_two_calls(return_dict, labels):
    lm = lm_of("llama")
    ids = ids_of(NEW[0])
    with attach(lm.model, Cache(16), sharp(lm, length=16)), torch.no_grad():
        whole = lm.model(ids).logits
        settings = {"labels": ids[:, :9]} if labels else {}
        first = lm.model(ids[:, :9], use_cache=True, return_dict=return_dict, **settings)
        known = first.past_key_values if return_dict else next(item for item in first if isinstance(item, DynamicCache))
        second = lm.model(ids[:, 9:], past_key_values=known).logits
        np.testing.assert_allclose(second, whole[:, 9:], atol=1e-4)
        known.crop(-(ids.shape[1] - 11))
        np.testing.assert_allclose(lm.model(ids[:, 11:], past_key_values=known).logits, whole[:, 11:], atol=1e-4)


def test_a_past_that_the_memory_has_not_seen_is_refused():
    lm = lm_of("llama")
    ids = ids_of(NEW[0])
    with torch.no_grad():
        outside = lm.model(ids[:, :5], use_cache=True).past_key_values
        with (
            attach(lm.model, Cache(64), sharp(lm)),
            pytest.raises(ModelError, match=r"5 earlier tokens.*inside the block"),
        ):
            lm.model(ids[:, 5:], past_key_values=outside)
        with attach(lm.model, Cache(64), sharp(lm)):
            inside = lm.model(ids[:, :5], use_cache=True).past_key_values
        lm.model(ids[:, 5:7], past_key_values=inside)
        with attach(lm.model, Cache(64), sharp(lm)), pytest.raises(ModelError, match=r"7 earlier tokens.*has seen 5"):
            lm.model(ids[:, 7:], past_key_values=inside)


def test_caches_that_cannot_carry_keys_are_refused():
    lm = lm_of("llama")
    ids = ids_of(NEW[0])
    static = StaticCache(config=lm.model.config, max_cache_len=40)
    with attach(lm.model, Cache(64), sharp(lm)), torch.no_grad():
        with pytest.raises(ModelError, match="StaticCache; use the default cache"):
            lm.model(ids, past_key_values=static)
        with pytest.raises(ModelError, match="StaticCache"):
            greedy(lm.model, ids, cache_implementation="static", disable_compile=True)
        with pytest.raises(ModelError, match="pass input_ids"):
            lm.model(inputs_embeds=lm.model.get_input_embeddings()(ids))


def test_leaving_the_block_leaves_the_model_alone():
    lm = lm_of("llama")
    ids = ids_of(NEW[0])
    with torch.no_grad():
        before = lm.model(ids).logits
        with attach(lm.model, Cache(64), sharp(lm)):
            assert not lm.model(ids).logits.equal(before)
        assert lm.model(ids).logits.equal(before)


def test_the_weight_of_an_empty_cache_is_zero():
    empty = torch.tensor([-torch.inf, 0.0])
    weights = ops.shared_softmax_weight(empty, torch.tensor([3.0, 0.0]), 0.0)
    assert weights.tolist() == [0.0, 0.5]

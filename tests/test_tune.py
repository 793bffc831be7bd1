"""Tuning: planted optima are found, useless memories refused, intervals cover."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm import evaluate, tune
from memlm.evaluation import tune_report
from memlm.evaluation._bootstrap import paired_bootstrap
from memlm.evaluation._retrieval import Retrieved
from memlm.evaluation._tune import tune_cached
from memlm.evidence import Belief
from memlm.mixtures import best_weight
from memlm.models import LanguageModel
from test_mixtures import evidence
from tiny_memories import TEXTS, bare_tokenizer, documents, lm_of, store
from tiny_models import tiny_model


def planted(lm_log_probs, targets, distances, tokens, present=None):
    shape = np.shape(distances)
    present = torch.ones(shape, dtype=torch.bool) if present is None else torch.as_tensor(present)
    return Retrieved(
        rows=torch.arange(shape[0]),
        targets=torch.as_tensor(targets),
        lm_log_probs=torch.as_tensor(lm_log_probs, dtype=torch.float32).expand(shape[0]),
        evidence=evidence(torch.as_tensor(distances, dtype=torch.float32), torch.as_tensor(tokens), present),
        searched=1.0,
        model_seconds=0.0,
        search_seconds=(0.0,),
    )


def tuned(cached):
    return tune_cached(cached, np.arange(len(cached.targets)) // 10)


def test_planted_weight_is_found():
    """The memory is right in 60 % of the tokens and wrong else, p_LM = .1: the optimum is λ = .6 − .4 / 9."""
    tokens = np.where(np.arange(1000) % 5 < 3, 7, 8)[:, None].repeat(4, axis=1)
    report = tuned(planted(math.log(0.1), np.full(1000, 7), np.ones((1000, 4)), tokens))
    assert report.helps
    assert report.mixture == report.best
    assert report.mixture.interpolation_weight == pytest.approx(0.6 - 0.4 / 9, abs=1e-4)
    assert report.mixture.k == 1, "more neighbors that say the same are no gain"
    weight = report.mixture.interpolation_weight
    expected = 0.6 * math.log(weight + (1 - weight) * 0.1) + 0.4 * math.log((1 - weight) * 0.1)
    assert report.lm_perplexity == pytest.approx(10, rel=1e-5)
    assert math.log(report.perplexity) == pytest.approx(-expected, abs=1e-5)
    assert report.gain.mean == pytest.approx(expected - math.log(0.1), abs=1e-5)


def test_planted_temperature_is_found():
    generator = np.random.default_rng(0)
    distances = np.sort(generator.uniform(0, 30, (4000, 16)), axis=1)
    odds = np.exp(-distances / 3.0)
    chosen = (generator.random((4000, 1)) * odds.sum(axis=1, keepdims=True) < odds.cumsum(axis=1)).argmax(axis=1)
    report = tuned(planted(-9.0, chosen, distances, np.arange(16)[None].repeat(4000, axis=0)))
    assert 3.0 / 1.3 < report.mixture.temperature < 3.0 * 1.3
    assert report.mixture.k == 16
    assert report.mixture.interpolation_weight > 0.99
    worse = [row for row in report.grid if row["k"] == 16 and not 1.5 < row["temperature"] < 6]
    assert all(row["perplexity"] > report.perplexity * 1.02 for row in worse)


def test_planted_k_is_found():
    """One of the four nearest is right; the others say something else, from nearly as near."""
    generator = np.random.default_rng(0)
    tokens = np.full((500, 64), 99)
    tokens[:, :4] = np.arange(4)
    distances = np.full((500, 64), 1.0)
    report = tuned(planted(-9.0, generator.integers(4, size=500), distances, tokens))
    assert report.mixture.k == 4


def test_absent_neighbors_do_not_count():
    present, tokens = np.zeros((400, 4), bool), np.full((400, 4), 8)
    present[:300, 0] = True
    tokens[:300, 0] = np.where(np.arange(300) % 3 > 0, 7, 8)
    report = tuned(planted(math.log(0.1), np.full(400, 7), np.where(present, 1.0, np.inf), tokens, present))
    expected = 2 / 3 - 1 / 27  # rows without neighbors have no say, the others see one neighbor each
    assert report.mixture.interpolation_weight == pytest.approx(expected, abs=1e-4)
    gain = 2 / 3 * math.log(expected * 9 + 1) + 1 / 3 * math.log(1 - expected)
    assert report.gain.mean == pytest.approx(0.75 * gain, abs=1e-4)


@pytest.mark.parametrize("present", [True, False])
def test_useless_memory_gets_no_weight(present):
    report = tuned(planted(-3.0, np.full(400, 7), np.ones((400, 4)), np.full((400, 4), 8), np.full((400, 4), present)))
    assert not report.helps
    assert report.mixture.interpolation_weight == 0.0
    assert report.perplexity == pytest.approx(math.exp(3))
    assert "memory does not help" in report.verdict()
    json.dumps(report.to_dict(), allow_nan=False)


def test_gain_by_chance_is_not_taken():
    """The memory is right in some documents by luck and wrong in others: the best λ is above 0, the gain unsure."""
    generator = np.random.default_rng(3)
    right = generator.random(40).repeat(10) < 0.14
    report = tuned(planted(math.log(0.1), np.full(400, 7), np.ones((400, 1)), np.where(right, 7, 8)[:, None]))
    assert report.best.interpolation_weight > 0
    assert report.gain.mean > 0 > report.gain.low
    assert not report.helps
    assert report.mixture.interpolation_weight == 0.0


def test_a_perplexity_that_no_float_holds_is_infinite():
    """A black box may say −9999 of every token."""
    report = tuned(planted(-9999.0, np.full(400, 7), np.ones((400, 4)), np.full((400, 4), 8)))
    assert not report.helps
    assert report.lm_perplexity == report.perplexity == math.inf
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (values["lm_perplexity"], values["perplexity"], values["tokens"]) == (None, None, 400)
    assert "perplexity inf → inf on 400 held-out tokens" in report.verdict()


@pytest.mark.parametrize("kind", ["adapter", "learned"])
def test_what_a_network_learned_by_heart_is_no_gain(kind):
    """Of noise, thousands of parameters make a gain, on the text that they were fitted to alone."""
    n, k, generator = 3000, 16, torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(n, 50, generator=generator)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    lm = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    distances = (10 * torch.rand(n, k, generator=generator)).sort(dim=1).values
    cached = planted(lm, targets, distances, torch.randint(50, (n, k), generator=generator))
    keys = torch.randn(n, 64, generator=generator)
    belief = Belief.from_logits(logits, keys, torch.randint(50, (n,), generator=generator))
    cached = dataclasses.replace(cached, evidence=cached.evidence._replace(belief=belief))
    report = tune_cached(cached, np.arange(n) // 1000, kind, torch.rand(50, 2, generator=generator))
    assert not report.helps
    assert report.gain.mean < 1e-3


def test_tune_with_a_model(tmp_path):
    lm = lm_of("llama")
    memory = store(lm, [text + " again" for text in TEXTS], tmp_path / "right")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixture = tune(lm, memory, documents(TEXTS), show_progress=False)
    assert mixture.interpolation_weight > 0.5
    alone, mixed = evaluate(lm, documents(TEXTS), memory, mixture, show_progress=False).results
    assert mixed.perplexity < 0.2 * alone.perplexity
    own = store(lm, TEXTS, tmp_path / "own")
    fair = tune_report(lm, own, documents(TEXTS), show_progress=False)
    assert fair.perplexity > 3 * mixed.perplexity, "documents do not see their own entries while tuning"
    alone = store(lm, TEXTS[:1], tmp_path / "alone")
    for kind in ("knn", "adapter"):
        with pytest.warns(UserWarning, match=r"finds a neighbor, .*; fit to text that is not stored"):
            assert not tune_report(lm, alone, documents(TEXTS[:1]), kind=kind, show_progress=False).helps
    bare = LanguageModel(
        tiny_model("llama"), bare_tokenizer(), "llama"
    )  # with an end of text, all texts would have a token in common
    useless = store(bare, ["0123456789", "9876543210"], tmp_path / "useless")
    with pytest.warns(UserWarning, match="memory does not help here.*λ is set to 0"):
        mixture = tune(bare, useless, documents(["the cat", "was in", "a house"]), show_progress=False)
    assert mixture.interpolation_weight == 0.0
    alone, mixed = evaluate(bare, documents(TEXTS), useless, mixture, show_progress=False).results
    assert alone.nats == mixed.nats


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 50), min_size=1, max_size=12))
def test_best_weight_is_that_of_a_fine_grid(ratios):
    ratio = torch.tensor(ratios, dtype=torch.float64)
    grid = torch.linspace(0, 1 - 1e-4, 2001, dtype=torch.float64)
    sums = torch.log1p(grid[:, None] * (ratio - 1)).sum(dim=1)
    found = best_weight(ratio)
    assert 0.0 <= found < 1.0
    assert float(torch.log1p(found * (ratio - 1)).sum()) >= float(sums.max()) - 1e-6


def test_interval_covers_the_truth_by_document():
    """Tokens of a document resemble each other: an interval over tokens would be far too narrow."""
    generator = np.random.default_rng(0)
    covered, naive, by_document = 0, 0, np.arange(30).repeat(40)
    for seed in range(100):
        differences = 0.1 + generator.normal(size=30).repeat(40) + 0.3 * generator.normal(size=1200)
        interval = paired_bootstrap(differences, by_document, samples=300, seed=seed)
        assert interval.low < interval.mean < interval.high
        assert interval.mean == pytest.approx(differences.mean())
        covered += interval.low <= 0.1 <= interval.high
        naive += abs(differences.mean() - 0.1) < 1.96 * differences.std() / math.sqrt(1200)
    assert 86 <= covered <= 99
    assert naive < 50


def test_interval_unit_goes_by_the_number_of_documents():
    generator = np.random.default_rng(0)
    differences = generator.normal(size=6000)
    many = paired_bootstrap(differences, np.arange(20).repeat(300))
    few = paired_bootstrap(differences, np.minimum(np.arange(6000) // 300, 18))
    one = paired_bootstrap(differences[:100], np.arange(100) // 10)
    assert (many.unit, few.unit) == ("documents", "blocks of 2,048 tokens")
    assert many == paired_bootstrap(differences, np.arange(20).repeat(300)), "the same seed, the same interval"
    assert (one.low, one.high) == (-math.inf, math.inf), "a single block says nothing of its spread"

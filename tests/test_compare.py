"""Comparison: every number of the table against NumPy, fits that never see the test text, a control that can fail."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from memlm import KnnMixture
from memlm.evaluation import compare, tune_report
from memlm.evaluation._compare import read
from memlm.evaluation._judge import Judged, judge, rows_of
from memlm.evaluation._methods import Fitted, Methods
from memlm.mixtures import BucketMixture, CacheMixture, SharedCacheMixture, _families, fit_cache
from memlm.mixtures._fit_learned import fit_learned
from planted import held_out, memory, rising
from tiny_memories import documents, lm_of, store

STORED = [
    "the cat was in the house and the rain was on the roof of it",
    "in the morning the rain was over and a bird was singing again",
    "a letter was in the box; it said that the old house is sold now",
    "nobody knows who wrote the letter, and why the box was open",
]
SETTINGS = {"max_k": 16, "cache": 64, "max_tokens": None, "show_progress": False}
CACHES = ("cache", "cache, by age", "shared cache", "shared cache, by age")
CONSTANT = ("cache", "cache, by age", "knn-lm")  # one λ for all targets
TIMES = SimpleNamespace(model_seconds=1.0, search_seconds=(1.0,))
SKIPPED = "Learned weight with "


def texts(known, seed, number=24):
    """Stored sentences that go on as no text does; about so much is stored: neighbors are near there, and right."""
    generator = np.random.default_rng(seed)
    result = []
    for place in range(number):
        sentence = STORED[place % len(STORED)]
        cut = int(len(sentence) * (known + generator.uniform(-0.2, 0.2)))
        result.append(sentence[:cut] + "".join(generator.choice(list("bcdfgklmnprstvz"), len(sentence) - cut)))
    return documents(result)


VALID, TEST = texts(0.3, seed=0), texts(0.7, seed=1)


@pytest.fixture(scope="module")
def quick_fits():
    """Curves are fitted at one temperature, which is faster, and the learned weight may skip searches that help."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_families, "_TEMPERATURES", (1.0,))
        patch.setitem(_families.NETWORKS, "learned", partial(fit_learned, tolerance=0.2))
        yield


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return store(lm_of("llama"), STORED, tmp_path_factory.mktemp("compare") / "memory")


@pytest.fixture(scope="module")
def comparison(stored, quick_fits):
    return compare(lm_of("llama"), stored, VALID, TEST, **SETTINGS)


@pytest.fixture(scope="module")
def passes(stored):
    return tuple(read(lm_of("llama"), stored, source, description="", **SETTINGS) for source in (VALID, TEST))


def softmax(scores):
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def shares_and_weight(mixture, found, belief):
    """Return shares, (n, k), and λ, (n,), of a mixture without a network, in float64."""
    distances, present = found.distances.double().numpy(), found.present.numpy()
    some = present.any(axis=1)
    if isinstance(mixture, CacheMixture | SharedCacheMixture):
        ages = found.ages.double().numpy()
        scores = np.where(present, -distances * mixture.scale - ages * mixture.forgetting, -1e9)
        if isinstance(mixture, CacheMixture):
            return softmax(scores) * present, mixture.interpolation_weight * some
        mass = np.logaddexp.reduce(scores, axis=1) + mixture.bias
        weight = np.exp(mass - np.logaddexp(mass, belief.normalizer.double().numpy()))
        return softmax(scores) * present, weight * some
    shares, nearest = softmax(-distances[:, : mixture.k] / mixture.temperature), distances[:, 0]
    assert present.all()
    if isinstance(mixture, KnnMixture):
        weight = np.full(len(shares), mixture.interpolation_weight)
    elif isinstance(mixture, BucketMixture):
        weight = np.array(mixture.bucket_weights)[np.searchsorted(np.array(mixture.edges, np.float32), nearest)]
    elif mixture.kind == "exponential":
        weight = mixture.scale * np.exp(-nearest / mixture.length)
    else:
        weight = mixture.scale / (1 + np.exp((nearest - mixture.center) / mixture.length))
    return shares, np.minimum(weight, 1 - 1e-4)


def memories_of(name):
    return [0, 1] if " + " in name else [int(name in CACHES)]


def by_numpy(name, mixture, held):
    """Return λ and p of each memory of a method at the targets, float64, (n, memories)."""
    memories = [held.evidence.memories[place] for place in memories_of(name)]
    evidence = held.evidence._replace(memories=tuple(memories))
    if hasattr(mixture, "network"):  # λ and shares are the network's to say; the rest is arithmetic
        mix = mixture.mix(evidence.nearest(mixture.ks))
        weights, shares = mix.weights.double().numpy(), [share.double().exp().numpy() for share in mix.log_shares]
    else:
        share, weight = shares_and_weight(mixture, memories[0], evidence.belief)
        weights, shares = weight[:, None], [share]
    targets = held.targets.numpy()[:, None]
    columns = [
        (share * (found.tokens.numpy()[:, : share.shape[1]] == targets)).sum(axis=1)
        for share, found in zip(shares, memories, strict=True)
    ]
    return weights, np.stack(columns, axis=1)


def log_mixed(weights, likelihoods, held):
    alone = (1 - weights.sum(axis=1)) * np.exp(held.lm_log_probs.double().numpy())
    return np.log(alone + (weights * likelihoods).sum(axis=1))


def check_interval(interval, differences, owners):
    """The bootstrap agrees with the textbook's error of a mean of clusters."""
    mean, error = differences.mean(), differences - differences.mean()
    deviation = math.sqrt((np.bincount(owners, error) ** 2).sum()) / len(differences)
    assert interval.unit == "documents"
    assert interval.mean == pytest.approx(mean, abs=1e-3)
    assert interval.low <= interval.mean <= interval.high
    assert interval.low == pytest.approx(mean - 1.96 * deviation, abs=0.35 * deviation + 1e-3)
    assert interval.high == pytest.approx(mean + 1.96 * deviation, abs=0.35 * deviation + 1e-3)


def test_every_number_of_the_table_is_numpy_s(comparison, passes):
    valid, test = (side.held for side in passes)
    owners = passes[1].text.document_of_target
    lm = test.lm_log_probs.double().numpy()
    parts = {name: by_numpy(name, mixture, test) for name, mixture in comparison.mixtures.items()}
    log_probs = {"lm": lm} | {name: log_mixed(*part, test) for name, part in parts.items()}
    on_valid = {name: log_mixed(*by_numpy(name, comparison.mixtures[name], valid), valid).mean() for name in CACHES}
    cache = max(on_valid, key=lambda name: on_valid[name])
    assert [row.method for row in comparison.rows] == list(log_probs)
    shuffle = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).numpy()
    some = np.stack([found.present.any(dim=1).numpy() for found in test.evidence.memories], axis=1)
    assert not some[:, 1].all(), "a cache is empty at the beginning of a document, and then has no weight to shuffle"
    for row in comparison.rows:
        mine = log_probs[row.method]
        assert math.log(row.perplexity) == pytest.approx(-mine.mean(), abs=1e-3), row.method
        check_interval(row.over_fixed, mine - log_probs["knn-lm"], owners)
        check_interval(row.over_cache, mine - log_probs[cache], owners)
        assert row.helped == pytest.approx((np.exp(mine - lm) > 1.01).mean(), abs=2 / len(test))
        assert row.hurt == pytest.approx((np.exp(lm - mine) > 1.01).mean(), abs=2 / len(test))
        assert row.tokens_per_second > 0
        assert (row.shuffled is None) == (row.method in ("lm", *CONSTANT))
        if row.shuffled is not None:
            weights, likelihoods = parts[row.method]
            other = weights[shuffle] * some[:, memories_of(row.method)]
            expected = -log_mixed(other, likelihoods, test).mean()
            assert math.log(row.shuffled) == pytest.approx(expected, abs=1e-3), row.method
        network = getattr(comparison.mixtures.get(row.method), "network", None)
        assert (row.parameters > 0) == (network is not None)
        assert row.searched == (row.method != "lm" and row.method not in CACHES) or row.method == "learned"
    gate, adapter = comparison.row("adapter + cache"), comparison.row("adapter")
    assert gate.parameters == comparison.mixtures["adapter + cache"].network.parameters + adapter.parameters
    assert (comparison.tokens, comparison.valid_tokens, comparison.unit) == (len(test), len(valid), "documents")


def test_the_world_of_these_tests_tells_methods_apart(comparison):
    """The test above would pass where all methods are alike, or no token is hurt."""
    fixed = comparison.row("knn-lm")
    assert 0.2 < fixed.hurt < fixed.helped < 0.8
    for name in ("buckets", "exponential", "logistic"):
        row = comparison.row(name)
        assert row.over_fixed.low > 0.1
        assert row.shuffled > 1.05 * fixed.perplexity > 1.3 * row.perplexity
    assert len({round(row.perplexity, 3) for row in comparison.rows}) == len(comparison.rows)


def test_everything_is_fitted_to_valid_alone(comparison, stored, passes):
    fitted = [
        tune_report(lm_of("llama"), stored, source, max_k=16, max_tokens=None, show_progress=False).best
        for source in (VALID, TEST)
    ]
    assert comparison.mixtures["knn-lm"] == fitted[0]
    assert fitted[1].interpolation_weight > fitted[0].interpolation_weight + 0.1, "the two texts ask for the same λ"
    caches = [fit_cache(side.held.memory(1), forgets=False) for side in passes]
    assert comparison.mixtures["cache"] == caches[0] != caches[1]
    assert comparison.mixtures["knn-lm + cache"].members[0] == fitted[0]


def test_planted_weights_help_where_they_belong_and_hurt_elsewhere():
    """Near neighbors are right and have λ .9, far ones are wrong and have .1; the model says .1 everywhere."""
    n, generator = 4000, torch.Generator().manual_seed(0)
    targets, near = torch.arange(n) % 50, torch.arange(n) % 2 == 0
    tokens = torch.where(near, targets, (targets + 1) % 50)[:, None].repeat(1, 4)
    found = memory(tokens, rising(torch.where(near, 1.0, 20.0), 4, generator))
    held = held_out(targets, torch.full((n,), 0.1).log(), [found])
    settings = {"temperature": 1.0, "k": 4}
    mixtures = {
        "cache": KnnMixture(interpolation_weight=0.2, **settings),
        "knn-lm": KnnMixture(interpolation_weight=0.5, **settings),
        "buckets": BucketMixture(edges=(10.0,), bucket_weights=(0.9, 0.1), **settings),
    }
    methods = Methods({name: Fitted(mixture, (0,), 1.0) for name, mixture in mixtures.items()}, "cache")
    results = {name: judge(item, held) for name, item in methods.fitted.items()}
    table = rows_of(methods, results, held, TIMES, SimpleNamespace(document_of_target=held.groups))
    rows = {row.method: row for row in table}
    row = rows["buckets"]
    own = (math.log(0.91) + math.log(0.09)) / 2
    assert math.log(row.perplexity) == pytest.approx(-own, abs=1e-4)
    assert row.over_fixed.mean == pytest.approx(own - (math.log(0.55) + math.log(0.05)) / 2, abs=1e-4)
    assert row.over_cache.mean == pytest.approx(own - (math.log(0.28) + math.log(0.08)) / 2, abs=1e-4)
    assert (row.helped, row.hurt) == (0.5, 0.5)
    shuffled = sum(map(math.log, (0.91, 0.19, 0.09, 0.01))) / 4  # half of the weights go to the other kind
    assert math.log(row.shuffled) == pytest.approx(-shuffled, abs=0.05)
    assert row.shuffled > 2 * row.perplexity
    assert (rows["lm"].helped, rows["lm"].hurt, rows["knn-lm"].shuffled) == (0.0, 0.0, None)
    assert rows["lm"].tokens_per_second == pytest.approx(n)
    assert n / 3 < row.tokens_per_second < n / 2


def shown_gains(comparison, held):
    lm = held.lm_log_probs.double().numpy()
    names = ("knn-lm", "exponential", "adapter")
    return {name: log_mixed(*by_numpy(name, comparison.mixtures[name], held), held) - lm for name in names}


def check_table(rows, groups, gains):
    """A table of the analysis has every group once, with its size and the mean gain of every method in it."""
    sizes = Counter(groups)
    assert {row["group"]: row["tokens"] for row in rows} == sizes
    assert len(rows) == len(sizes)
    for row in rows:
        mask = np.array([group == row["group"] for group in groups])
        for name, gain in gains.items():
            assert row[name] == pytest.approx(gain[mask].mean(), abs=1e-3)


def test_gain_by_frequency_is_counted(comparison, stored, passes):
    held = passes[1].held
    times = Counter(stored.values.tolist())
    groups = [
        next(name for least, name in ((10, "10+"), (1, "1+"), (0, "never")) if times[target] >= least)
        for target in held.targets.tolist()
    ]
    assert min(Counter(groups).values()) > 10
    check_table(comparison.analysis.by_frequency, groups, shown_gains(comparison, held))


def test_gain_by_overlap_is_counted(comparison, stored, passes):
    """The tokens before a target and before its nearest neighbor are compared one by one, within their documents."""
    lm, held = lm_of("llama"), passes[1].held
    before = {}  # of every entry, the tokens stored before it in its document
    for first, stop in stored.entry_ranges():
        for entry in range(first, stop):
            before[entry] = stored.values[first:entry].tolist()
    groups, row = [], 0
    for ids in (lm.tokenize(document).ids.tolist() for document in shuffled_as_read(passes[1])):
        for place in range(1, len(ids)):
            entry = int(held.evidence.memories[0].entries[row, 0])
            shared = 0
            for mine, other in zip(reversed(ids[1:place]), reversed(before[entry]), strict=False):
                if mine != other or shared == 8:
                    break
                shared += 1
            groups.append("8+" if shared == 8 else str(shared))
            row += 1
    assert len(set(groups)) == 9
    check_table(comparison.analysis.by_overlap, groups, shown_gains(comparison, held))


def shuffled_as_read(side):
    by_name = {document.id: document for document in TEST}
    return [by_name[name] for name in side.text.names]


def test_reliability_and_curves_are_those_of_the_test_text(comparison, passes):
    held = passes[1].held
    points = comparison.analysis.reliability["exponential"]
    weights = np.sort(by_numpy("exponential", comparison.mixtures["exponential"], held)[0][:, 0])
    assert sum(point["tokens"] for point in points) == len(held)
    tenths = [part.mean() for part in np.array_split(weights, 10)]
    assert [point["mean"] for point in points] == pytest.approx(tenths, abs=1e-4)
    curves = comparison.analysis.curves
    assert curves["exponential"] == sorted(curves["exponential"], reverse=True)
    assert curves["best λ"][0] > curves["best λ"][-1] + 0.3, "near neighbors are right and far ones are not"


def test_what_skipping_saves_is_measured_and_told(comparison, passes, tmp_path):
    held, row, saving = passes[1].held, comparison.row("learned"), comparison.saving
    learned = comparison.mixtures["learned"]
    wanted = learned.predicted(held.evidence.belief) >= learned.threshold
    assert 0 < saving.skipped < 1
    assert row.searched == pytest.approx(float(wanted.double().mean()))
    assert saving.skipped == pytest.approx(1 - row.searched)
    always = log_mixed(*by_numpy("learned", dataclasses.replace(learned, threshold=0.0), held), held)
    assert saving.perplexity_always == pytest.approx(math.exp(-always.mean()), rel=1e-3)
    assert saving.perplexity == pytest.approx(row.perplexity, rel=1e-3)
    assert comparison.skipping[0]["perplexity"] == pytest.approx(saving.perplexity_always, rel=1e-3)
    assert saving.speedup == pytest.approx(saving.tokens_per_second / saving.tokens_per_second_always)
    told = f"perplexity {saving.perplexity_always:,.2f} → {saving.perplexity:,.2f}"
    for suffix in ("md", "html", "json"):
        comparison.save(tmp_path / f"with.{suffix}")
    for text in (str(comparison), *((tmp_path / f"with.{suffix}").read_text() for suffix in ("md", "html"))):
        assert SKIPPED in text
        assert told in text
    silent = dataclasses.replace(comparison, saving=None)  # a weight that never skips
    for suffix in ("md", "json"):
        silent.save(tmp_path / f"without.{suffix}")
    assert SKIPPED not in str(silent) + (tmp_path / "without.md").read_text()
    values = json.loads((tmp_path / "with.json").read_text(), parse_constant=pytest.fail)
    assert values["saving"] == saving.to_dict()
    assert values["saving"]["speedup"] == saving.speedup
    assert json.loads((tmp_path / "without.json").read_text())["saving"] is None


def test_text_that_finds_no_neighbor_is_warned_of_and_the_rest_is_compared(quick_fits, tmp_path):
    """The only document that is stored is the one to fit to, and does not see its own entries."""
    lm = lm_of("llama")
    alone = store(lm, STORED[:1], tmp_path / "memory")
    with pytest.warns(UserWarning, match="finds a neighbor.*λ of the datastore is 0"):
        result = compare(lm, alone, documents(STORED[:1]), TEST[:2], **SETTINGS)
    assert (result.skipping, result.saving) == ([], None)
    assert result.row("learned").perplexity == pytest.approx(result.row("lm").perplexity)
    assert result.row("cache").fit_seconds > 0
    assert all(math.isfinite(row.perplexity) for row in result.rows)
    for suffix in ("md", "html", "json"):
        result.save(tmp_path / f"result.{suffix}")
    assert "none was fitted" in (tmp_path / "result.md").read_text()
    assert "none was fitted" in (tmp_path / "result.html").read_text()
    assert json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)["skipping"] == []


def test_a_page_without_points_has_no_empty_legend(comparison, tmp_path):
    """Of a few tokens no reliability is told; matplotlib warns of a legend of nothing, which is an error here."""
    analysis = dataclasses.replace(comparison.analysis, reliability={})
    dataclasses.replace(comparison, analysis=analysis).save(tmp_path / "page.html")


def test_a_document_on_both_sides_is_warned_of(stored, monkeypatch):
    """Before anything is fitted, which is slow."""

    def fitted(*_):
        raise InterruptedError

    monkeypatch.setattr("memlm.evaluation._compare.fit_all", fitted)
    both = documents({"mine": VALID[3].text})
    said = "1 of 3 documents of the test text, such as 'mine', are in the text to fit to"
    with pytest.warns(UserWarning, match=said), pytest.raises(InterruptedError):
        compare(lm_of("llama"), stored, VALID, [*TEST[:2], *both], **SETTINGS)
    with pytest.raises(InterruptedError):  # and no warning, which would be an error
        compare(lm_of("llama"), stored, VALID, TEST, **SETTINGS)


def test_a_change_by_less_than_a_hundredth_neither_helps_nor_hurts():
    n = 600
    held = held_out(
        torch.zeros(n).long(), torch.full((n,), -1.0), [memory(torch.zeros(n, 1).long(), torch.zeros(n, 1))]
    )
    changes = torch.tensor([0.0099, 0.0101, -0.0099, -0.0101, 0.5, 0.5]).repeat(n // 6).double()
    nothing = torch.zeros(n, 1).double()
    methods = Methods({"knn-lm": Fitted(KnnMixture(interpolation_weight=0.5, temperature=1.0), (0,), 1.0)}, "knn-lm")
    results = {"knn-lm": Judged(nothing, nothing, held.lm_log_probs.double() + changes, 1.0)}
    row = rows_of(methods, results, held, TIMES, SimpleNamespace(document_of_target=held.groups))[1]
    assert (row.helped, row.hurt) == pytest.approx((1 / 2, 1 / 6))


@pytest.mark.parametrize("method", ["lm", "knn-lm", "adapter"])
def test_a_perplexity_that_no_float_holds_is_told(comparison, method):
    """A model may rule out a token that comes; that must not cost the result."""
    rows = [dataclasses.replace(row, perplexity=math.inf) if row.method == method else row for row in comparison.rows]
    result = dataclasses.replace(comparison, rows=tuple(rows))
    (line,) = [line for line in str(result).splitlines() if line.startswith(f"{method:<22}")]
    assert line.split()[len(method.split())] == "inf"
    assert "?" in line

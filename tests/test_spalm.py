"""SPALM: gates over a model's last state, as equations, as mixtures, fitted, and in running models."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm
from command_line import make_world, refused, run
from memlm import KnnMixture, attach, evaluate, explain, ops
from memlm.errors import ConfigError, ModelError
from memlm.evaluation import tune_report
from memlm.evidence import Belief, Evidence, Found, OutputEmbedding
from memlm.mixtures import HeldOut, SpalmMixture, SteeredMixture, fit_spalm, fit_steered, load_mixture
from memlm.mixtures._features import names
from memlm.models import output_embedding
from planted import network
from tiny_memories import TEXTS as STORED
from tiny_memories import lm_of, store
from tiny_models import tiny_model

VOCABULARY, WIDTH, K = 11, 6, 4
PLANTED = 16
TEXT = "the letter was in the house and it was the morning"


def layer(seed=0, vocabulary=VOCABULARY, width=WIDTH):
    return OutputEmbedding(torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(seed)))


def asked_of(hidden, output, found):
    """Return log p_LM and the evidence of states."""
    logits = output.logits(hidden)
    thinks = Belief.from_logits(logits, hidden, torch.zeros(len(hidden)).long())._replace(hidden=hidden)
    return logits.log_softmax(dim=1), Evidence((found,), thinks, output)


def drawn(seed=0, n=5, share=0.7, k=K):
    """Return log p_LM and evidence in which some neighbors, or all of a row, are absent."""
    generator = torch.Generator().manual_seed(seed)
    distances = (20 * torch.rand(n, k, generator=generator)).sort(dim=1).values
    tokens = torch.randint(VOCABULARY, (n, k), generator=generator)
    present = torch.rand(n, k, generator=generator) < share
    found = Found(distances, tokens, present, torch.zeros_like(tokens))
    return asked_of(torch.randn(n, WIDTH, generator=generator), layer(seed), found)


def spalm(gates=1, seed=0, size=1.5, k=K):
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(gates, WIDTH, generator=generator)
    return SpalmMixture(gate=gate, gate_bias=torch.randn(gates, generator=generator), size=size, k=k)


def steered(seed=0, weight=0.3, temperature=5.0, k=K, size=0.5):
    return SteeredMixture(
        interpolation_weight=weight, temperature=temperature, network=network(len(names(k)), 1, seed, size), k=k
    )


MIXTURES = {"one gate": spalm(), "a gate a dimension": spalm(WIDTH), "steered": steered()}


@pytest.mark.parametrize("gates", [1, WIDTH])
def test_the_paper_s_equations_in_float64(gates):
    lm, asked = drawn(3, n=40, share=0.4)
    mixture, found, output = spalm(gates, seed=1), asked.memories[0], asked.output
    hidden, weight = asked.belief.hidden.double().numpy(), output.weight.double().numpy()
    mixed, mix = mixture.log_probs(lm, asked), mixture.mix(asked)
    rows = found.present.any(dim=1)
    assert 0 < rows.sum() < 40
    for row in rows.nonzero()[:, 0].tolist():
        e = weight[found.tokens[row][found.present[row]].numpy()]
        a = np.exp(e @ hidden[row])
        m = (a / a.sum()) @ e
        g = 1 / (1 + np.exp(-(mixture.gate.double().numpy() @ hidden[row] + mixture.gate_bias.double().numpy())))
        logits = weight @ ((1 - g) * mixture.size * m + g * hidden[row])
        expected = logits - np.log(np.exp(logits).sum())
        np.testing.assert_allclose(mixed[row], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mix.weights[row, 0], (1 - g).mean(), rtol=1e-5)
        np.testing.assert_allclose(mix.log_shares[0][row].exp()[found.present[row]], a / a.sum(), rtol=1e-4)
    assert mixed[~rows].equal(lm[~rows])
    assert not mix.weights[~rows].any()


def test_gradients_of_the_equations():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    present = torch.tensor([[True, True, False], [False, False, False]])

    def state(hidden, embeddings, gate):
        memory, _ = ops.spalm_memory(hidden, embeddings, present)
        return ops.spalm_state(hidden, memory, gate.sigmoid(), present)

    assert torch.autograd.gradcheck(state, (draw(2, 4), draw(2, 3, 4), draw(2, 1)))
    log_shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64).log()
    tokens = torch.tensor([[2, 2, 1], [0, 0, 0]])

    def step(log_odds, log_probs, embeddings):
        return ops.steering(log_odds, log_shares, tokens, present, log_probs, embeddings, metric)

    metric = torch.eye(4, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(step, (draw(2), draw(2, 3), draw(2, 3, 4)))


@given(st.integers(0, 1000), st.sampled_from([1, WIDTH]), st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=50)
def test_each_is_a_distribution_that_no_order_of_neighbors_changes(seed, gates, share):
    lm, asked = drawn(seed, share=share)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    found = asked.memories[0]
    other = asked._replace(memories=(Found(*(part[:, order] for part in found[:4])),))
    for mixture in (spalm(gates, seed), steered(seed)):
        mixed = mixture.log_probs(lm, asked)
        np.testing.assert_allclose(mixed.double().exp().sum(dim=1), 1, atol=1e-5)
        np.testing.assert_allclose(mixture.log_probs(lm, other), mixed, rtol=1e-3, atol=1e-3)
        alone = ~found.present.any(dim=1)
        assert mixed[alone].equal(lm[alone])
        for target in range(VOCABULARY):
            one = mixture.target_log_probs(lm[:, target], torch.full((len(lm),), target), asked)
            np.testing.assert_allclose(one, mixed[:, target], rtol=1e-4, atol=1e-5)


def test_an_open_gate_is_the_model_and_a_shut_one_the_memory():
    lm, asked = drawn(2, share=1.0)
    gate = torch.zeros(1, WIDTH)
    mixed = SpalmMixture(gate=gate, gate_bias=torch.tensor([90.0])).log_probs(lm, asked)
    np.testing.assert_allclose(mixed, lm, atol=1e-5)
    shut = SpalmMixture(gate=gate, gate_bias=torch.tensor([-90.0]))
    memory, _ = ops.spalm_memory(asked.belief.hidden, asked.output.weight[asked.memories[0].tokens], torch.tensor(True))
    expected = asked.output.logits(memory).log_softmax(dim=1)
    np.testing.assert_allclose(shut.log_probs(lm, asked), expected, atol=1e-5)


def test_a_token_that_comes_twice_counts_twice_for_the_paper_and_once_for_the_step():
    hidden, present = torch.zeros(1, 2), torch.ones(1, 3, dtype=torch.bool)
    embeddings = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    np.testing.assert_allclose(ops.spalm_memory(hidden, embeddings, present)[0], [[2 / 3, 1 / 3]])
    shares, tokens, log_probs = torch.full((1, 3), 1 / 3).log(), torch.tensor([[4, 4, 9]]), torch.zeros(1, 3)
    step = ops.steering(torch.zeros(1), shares, tokens, present, log_probs, embeddings, torch.eye(2))
    np.testing.assert_allclose(step, [[math.log(1 + 2 / 3), math.log(1 + 1 / 3)]], rtol=0.011)  # a ridge of a hundredth


@given(st.integers(0, 1000), st.integers(1, 4))
@settings(max_examples=50)
def test_steering_raises_each_token_by_what_it_is_to_with_the_least_change_of_all_logits(seed, distinct):
    """In float64 by NumPy: argmin of |W δ|² under e(y)·δ = b_y, but for the ridge."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(30, 6, generator=generator)
    tokens = torch.randperm(30, generator=generator)[:distinct].repeat(2)[: max(distinct, 3)][None]
    k = tokens.shape[1]
    present = torch.rand(1, k, generator=generator) < 0.8
    shares = torch.rand(1, k, generator=generator) * present
    shares = shares / shares.sum().clamp_min(1e-9)
    log_probs = -5 * torch.rand(30, generator=generator)[tokens]
    odds = torch.randn(1, generator=generator)
    metric = torch.linalg.inv(weight.T @ weight)
    step = ops.steering(odds, shares.log(), tokens, present, log_probs, weight[tokens], metric)[0].double().numpy()
    seen = sorted({int(token) for token, there in zip(tokens[0], present[0], strict=True) if there})
    if not seen:
        assert not step.any()
        return
    rows = weight.double().numpy()
    wanted = []
    for token in seen:
        share = float(shares[0][(tokens[0] == token)].double().sum())
        log_prob = float(log_probs[0][tokens[0] == token][0])
        wanted.append(np.log1p(np.exp(float(odds)) * share / np.exp(log_prob)))
    some = rows[seen]
    inner = np.linalg.inv(rows.T @ rows)
    gram = some @ inner @ some.T
    expected = inner @ some.T @ np.linalg.solve(gram + 0.01 * np.diag(np.diag(gram)), np.array(wanted))
    np.testing.assert_allclose(step, expected, rtol=1e-3, atol=1e-4)


def test_a_rare_token_that_moves_little_is_raised_as_far_as_a_common_one():
    """What a sum of steps did not do: a token whose embedding is short is raised by its due all the same."""
    weight = torch.cat([torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), 0.1 * torch.eye(6)[:1]])
    tokens, present = torch.tensor([[3, 40]]), torch.ones(1, 2, dtype=torch.bool)
    metric = torch.linalg.inv(weight.T @ weight)
    log_probs, log_shares = torch.full((1, 2), -6.0), torch.full((1, 2), 0.5).log()
    step = ops.steering(torch.zeros(1), log_shares, tokens, present, log_probs, weight[tokens], metric)
    due = math.log(1 + 0.5 * math.exp(6))
    np.testing.assert_allclose(weight[tokens[0]] @ step[0], [due, due], rtol=0.1)
    summed = OutputEmbedding(weight).isolating @ (due * weight[tokens[0]].sum(dim=0))
    assert weight[40] @ summed < 0.1 * due


@given(st.integers(0, 100), st.floats(0.05, 0.95))
@settings(max_examples=25)
def test_where_the_width_allows_it_steering_is_interpolation_to_the_digit(seed, weight):
    """With as many dimensions as tokens each logit moves alone; a network that says zero leaves λ as it is."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(VOCABULARY, VOCABULARY, generator=generator)).Q
    found = drawn(seed)[1].memories[0]
    lm, asked = asked_of(torch.randn(5, VOCABULARY, generator=generator), OutputEmbedding(rotation), found)
    mixture = steered(weight=weight, size=0.0)
    fixed = KnnMixture(interpolation_weight=weight, temperature=mixture.temperature, k=K)
    mixed, expected = mixture.log_probs(lm, asked), fixed.log_probs(lm, asked)
    np.testing.assert_allclose(mixed, expected, rtol=0.03, atol=0.03)  # a ridge of a hundredth
    np.testing.assert_allclose(mixture.mix(asked).weights, fixed.mix(asked).weights, atol=1e-5)


def test_steps_of_the_isolating_matrix_raise_their_token_by_one_on_the_mean():
    output = layer(vocabulary=300, width=16)
    logits = output.weight @ output.isolating @ output.weight.T
    np.testing.assert_allclose(logits.diagonal().mean(), 1, rtol=1e-3)
    plain = output.weight @ output.weight.T / output.weight.square().sum(dim=1).mean()
    off = ~torch.eye(300, dtype=torch.bool)
    assert logits[off].square().mean() <= plain[off].square().mean() * 1.01


def planted_text(n=4000, seed=0):
    """Return held-out text of a model that is rarely sure, in which one direction of its state says whether the
    neighbors are right.
    """
    generator = torch.Generator().manual_seed(seed)
    output = layer(seed=9, vocabulary=40, width=PLANTED)
    hidden = 0.4 * torch.randn(n, PLANTED, generator=generator)
    right = hidden[:, 0] > 0.2
    targets = output.logits(hidden).softmax(dim=1).multinomial(1, generator=generator)[:, 0]
    tokens = torch.randint(40, (n, K), generator=generator)
    tokens[right, :2] = targets[right, None]
    distances = (5 * torch.rand(n, K, generator=generator) + 10 * ~right[:, None]).sort(dim=1).values
    found = Found(distances, tokens, torch.ones(n, K, dtype=torch.bool), torch.zeros_like(tokens))
    lm, asked = asked_of(hidden, output, found)
    return HeldOut(targets, lm.gather(1, targets[:, None])[:, 0], asked, np.arange(n) // 50), right


BASE = KnnMixture(interpolation_weight=0.3, temperature=5.0, k=K)


@pytest.mark.parametrize("fit", [fit_spalm, fit_steered])
def test_a_fitted_gate_opens_where_neighbors_are_right(fit):
    held, _ = planted_text()
    judged, right = planted_text(seed=1)
    mixture = fit(held, BASE)
    gain = float((judged.log_probs(mixture) - judged.lm_log_probs).mean())
    assert gain > 0.1
    weight = mixture.mix(judged.evidence).weights[:, 0]
    assert (weight[right][:, None] > weight[~right]).float().mean() > 0.65  # area under the curve
    # the control: neighbors of other targets are of no use, and the gate says so
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    shuffled = dataclasses.replace(
        held, evidence=held.evidence._replace(memories=(held.evidence.rows(order).memories[0],))
    )
    assert float((shuffled.log_probs(fit(shuffled, BASE)) - shuffled.lm_log_probs).mean()) < 0.1 * gain


@pytest.mark.parametrize("fit", [fit_spalm, fit_steered])
def test_without_a_neighbor_there_is_nothing_to_fit(fit):
    held, _ = planted_text(20)
    found = held.evidence.memories[0]
    nothing = held.evidence._replace(memories=(found._replace(present=torch.zeros_like(found.present)),))
    with pytest.raises(ConfigError, match="no target has a neighbor"):
        fit(dataclasses.replace(held, evidence=nothing), BASE)


def test_a_gate_a_dimension_is_fitted_too():
    held, _ = planted_text(1500)
    mixture = fit_spalm(held, BASE, gates=PLANTED)
    assert mixture.gate.shape == (PLANTED, PLANTED)
    assert float((held.log_probs(mixture) - held.lm_log_probs).mean()) > 0.1


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_it_asks_for_states(mixture):
    lm, asked = drawn()
    with pytest.raises(ConfigError, match="hidden=True"):
        mixture.log_probs(lm, asked._replace(output=None))


def test_settings_out_of_range_are_refused():
    good = {"gate": torch.zeros(1, WIDTH), "gate_bias": torch.zeros(1)}
    for wrong, said in (
        ({"size": 0.0}, "size is 0.0"),
        ({"k": 0}, "k is 0"),
        ({"gate": torch.zeros(2, WIDTH)}, "gate of this mixture is damaged"),
        ({"gate_bias": torch.tensor([math.nan])}, "gate of this mixture is damaged"),
        ({"gate": torch.zeros(1, WIDTH).double()}, "gate of this mixture is damaged"),
    ):
        with pytest.raises(ConfigError, match=said):
            SpalmMixture(**good | wrong)
    for weight in (0.0, 1.0, 1.5):
        with pytest.raises(ConfigError, match="interpolation weight"):
            steered(weight=weight)
    with pytest.raises(ConfigError, match="fit it again"):
        SteeredMixture(interpolation_weight=0.5, temperature=1.0, network=network(3, 1))
    lm, asked = drawn()
    with pytest.raises(ConfigError, match="for states of 3 numbers, the model's have 6"):
        SpalmMixture(gate=torch.zeros(1, 3), gate_bias=torch.zeros(1)).log_probs(lm, asked)


def mixtures_for(lm):
    """Return one of each kind that changes a lot."""
    width = lm.output.weight.shape[1]
    gate = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    return [
        SpalmMixture(gate=gate, gate_bias=torch.zeros(1), size=2.0, k=3),
        steered(weight=0.5, temperature=3.0, k=3),
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gptj", "opt"])
def test_attached_it_says_what_evaluation_scores(family, tmp_path):
    lm = lm_of(family)
    memory = store(lm, STORED, tmp_path / "store")
    for mixture in mixtures_for(lm):
        result = evaluate(lm, [memlm.Document(id="a", text=TEXT)], memory, mixture, show_progress=False)
        ids = torch.from_numpy(lm.tokenize(memlm.Document(id="a", text=TEXT)).ids)[None]
        with attach(lm.model, memory, mixture), torch.no_grad():
            log_probs = lm.model(input_ids=ids).logits[0]
            last = lm.model(input_ids=ids, logits_to_keep=1).logits[0] if family != "gptj" else log_probs[-1:]
        scored = log_probs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(scored, result.log_probs, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(last[0], log_probs[-1], rtol=1e-3, atol=1e-3)
        assert np.abs(result.log_probs - result.lm_log_probs).max() > 0.05
        with torch.no_grad():
            alone = lm.model(input_ids=ids).logits.log_softmax(dim=-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(alone, result.lm_log_probs, rtol=1e-3, atol=1e-3)  # and nothing is left behind


def test_generation_with_beams_and_a_cache_of_keys(tmp_path):
    lm = lm_of("llama")
    memory = store(lm, STORED, tmp_path / "store")
    ids = torch.tensor([lm.tokenizer("the rain")["input_ids"]] * 2)
    for mixture in mixtures_for(lm):
        with attach(lm.model, memory, mixture):
            with_cache, without = (
                lm.model.generate(ids, max_new_tokens=8, num_beams=2, do_sample=False, use_cache=use_cache)
                for use_cache in (True, False)
            )
        assert with_cache.equal(without)


def test_explain_reports_the_gate_of_every_token(tmp_path):
    lm = lm_of("llama")
    memory = store(lm, STORED, tmp_path / "store")
    for mixture in mixtures_for(lm):
        told = explain(lm, TEXT, memory, mixture)
        assert all(0 < token.weight < 1 for token in told.tokens)
        assert len({round(token.weight, 6) for token in told.tokens}) > 3
        for token in told.tokens:
            assert sum(source.share for source in token.sources) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_models_that_scale_or_cap_their_logits_are_refused(family, tmp_path):
    lm = lm_of(family)
    memory = store(lm, STORED, tmp_path / "store")
    mixture = steered(k=3)
    with pytest.raises(ModelError, match="scales or caps its logits"):
        evaluate(lm, [memlm.Document(id="a", text=TEXT)], memory, mixture, show_progress=False)
    with pytest.raises(ModelError, match="scales or caps its logits"), attach(lm.model, memory, mixture):
        pass


@pytest.mark.parametrize("kind", ["spalm", "steered"])
def test_from_the_command_line(kind, tmp_path):
    model, texts, memory = make_world(tmp_path)
    saved, test = tmp_path / "mixture.json", texts / "test"
    tuned = run("tune", model, memory, texts / "valid", "--mixture", kind, "--save", saved, "--json")
    assert tuned.code == 0, tuned.err
    report = json.loads(tuned.out)
    assert report["best"]["kind"] == kind
    if not report["helps"]:  # what is saved is then the model alone; the gate is what this test is about
        pytest.fail("a memory of the same sentences does not help")
    assert load_mixture(saved).kind == kind
    scored = run("eval", model, memory, test, "--mixture", saved, "--json")
    assert scored.code == 0, scored.err
    results = json.loads(scored.out)["results"]
    assert [row["method"] for row in results] == ["lm", kind]
    assert results[1]["perplexity"] != results[0]["perplexity"]
    told = run("explain", model, memory, "The cat was on the roof.", "--mixture", saved, "--json")
    assert told.code == 0, told.err
    assert any(0 < token["weight"] < 1 for token in json.loads(told.out)["tokens"])
    wrote = run("generate", model, memory, "The cat", "--mixture", saved, "--max-new-tokens", "5", "--json")
    assert wrote.code == 0, wrote.err
    line = refused("tune", model, "none", texts / "valid", "--mixture", kind)
    assert f"{kind} has nothing to look at" in line


def test_tuning_searches_for_no_more_neighbors_than_count(tmp_path, monkeypatch):
    """λ and T are those of the four neighbors that the gate looks at, not of a thousand."""
    lm = lm_of("llama")
    memory = store(lm, STORED, tmp_path / "store")
    asked = []
    lookup = memlm.Datastore.lookup
    monkeypatch.setattr(
        memlm.Datastore, "lookup", lambda self, queries, k, *rest: asked.append(k) or lookup(self, queries, k, *rest)
    )
    held = [memlm.Document(id="held", text=f"{TEXT} {TEXT}")]
    for kind in ("spalm", "steered"):
        assert tune_report(lm, memory, held, kind=kind, show_progress=False).best.k <= 4
    assert set(asked) == {4}
    tune_report(lm, memory, held, kind="knn", show_progress=False)
    assert max(asked) > 4, "the control"


def test_a_black_box_shows_no_states():
    box = memlm.BlackBox("http://127.0.0.1:9", "tiny", lm_of("llama"))
    for ask in (lambda: box.output, lambda: next(box.score([np.arange(4)], hidden=True))):
        with pytest.raises(ModelError, match="behind an endpoint, which shows none"):
            ask()


def test_under_autocast_it_still_is_a_distribution(tmp_path):
    lm = lm_of("llama")
    memory = store(lm, STORED, tmp_path / "store")
    ids = torch.from_numpy(lm.tokenize(memlm.Document(id="a", text=TEXT)).ids)[None]
    for mixture in mixtures_for(lm):
        with attach(lm.model, memory, mixture), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mixed = lm.model(input_ids=ids).logits[0]
        np.testing.assert_allclose(mixed.double().exp().sum(dim=1), 1, atol=1e-5)


def test_a_capped_model_in_half_precision_is_refused_too():
    with pytest.raises(ModelError, match="scales or caps its logits"):
        output_embedding(tiny_model("gemma2", dtype=torch.bfloat16))

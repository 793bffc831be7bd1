"""A gate that looks at which datastore the text is like: what it is told, what that gains, and where it runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlm import KnnMixture, attach, evaluate
from memlm.cache import Cache
from memlm.errors import ConfigError
from memlm.evidence import LATELY, Evidence, read_lately
from memlm.mixtures import CacheMixture, GateMixture, fit_gate, load_mixture
from memlm.mixtures._gate import familiarity, gate_features, member_mixes
from memlm.mixtures._network import Network
from planted import belief, held_out, indifferent, memory, network
from test_cache import NEW, PROMPTS, greedy
from tiny_memories import TEXTS, documents, ids_of, lm_of, store


@given(st.lists(st.integers(0, 99), min_size=1, max_size=90), st.data())
def test_what_was_read_lately_is_the_end_of_the_text_so_far(tokens, data):
    places = data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=5))
    starts = [data.draw(st.integers(0, place)) for place in places]
    rows = read_lately(torch.tensor(tokens), torch.tensor(places), torch.tensor(starts)).tolist()
    for row, place, start in zip(rows, places, starts, strict=True):
        text = tokens[start : place + 1][-LATELY:]
        assert row == [-1] * (LATELY - len(text)) + text


def test_familiarity_is_the_mean_log_share_of_the_last_tokens():
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 50, (2, 7))
    statistics = [torch.tensor(np.stack([np.log1p(row), row], axis=1), dtype=torch.float32) for row in counts]
    read = generator.integers(0, 7, (3, LATELY))
    read[1, :-5] = -1
    lm = torch.zeros(3, 7)
    evidence = Evidence(
        tuple(memory(torch.zeros(3, 4).long(), torch.rand(3, 4)) for _ in range(2)),
        belief(lm)._replace(read=torch.from_numpy(read)),
    )
    members = (KnnMixture(interpolation_weight=0.4, temperature=1.0, k=4),) * 2
    mixes = member_mixes(members, evidence)
    told = gate_features(members, mixes, evidence, familiarity(statistics))
    plain = gate_features(members, mixes, evidence)
    assert told[:, : plain.shape[1]].equal(plain)
    shares = np.log((counts + 1) / (counts + 1).sum(axis=1, keepdims=True))  # (datastores, vocabulary), float64
    expected = []
    for row in read:
        text = row[row >= 0]
        ages = np.arange(len(text))[::-1]
        for span in (16, 64):
            weights = np.exp(-ages / span)
            expected += [(weights * share[text]).sum() / weights.sum() for share in shares]
    np.testing.assert_allclose(told[:, plain.shape[1] :], np.reshape(expected, (3, 4)), rtol=1e-5)


def twins(n=3000, seed=0):
    """Two datastores as near and as sure as one another; each is right in texts of tokens of its own, half of all."""
    generator = torch.Generator().manual_seed(seed)
    targets, second = torch.randint(50, (n,), generator=generator), torch.rand(n, generator=generator) < 0.5
    memories = []
    for right in (~second, second):
        tokens = (targets[:, None] + torch.where(right, 0, 1)[:, None]).repeat(1, 4) % 50
        memories.append(memory(tokens, torch.rand(n, 4, generator=generator)))
    read = torch.randint(25, (n, LATELY), generator=generator) + 25 * second[:, None]
    return held_out(targets, torch.full((n,), 0.1).log(), memories, indifferent(n)._replace(read=read)), second


def test_it_tells_texts_apart_that_neighbors_do_not():
    (train, _), (test, second) = twins(), twins(seed=1)
    members = (KnnMixture(interpolation_weight=0.5, temperature=1.0, k=4),) * 2
    common = torch.zeros(50, 2)
    statistics = [common.clone(), common.clone()]
    statistics[0][:25] = statistics[1][25:] = 5.0
    without, told = fit_gate(train, members), fit_gate(train, members, statistics)
    assert float(test.log_probs(told).mean()) > -0.1
    assert float(test.log_probs(without).mean()) < -0.6
    weights = told.mix(test.evidence).weights
    assert weights[~second].mean(dim=0).tolist() == pytest.approx([1, 0], abs=0.1)
    assert weights[second].mean(dim=0).tolist() == pytest.approx([0, 1], abs=0.1)
    # the same token frequencies for both datastores tell it nothing
    assert float(test.log_probs(fit_gate(train, members, [common, common])).mean()) < -0.6


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def several(request, tmp_path_factory):
    """A language model, two datastores and a cache, and a gate over them that looks at the text, and at little else."""
    lm = lm_of(request.param)
    folder = tmp_path_factory.mktemp("gate")
    memories = [store(lm, TEXTS[:2], folder / "one"), store(lm, TEXTS[2:], folder / "other"), Cache(40)]
    members = (
        KnnMixture(interpolation_weight=0.4, temperature=10.0, k=9),
        KnnMixture(interpolation_weight=0.2, temperature=20.0, k=5),
        CacheMixture(interpolation_weight=0.3, scale=0.1, forgetting=0.05, length=30),
    )
    table = familiarity([item.statistics() for item in memories[:2]])
    found = [item.lookup(np.zeros((2, item.width), np.float32), 5) for item in memories[:2]]
    recalled = Cache(40).recall(torch.zeros(2, 3), torch.zeros(2).long())
    read = torch.zeros(2, LATELY).long()
    evidence = Evidence((*found, recalled), belief(torch.zeros(2, 5))._replace(read=read))
    inputs = gate_features(members, member_mixes(members, evidence), evidence, table).shape[1]
    return lm, memories, GateMixture(members=members, network=network(inputs, 4, size=0.3), familiarity=table)


def test_whole_passes_and_generation_see_the_same_text(several):
    lm, memories, mixture = several
    result = evaluate(lm, documents(NEW), memories, mixture, show_progress=False)
    start = 0
    with attach(lm.model, memories, mixture), torch.no_grad():
        for document in documents(NEW):
            ids = torch.from_numpy(lm.tokenize(document).ids)[None]
            mixed = lm.model(ids).logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            np.testing.assert_allclose(mixed, result.log_probs[start : start + len(mixed)], atol=1e-4)
            start += len(mixed)
        ids = ids_of(PROMPTS[1])
        assert greedy(lm.model, ids).equal(greedy(lm.model, ids, use_cache=False))


def two_of(memories, mixture):
    """The datastores alone, under a gate that looks at hardly anything but the text."""
    found = [item.lookup(np.zeros((2, item.width), np.float32), 9) for item in memories[:2]]
    evidence = Evidence(tuple(found), belief(torch.zeros(2, 5))._replace(read=torch.zeros(2, LATELY).long()))
    members, table = mixture.members[:2], mixture.familiarity
    inputs = gate_features(members, member_mixes(members, evidence), evidence, table).shape[1]
    layers = network(inputs, 3, size=0.01).layers
    layers[0][0][:, -4:] = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    layers[1][0].mul_(100)
    mean = torch.zeros(inputs)
    mean[-4:] = table.mean()
    return GateMixture(members=members, network=Network(mean, torch.ones(inputs), layers), familiarity=table)


def test_pass_by_pass_it_sees_what_was_read_before(several):
    lm, memories, mixture = several
    mixture = two_of(memories, mixture)
    ids = ids_of(PROMPTS[1])
    with attach(lm.model, memories[:2], mixture), torch.no_grad():
        whole = lm.model(ids).logits
        first = lm.model(ids[:, :5], use_cache=True)
        rest = lm.model(ids[:, 5:], past_key_values=first.past_key_values).logits
        forgetful = lm.model(ids[:, 5:]).logits
        assert greedy(lm.model, ids).equal(greedy(lm.model, ids, use_cache=False))
    np.testing.assert_allclose(rest, whole[:, 5:], atol=1e-4)
    unseen = replace(mixture, familiarity=mixture.familiarity.flip(1))
    with attach(lm.model, memories[:2], unseen), torch.no_grad():
        assert abs(lm.model(ids).logits - whole).max() > 0.05, "the gate looks at the text"
    assert abs(forgetful - whole[:, 5:]).max() > 0.05


def test_padding_was_not_read(several):
    lm, memories, mixture = several
    mixture = two_of(memories, mixture)
    batch = lm.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    mask = batch["attention_mask"]
    assert mask.min() == 0
    places = {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}
    with attach(lm.model, memories[:2], mixture), torch.no_grad():
        together = lm.model(batch["input_ids"], attention_mask=mask, **places).logits
        for row, prompt in zip(together, PROMPTS, strict=True):
            alone = lm.model(torch.tensor([lm.tokenizer(prompt)["input_ids"]])).logits[0]
            np.testing.assert_allclose(row[-len(alone) :], alone, atol=1e-3)


def test_it_is_saved_with_its_table(several, tmp_path):
    lm, memories, mixture = several
    mixture.save(tmp_path / "gate.json")
    loaded = load_mixture(tmp_path / "gate.json")
    first, again = (evaluate(lm, documents(TEXTS), memories, item, show_progress=False) for item in (mixture, loaded))
    assert first.log_probs.tolist() == again.log_probs.tolist()


WRONG = [
    torch.zeros(5),
    torch.zeros(5, 3),
    torch.zeros(0, 2),
    *(torch.full((5, 2), size) for size in (torch.nan, 3e38)),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_damaged_table_is_refused(several, wrong):
    _, _, mixture = several
    with pytest.raises(ConfigError, match="table of token frequencies is damaged"):
        GateMixture(members=mixture.members, network=mixture.network, familiarity=wrong)


def test_evidence_without_the_text_is_refused(several):
    _, memories, mixture = several
    found = [item.lookup(np.zeros((2, item.width), np.float32), 9) for item in memories[:2]]
    recalled = Cache(40).recall(torch.zeros(2, 3), torch.zeros(2).long())
    with pytest.raises(ConfigError, match="looks at the tokens before"):
        mixture.mix(Evidence((*found, recalled), belief(torch.zeros(2, 5))))

"""Scores: the model's own, the mixture's against an oracle, and retrieval of what was stored."""

import numpy as np
import pytest
import torch

from memlm import KnnMixture, evaluate
from oracle import knn_lm, stored_entries, teacher_forced
from tiny_memories import FIVE, TEXTS, documents, lm_of, store
from tiny_models import FAMILIES

NEW = ["the letter was in the house and it was the morning", "rain was on the bird and the cat is in a box"]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_plain_forward(family):
    lm = lm_of(family)
    sequences = [lm.tokenize(document).ids for document in documents(TEXTS)]
    expected = []
    for ids in sequences:
        with torch.no_grad():
            loss = lm.model(torch.from_numpy(ids)[None], labels=torch.from_numpy(ids)[None]).loss
            logits = lm.model(torch.from_numpy(ids)[None]).logits[0]
        own = logits.double().log_softmax(dim=-1)[:-1].gather(1, torch.from_numpy(ids[1:, None])).squeeze(1)
        assert float(-own.mean()) == pytest.approx(float(loss), abs=1e-5)
        expected.append(own)
    expected = torch.cat(expected)
    got = torch.full((len(expected),), torch.nan)
    for batch in lm.score(sequences):
        got[batch.rows] = batch.log_probs
    assert torch.allclose(got.double(), expected, atol=2e-5)
    assert expected.std() > 0.1, "a model that knows nothing would pass"


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_capped_and_scaled_logits_are_kept(family):
    lm = lm_of(family)
    ids = lm.tokenize(documents(TEXTS)[0]).ids
    with torch.no_grad():
        hidden = lm.model.model(torch.from_numpy(ids)[None]).last_hidden_state[0]
        raw = lm.model.lm_head(hidden).log_softmax(dim=-1)[:-1].gather(1, torch.from_numpy(ids[1:, None])).squeeze(1)
    (batch,) = lm.score([ids])
    assert (batch.log_probs - raw[batch.rows]).abs().max() > 0.01, "lm_head alone gives other probabilities"


@pytest.mark.parametrize("key_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FIVE)
def test_evaluation_agrees_with_the_oracle(family, key_dtype, tmp_path):
    lm = lm_of(family)
    memory = store(lm, TEXTS, tmp_path / "memory", key_dtype=key_dtype)
    keys, values = stored_entries(memory.path)
    assert len(keys) == len(memory) == sum(len(lm.tokenize(document).ids) - 1 for document in documents(TEXTS))
    forwards = [(ids, *teacher_forced(lm.model, lm.site, ids)) for ids in (lm.tokenize(d).ids for d in documents(NEW))]
    targets = np.concatenate([ids[1:] for ids, _, _ in forwards])
    rows = np.arange(len(targets))
    alone = np.concatenate([log_probs[:-1] for _, log_probs, _ in forwards])
    queries = np.concatenate([states[:-1] for _, _, states in forwards])
    typical = float(np.median(np.square(queries[:, None] - keys[None]).sum(axis=2)))
    for k, temperature, weight in [(8, 0.1 * typical, 0.3), (20, typical, 0.9), (len(keys), 0.02 * typical, 0.5)]:
        mixture = KnnMixture(interpolation_weight=weight, temperature=temperature, k=k)
        expected, ambiguous = knn_lm(alone, queries, keys, values, mixture)
        result = evaluate(lm, documents(NEW), memory, mixture, show_progress=False)
        assert result.targets.tolist() == targets.tolist()
        assert np.abs(result.lm_log_probs - alone[rows, targets]).max() < 2e-5
        assert ambiguous.mean() < 0.1
        assert np.abs(result.log_probs - expected[rows, targets])[~ambiguous].max() < 1e-4
        assert np.abs(result.log_probs - result.lm_log_probs).max() > 0.1, "the memory says something"


def test_windows_of_evaluation_agree_with_the_oracle(tmp_path):
    """Long documents are cut in windows; stored keys and queries come from the same cuts."""
    lm = lm_of("llama", context=6, stride=5)
    memory = store(lm, TEXTS, tmp_path / "memory")
    keys, values = stored_entries(memory.path)
    queries, alone, targets = [], [], []
    for document in documents(NEW):
        ids = lm.tokenize(document).ids
        for target in range(1, len(ids)):
            first = 1 + 5 * ((target - 1) // 5)
            log_probs, states = teacher_forced(lm.model, lm.site, ids[max(0, first - 6) : target])
            queries.append(states[-1]), alone.append(log_probs[-1]), targets.append(ids[target])
    mixture = KnnMixture(interpolation_weight=0.4, temperature=10.0, k=8)
    expected, ambiguous = knn_lm(np.array(alone), np.array(queries), keys, values, mixture)
    result = evaluate(lm, documents(NEW), memory, mixture, show_progress=False)
    assert np.abs(result.log_probs - expected[np.arange(len(targets)), targets])[~ambiguous].max() < 1e-4


@pytest.mark.parametrize("settings", [{}, {"context": 6, "stride": 5}])
@pytest.mark.parametrize("family", [*FIVE, "olmo2"])
def test_what_was_stored_is_found_again(family, settings, tmp_path):
    lm = lm_of(family, **settings)
    memory = store(lm, TEXTS, tmp_path / "memory")
    keys, values = stored_entries(memory.path)
    distances = np.square(keys[:, None] - keys[None]).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.min(axis=1)
    tied = nearest < 1e-6 * np.square(keys).sum(axis=1).mean()  # the same tokens before: nothing tells them apart
    mixture = KnnMixture(interpolation_weight=1.0, temperature=0.01 * float(np.median(nearest[~tied])), k=8)

    def mean_p_knn(texts, **arguments):
        result = evaluate(lm, documents(texts), memory, mixture, show_progress=False, **arguments)
        assert result.targets.tolist() == values.tolist()
        return np.exp(result.log_probs)[~tied].mean()

    assert 0 < tied.sum() < len(keys) / 3
    assert mean_p_knn(TEXTS, leave_out_own=False) >= 0.95
    assert mean_p_knn(TEXTS) < 0.5, "a document does not see its own entries"


def test_left_out_by_document_not_by_rank(tmp_path):
    """Nearest neighbors at distance 0 stay when they belong to another document, here a longer version of the same."""
    lm = lm_of("llama")
    copy = TEXTS[0] + " again"
    memory = store(lm, [*TEXTS, copy], tmp_path / "memory")
    mixture = KnnMixture(interpolation_weight=1.0, temperature=0.05, k=2)
    own = len(lm.tokenize(documents(TEXTS)[0]).ids) - 1
    found = evaluate(lm, documents(TEXTS[:1]), memory, mixture, show_progress=False)
    assert np.exp(found.log_probs[: own - 1]).mean() > 0.95, "they are found"
    assert np.exp(found.log_probs[own - 1]) < 0.05, "the copy goes on where the document ends"

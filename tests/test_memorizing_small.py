"""The recipe memorizing-small: the whole of it at a size that takes seconds and shows what the full one shows."""

import json

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from command_line import run
from memlm.layers import memorize
from memlm.ops import nearest_keys
from memlm.recipes import find_experiment
from memlm.recipes import memorizing_small as recipe
from memlm.recipes.memorizing_small import _work as work
from memlm.recipes.memorizing_small._recall import RecallModel, recall_documents

EXPERIMENT = find_experiment("memorizing-small")
TINY = EXPERIMENT.sizes["tiny"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memorizing-small") / "run"
    shown = run(
        "recipes", "run", "memorizing-small", "--size", "tiny", "--seeds", 1, "--processes", 1, "-o", folder, "--json"
    )
    return shown, json.loads(shown.out)


def mean(values, row, arm):
    return next(item["mean"] for item in values["table"] if (item["row"], item["arm"]) == (row, arm))


def test_every_claim_holds_controls_among_them(whole):
    shown, values = whole
    assert [claim["claim"]["text"] for claim in values["claims"] if not claim["holds"]] == [], shown.out
    assert shown.code == 0
    assert sum(claim["claim"]["text"].startswith("Control") for claim in values["claims"]) == 4


def test_recall_is_nearly_certain_from_memory_and_by_chance_without(whole):
    _, values = whole
    chance = torch.tensor(float(TINY.values)).log().item()
    for arm in ("gate", "joint", "tuned"):
        assert mean(values, recipe.WHOLE, arm) < 0.3
    for arm, row in (("none", recipe.NOTHING), ("rolled", recipe.WHOLE), ("own keys", recipe.WHOLE)):
        assert mean(values, row, arm) > chance - 0.1
    assert mean(values, recipe.SHORT, "joint") < 0.2
    for arm in EXPERIMENT.arms:
        assert mean(values, recipe.FIRST, arm) > chance - 0.1  # nobody knows what was never said


def test_values_are_sorted_by_where_they_were_said_before():
    documents = recall_documents(TINY, 20, torch.Generator().manual_seed(0))
    for tokens, kinds in zip(documents.tokens.tolist(), documents.kinds.tolist(), strict=True):
        said = {}
        for number, (segment, kind) in enumerate(zip(tokens, kinds, strict=True)):
            for key, value, given in zip(segment[::2], segment[1::2], kind, strict=True):
                expected = "first" if key not in said else "short" if said[key][1] == number else "long"
                assert work.KINDS[given] == expected
                assert said.get(key, (value, 0))[0] == value
                said[key] = value, number
        assert len(said) <= TINY.names


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = RecallModel(TINY)
    memory = memorize(model.lm, [0], size=TINY.memory, top_k=TINY.top_k, normalize="l2")
    work.train(model, memory, TINY, 60, torch.Generator().manual_seed(0))
    return model, memory, recall_documents(TINY, 32, torch.Generator().manual_seed(1))


def long_of(trained, order=None):
    model, memory, documents = trained
    return work.by_kind(work.losses(model, memory, documents, order), documents)["long"].mean().item()


def test_a_memory_that_is_broken_recalls_less(trained, monkeypatch):
    """Negative controls: what the bench must notice."""
    right = long_of(trained)
    assert right < 0.5
    assert long_of(trained, [*range(1, 32), 0]) > right + 2  # rows read one another's memory
    with monkeypatch.context() as patch:  # one neighbor, and that the farthest
        patch.setattr("memlm.layers._ring.nearest_keys", farthest)
        assert long_of(trained) > right + 2
    with monkeypatch.context() as patch:  # values that belong to other keys
        write = work.Ring.write
        patch.setattr(work.Ring, "write", lambda ring, k, v, known=None: write(ring, k, v.roll(1, 2), known))
        assert long_of(trained) > right + 1


def test_an_approximate_search_is_nearly_as_good_and_a_bad_one_is_not(trained, monkeypatch):
    """Of what exact search finds, a share is lost, at random."""

    def lossy(share):
        generator = torch.Generator().manual_seed(0)

        def search(queries, keys, places, before, k):
            slots, present = nearest_keys(queries, keys, places, before, k)
            return slots, present & (torch.rand(present.shape, generator=generator) >= share)

        return search

    losses = []
    for share in (0.0, 0.1, 0.5):
        with monkeypatch.context() as patch:
            patch.setattr("memlm.layers._ring.nearest_keys", lossy(share))
            losses.append(long_of(trained))
    exact, most, half = losses
    assert exact == long_of(trained)
    assert exact < most < exact + 0.4
    assert half > most + 0.4


def farthest(queries, keys, places, before, k):
    return nearest_keys(-queries, keys, places, before, k)


def test_writing_before_reading_lets_a_segment_find_itself(trained, monkeypatch):
    """Negative control: what was never said would be known, since each value stands in memory beside its key."""
    model, memory, documents = trained
    attend = ALL_ATTENTION_FUNCTIONS["memlm_memory"]

    def too_early(*args, memlm_call, **kwargs):
        attend(*args, memlm_call=memlm_call, **kwargs)
        memlm_call.memory.begin(None)
        return attend(*args, memlm_call=memlm_call, **kwargs)

    def first():
        return work.by_kind(work.losses(model, memory, documents), documents)["first"].mean()

    assert first() > 3
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "memlm_memory", too_early)
    assert first() < 1.5

"""The recipe squat at a size that takes seconds, and its parts."""

import json

import numpy as np
import torch

from command_line import run
from memlm.layers import memorize
from memlm.recipes import find_experiment
from memlm.recipes.squat import _rows as rows
from memlm.recipes.squat import _work as work

EXPERIMENT = find_experiment("squat")
FULL, TINY = EXPERIMENT.sizes["full"], EXPERIMENT.sizes["tiny"]


def test_the_whole_of_it(tmp_path):
    shown = run(
        "recipes", "run", "squat", "--size", "tiny", "--seeds", 1, "--processes", 1, "-o", tmp_path / "run", "--json"
    )
    assert shown.code in (0, 1), shown.err  # 1: a claim does not hold, and at this size hardly any can
    values = json.loads(shown.out)
    table = {(row["row"], row["arm"]): row["perplexity a token"] for row in values["table"]}
    for arm in EXPERIMENT.arms:
        assert {row for row, of in table if of == arm} >= {rows.ALL, rows.FAR, rows.NEAR, rows.NEW}
        assert all(
            1 < value < TINY.vocabulary * 1.5 for (row, of), value in table.items() if (of, row) == (arm, rows.ALL)
        )
        facts = values["runs"][arm][0]
        assert facts["tokens a second"] > 0
        assert sum(facts["shares"].values()) == 1
    assert {row for row, arm in table if arm == "squat"}.isdisjoint({rows.EMPTY, rows.OTHER})
    assert table[rows.EMPTY, "squat-memory"] != table[rows.ALL, "squat-memory"] != table[rows.OTHER, "squat-memory"]
    control = next(claim for claim in values["claims"] if "an empty one" in claim["claim"]["text"])
    assert control["holds"], shown.out


def test_arms_have_equal_parameters():
    sizes = {arm: work.new_model(FULL, arm, 0).num_parameters() for arm in EXPERIMENT.arms}
    assert max(sizes.values()) <= 1.001 * min(sizes.values())


def test_where_a_token_was_last_seen():
    ids = np.array([5, 6, 5, 7, 8, 9, 6, 6])
    names = [work.KINDS[kind] for kind in work.last_seen(ids, window=3)]
    assert names == [rows.NEW, rows.NEAR, rows.NEW, rows.NEW, rows.NEW, rows.FAR, rows.NEAR]


def test_means_of_kinds_are_means_of_their_tokens():
    losses = [np.array([1.0, 2.0, 3.0]), np.array([4.0])]
    row = work._row(losses, [np.array([True, False, True]), np.array([False])])
    assert sum(row.sums) / 4 == 2.0


def test_reading_two_documents_side_by_side_is_reading_each_alone():
    generator = np.random.default_rng(0)
    documents = [generator.integers(TINY.vocabulary, size=size) for size in (70, 41)]
    model = work.new_model(TINY, "squat-memory", 0).eval()
    memory = memorize(model, [-1], size=TINY.memory, top_k=TINY.top_k)
    both = work.read(model, memory, documents, TINY.length)
    for document, losses in zip(documents, both, strict=True):
        assert losses.shape == (len(document) - 1,)
        (alone,) = work.read(model, memory, [document], TINY.length)
        np.testing.assert_allclose(losses, alone, rtol=1e-4, atol=1e-5)
    empty = work.read(model, memory, documents, TINY.length, "empty")
    first = slice(0, TINY.length)
    np.testing.assert_allclose(empty[0][first], both[0][first], rtol=1e-4, atol=1e-5)
    assert np.abs(empty[0] - both[0])[TINY.length :].max() > 1e-4
    with torch.no_grad():
        plain = work.new_model(TINY, "squat", 0).eval()
    np.testing.assert_allclose(work.read(plain, None, documents, TINY.length)[0], empty[0], rtol=1e-4, atol=1e-5)


def test_the_bytes_of_state_are_those_of_keys_and_values():
    assert work.state_bytes(FULL, "squat") == 2 * 4 * FULL.width * FULL.layers * FULL.length
    assert work.state_bytes(FULL, "squat-memory") == work.state_bytes(FULL, "squat") + 2 * 4 * FULL.width * FULL.memory

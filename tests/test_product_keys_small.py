"""The recipe product-keys-small: its facts, its arms, its controls, and all of it at a size that takes seconds."""

import dataclasses
import json

import pytest
import torch

from command_line import run
from memlm.recipes import find_experiment
from memlm.recipes._experiment import Task
from memlm.recipes.product_keys_small import _rows as rows
from memlm.recipes.product_keys_small import _work as work

EXPERIMENT = find_experiment("product-keys-small")
TINY, FULL = EXPERIMENT.sizes["tiny"], EXPERIMENT.sizes["full"]
NOTHING = dataclasses.replace(TINY, steps=2, new_steps=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on the command line, and what it printed."""
    folder = tmp_path_factory.mktemp("product-keys-small") / "run"
    command = "recipes", "run", "product-keys-small", "--size", "tiny", "--seeds", 1, "--processes", 1
    return folder, run(*command, "-o", folder, "--json")


def test_a_whole_run_on_the_command_line(whole):
    folder, shown = whole
    values = json.loads(shown.out)
    assert shown.code == (0 if values["holds"] else 1), shown.err
    assert values == json.loads((folder / "result.json").read_text())
    assert {row["row"] for row in values["table"]} == set(EXPERIMENT.rows)
    found = {(row["arm"], row["row"]): row["mean"] for row in values["table"]}
    for arm in ("product-keys", "product-keys-batch"):
        assert found[arm, rows.KNOWN] < found["dense", rows.KNOWN] - 0.2
        assert found[arm, rows.ROLLED] > 0.8  # control: neighbors' values are of no use
        assert found[arm, rows.UNREAD] < 0.1
        assert found[arm, rows.BEFORE] > 0.7
        assert found[arm, rows.after(rows.NEW, rows.CHOSEN)] < 0.3
        assert found[arm, rows.after(rows.OLD, rows.CHOSEN)] < found[arm, rows.after(rows.OLD, rows.ALL)] - 0.1
    run_of = values["runs"]["product-keys"][0]
    assert 0.9 < run_of["usage"] <= 1
    assert 0 < run_of["divergence"] < 1
    assert "KL of their weights to even ones" in (folder / "result.md").read_text()


@pytest.mark.parametrize("sizes", [TINY, FULL], ids=["tiny", "full"])
def test_arms_are_equal_where_they_say_so(sizes):
    multiplications = sizes.width * sizes.heads * sizes.key_width
    multiplications += sizes.heads * sizes.sub_keys * sizes.key_width + sizes.heads * sizes.k * sizes.width
    assert 2 * sizes.width * sizes.dense == multiplications
    counts = {arm: sum(p.numel() for p in work.new_model(sizes, arm, 0).parameters()) for arm in EXPERIMENT.arms}
    assert counts["dense-wide"] == pytest.approx(counts["product-keys"], rel=0.02)


def test_facts_are_different_and_the_same_for_all_arms_of_a_seed():
    old, new = work.draw_facts(TINY, 3)
    pairs = [tuple(pair) for pair in torch.cat([old.pairs, new.pairs]).tolist()]
    assert len(set(pairs)) == len(pairs) == TINY.facts + TINY.new
    assert int(torch.cat([old.answers, new.answers]).max()) < TINY.symbols
    again, other = work.draw_facts(TINY, 3)[0], work.draw_facts(TINY, 4)[0]
    assert torch.equal(again.pairs, old.pairs)
    assert not torch.equal(other.pairs, old.pairs)


def test_every_epoch_reads_every_fact_that_fills_a_batch():
    sizes = dataclasses.replace(TINY, facts=10, batch=5, steps=4)
    facts = work.Facts(torch.arange(20).view(10, 2), torch.arange(10))
    seen = []

    class Model(work.FactModel):
        def forward(self, pairs):
            seen.extend(pairs[:, 0].tolist())
            return super().forward(pairs)

    model = Model(sizes, torch.nn.Linear(16, 16))
    assert list(work.train(model, facts, sizes, seed=0)) == [5] * 4
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(0, 20, 2))
    assert seen[:10] != seen[10:]


def test_rows_of_fewer_facts_weigh_as_much():
    sizes = dataclasses.replace(TINY, facts=40, groups=2)
    row = work._row(torch.tensor([True, False, True, True]), sizes)
    assert row.sums == [10.0, 20.0]
    assert sum(row.sums) / sizes.facts == 0.75


def test_only_the_way_that_trains_everything_changes_more_than_the_table():
    model = work.new_model(NOTHING, "product-keys", 0)
    _, new = work.draw_facts(NOTHING, 0)
    before = {name: item.clone() for name, item in model.state_dict().items()}

    def changed(slots):
        learned = work.new_model(NOTHING, "product-keys", 0)
        work.learn(learned, new, slots, NOTHING)
        return {name for name, item in learned.state_dict().items() if not torch.equal(item, before[name])}

    assert changed(torch.arange(5)) == {"block.values"}
    assert changed(None) == before.keys()


def test_an_arm_without_memory_has_no_rows_of_a_table(tmp_path):
    advanced = []
    found = EXPERIMENT.measure(Task(NOTHING, "dense", 0, tmp_path, advanced.append))
    assert set(found.rows) == {rows.KNOWN, rows.BEFORE, *(rows.after(f, rows.ALL) for f in (rows.NEW, rows.OLD))}
    assert sum(advanced) == EXPERIMENT.work(NOTHING, "dense")
    assert [len(row.sums) for row in found.rows.values()] == [TINY.groups] * 4

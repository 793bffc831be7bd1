"""The recipe trime-small: its text, its training, its controls, and the whole of it at a size that takes seconds."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from command_line import run
from memlm.cache import Cache
from memlm.documents import Corpus
from memlm.errors import CorpusError
from memlm.evaluation import Text, retrieve
from memlm.models import load
from memlm.recipes import _sources as sources
from memlm.recipes import find_experiment
from memlm.recipes._code_tokenizer import END_OF_TEXT, UNKNOWN, code_tokenizer
from memlm.recipes.trime_small import _measure as bench
from memlm.recipes.trime_small import _train as training

EXPERIMENT = find_experiment("trime-small")
TINY = EXPERIMENT.sizes["tiny"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run on the command line, and what it printed."""
    folder = tmp_path_factory.mktemp("trime-small") / "run"
    return folder, run(*command(folder))


def command(folder):
    return "recipes", "run", "trime-small", "--size", "tiny", "--seeds", 1, "--processes", 1, "-o", folder, "--json"


def test_a_whole_run_on_the_command_line(whole):
    folder, shown = whole
    values = json.loads(shown.out)
    assert shown.code == (0 if values["holds"] else 1), shown.err
    assert values == json.loads((folder / "result.json").read_text())
    assert [claim["claim"]["text"] for claim in values["claims"]] == [claim.text for claim in EXPERIMENT.claims]
    assert {row["row"] for row in values["table"]} == set(EXPERIMENT.rows)
    arms = [row["arm"] for row in values["table"] if row["row"] == "no memory"]
    assert arms == list(EXPERIMENT.arms)
    assert "trime-external, seed 0: " in shown.err
    page = (folder / "result.md").read_text()
    for claim in EXPERIMENT.claims:
        assert f"| {claim.text} |" in page


def test_models_that_are_trained_are_measured_again_without_training(whole):
    folder, shown = whole
    (folder / "measured" / "trime-local-0.json").unlink()
    weights = folder / "models" / "trime-local-0" / "model.safetensors"
    before = weights.stat()
    again = run(*command(folder))
    assert weights.stat() == before
    assert json.loads(again.out)["table"] == json.loads(shown.out)["table"]
    assert "trime-local, seed 0: " in again.err
    assert "trime-long, seed 0: " not in again.err


def test_the_model_without_memory_is_measured_as_transformers_does(whole):
    folder, shown = whole
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / "cross-entropy-0")
    tokenizer = load(folder / "models" / "cross-entropy-0").tokenizer
    total = count = 0
    for document in Corpus(folder / "text" / "test.jsonl"):
        ids = [*tokenizer(document.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, TINY.length - 1):
            part = torch.tensor([ids[start : start + TINY.length]])
            targets = part.shape[1] - 1
            with torch.no_grad():
                total += targets * float(model(input_ids=part, labels=part).loss)
            count += targets
    values = json.loads(shown.out)
    assert values["targets"] == count
    assert values["table"][0]["mean"] == pytest.approx(total / count, rel=1e-4)


def test_every_arm_starts_from_the_same_model_and_reads_the_same_text_in_the_same_order():
    documents = [np.random.default_rng(n).integers(0, 50, 40 + 9 * n) for n in range(9)]
    first = {arm: batches_of(arm, documents) for arm in EXPERIMENT.arms}
    for arm in ("trime-local", "trime-long"):
        for mine, others in zip(first[arm], first["cross-entropy"], strict=True):
            assert all(torch.equal(mine[name], others[name]) for name in mine)
    text = {
        arm: sorted(tuple(row.tolist()) for batch in found for row in batch["input_ids"])
        for arm, found in first.items()
    }
    assert text["trime-external"] == text["cross-entropy"]  # in another order
    one, two, other = (training.new_model(TINY, seed, 1).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def batches_of(arm, documents):
    """Return the batches of one epoch; of the second epoch there are more."""
    batches = []
    for batch in training._batches(arm, documents, TINY, seed=0):
        batches.append(batch)
        if sum(int((batch["segment"] >= 0).sum()) for batch in batches) >= sum(
            -(-(len(d) - 1) // 15) for d in documents
        ):
            return batches
    raise AssertionError


def test_the_learning_rate_rises_stays_and_falls():
    rates = [training._rate(step / 100, 1 / 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[10] == 1.0
    assert rates[39] == pytest.approx(1.0)
    assert rates[70] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.02


def test_shuffled_entries_keep_their_keys_and_get_one_wrong_token_each(whole):
    folder, _ = whole
    lm = load(folder / "models" / "cross-entropy-0", context=1, stride=TINY.length - 1)
    text = Text(lm, list(Corpus(folder / "text" / "test.jsonl")))
    memories = [Cache(20)]
    shuffle = bench.shuffle_of(memories, text, seed=3)
    tokens = np.concatenate([ids[1:] for ids in text.ids])
    starts = np.cumsum([0, *(len(ids) - 1 for ids in text.ids)])[text.document_of_target]
    seen, moved = {}, 0
    for batch in retrieve(lm, text, memories, [20], show_progress=False):
        true, false = batch.evidence.memories[0], shuffle(batch).evidence.memories[0]
        assert torch.equal(true.distances, false.distances)
        present = true.present.numpy()
        numbers = (true.entries.numpy() + starts[batch.rows.numpy()][:, None])[present]
        assert np.array_equal(true.tokens.numpy()[present], tokens[numbers])  # so the numbers are those of entries
        for number, token in zip(numbers.tolist(), false.tokens.numpy()[present].tolist(), strict=True):
            assert seen.setdefault(number, token) == token
        moved += int((true.tokens != false.tokens)[true.present].sum())
    assert moved > 0.5 * sum(seen.values()) / max(seen.values())
    # whoever is in the memory of somebody: all but the last of a document
    lasts = np.cumsum([len(ids) - 1 for ids in text.ids]) - 1
    assert set(seen) == set(range(len(tokens))) - set(lasts.tolist())
    other = bench.shuffle_of(memories, text, seed=4)
    assert any(
        (other(batch).evidence.memories[0].tokens != shuffle(batch).evidence.memories[0].tokens).any()
        for batch in retrieve(lm, text, memories, [20], show_progress=False)
    )


def test_the_text_is_split_by_file_and_the_same_every_time():
    room, longest = {"train": 60_000, "valid": 9_000, "test": 9_000}, {"train": 60_000, "valid": 3_000, "test": 3_000}
    one, two = (sources.standard_library(room, longest) for _ in range(2))
    assert one == two
    names = {side: {item.id for item in items} for side, items in one.items()}
    assert len(set.union(*names.values())) == sum(map(len, names.values()))
    for side, items in one.items():
        assert 0.75 * room[side] <= sum(len(item.text) for item in items) <= room[side]
        assert max(len(item.text) for item in items) <= longest[side]
        assert all(item.text.endswith("\n") or len(item.text) < longest[side] for item in items)
    more = sources.standard_library(room | {"train": 600_000}, longest | {"train": 600_000})
    assert {item.id for item in more["test"]} == names["test"]  # whatever the size of the other sides


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path)))
    (tmp_path / "small.py").write_text("x = 1\n" * 300)
    with pytest.raises(CorpusError, match="run memlm with another Python"):
        sources.standard_library(
            {"train": 90_000, "valid": 900, "test": 900}, dict.fromkeys(("train", "valid", "test"), 900)
        )


def test_code_is_cut_into_identifiers_signs_blanks_and_lines():
    text = "def f(x1, y):\n    return  x1 + 0x1f\t# π²\n"
    tokenizer = code_tokenizer([text], 64, 32)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert pieces == [
        *("def", " ", "f", "(", "x1", ",", " ", "y", ")", ":", "\n    "),
        *("return", "  ", "x1", " ", "+", " ", "0x1f", "\t", "#", " ", "π²", "\n"),
    ]
    assert "".join(pieces) == text
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.bos_token is None
    small = code_tokenizer([text], 4, 32)  # room for two beside the special ones: the most frequent
    assert len(small) == 4
    assert small.convert_ids_to_tokens(small("x1 nobody")["input_ids"]) == ["x1", " ", UNKNOWN]

"""Trained rows: the numbers of a table in memory, only what is touched is read, and a kill loses nothing."""

import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memlm import ops
from memlm.errors import ConfigError, DatastoreError, DatastoreMismatch
from memlm.layers import Bank, RowTraining, TrainedRows, add_trained_rows, remove_beside
from tiny_models import FAMILIES, tiny_model

WITHOUT = {"opt", "opt_post_norm"}
SETTINGS = {"heads": 2, "key_width": 8, "top_k": 4}
IDS = torch.randint(200, (2, 12), generator=torch.Generator().manual_seed(0))


def create(path, n=16, width=8):
    return Bank.create(path, rows=n * n, key_width=0, value_width=width, moments=True)


def frozen(family="llama", seed=0):
    return tiny_model(family, seed).requires_grad_(False)


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(200, (2, 12), generator=generator)


def loss_of(model, ids):
    return model(ids, labels=ids, use_cache=False).loss


@given(st.integers(0, 99), st.integers(1, 6))
def test_a_row_of_one_number_is_trained_as_by_torch(seed, steps):
    """Every row, by its own updates: those of a row that is left out do not count."""
    generator = torch.Generator().manual_seed(seed)
    ours = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    theirs = [row.clone().requires_grad_() for row in ours]
    optimizers = [torch.optim.Adam([row], lr=0.1, betas=(0.8, 0.95)) for row in theirs]
    state = [torch.zeros(3, 1).double(), torch.zeros(3).double(), torch.zeros(3).double()]
    for _ in range(steps):
        touched = torch.rand(3, generator=generator) < 0.7
        gradients = torch.randn(3, 1, generator=generator, dtype=torch.float64)
        new = ops.row_adam(ours[touched], gradients[touched], *(item[touched] for item in state), 0.1, (0.8, 0.95))
        ours[touched], *new_state = new
        for item, part in zip(state, new_state, strict=True):
            item[touched] = part
        for number in touched.nonzero().flatten().tolist():
            theirs[number].grad = gradients[number].clone()
            optimizers[number].step()
    torch.testing.assert_close(ours, torch.stack([row.detach() for row in theirs]))


def test_wider_rows_share_one_second_moment():
    gradients = np.array([[1.0, 3.0], [0.0, 2.0]])
    rows, moments, squares, steps = ops.row_adam(
        *(torch.from_numpy(item) for item in (np.zeros((2, 2)), gradients, np.zeros((2, 2)), np.zeros(2), np.zeros(2))),
        0.1,
    )
    np.testing.assert_allclose(moments, 0.1 * gradients)
    np.testing.assert_allclose(squares, 0.001 * (gradients**2).mean(axis=1))
    np.testing.assert_allclose(rows, -0.1 * gradients / (np.sqrt((gradients**2).mean(axis=1)) + 1e-8)[:, None])
    assert steps.tolist() == [1, 1]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITHOUT))
def test_it_starts_as_nothing_learns_and_is_removed(family, tmp_path):
    model = frozen(family)
    before = model(IDS).logits
    torch.manual_seed(0)
    with create(tmp_path / "bank") as bank:
        rows = add_trained_rows(model, 1, bank, **SETTINGS)
        assert model(IDS).logits.equal(before)
        training = RowTraining(rows, row_learning_rate=0.1)
        model.train()
        losses = []
        for _ in range(4):
            loss = loss_of(model, IDS)
            loss.backward()
            training.update()
            losses.append(loss.item())
        model.eval()
        assert loss_of(model, IDS).item() < losses[1] < losses[0]
        assert not rows.touched
        remove_beside(model, rows)
        assert model(IDS).logits.equal(before)


def test_training_is_that_of_a_table_in_memory(tmp_path, monkeypatch):
    """A dense embedding under torch's autograd: same losses, and the same rows changed."""
    torch.manual_seed(0)
    model, bank = frozen(), create(tmp_path / "bank")
    rows = add_trained_rows(model, 0, bank, **SETTINGS).train()
    training = RowTraining(rows, row_learning_rate=0.05)
    torch.manual_seed(0)
    dense_model, dense_bank = frozen(), create(tmp_path / "dense")
    dense = add_trained_rows(dense_model, 0, dense_bank, **SETTINGS).train()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3, weight_decay=0.0)
    table = torch.zeros(bank.rows, bank.value_width, requires_grad=True)
    monkeypatch.setattr(dense_bank, "read", lambda name, ids: table[ids])
    monkeypatch.setattr(torch.Tensor, "requires_grad_", lambda self, needed=True: self)  # not a leaf here
    state = [torch.zeros(bank.rows, bank.value_width), torch.zeros(bank.rows), torch.zeros(bank.rows)]
    text = batches()
    for _ in range(5):
        ids = next(text)
        monkeypatch.undo()
        loss = loss_of(model, ids)
        loss.backward()
        hit = torch.cat([ids for ids, _ in rows.touched]).unique()
        assert training.update() == len(hit) < bank.rows
        monkeypatch.setattr(dense_bank, "read", lambda name, ids: table[ids])
        monkeypatch.setattr(torch.Tensor, "requires_grad_", lambda self, needed=True: self)
        expected = loss_of(dense_model, ids)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        new = ops.row_adam(table.detach()[hit], table.grad[hit], *(item[hit] for item in state), 0.05)
        with torch.no_grad():
            table[hit] = new[0]
        for item, part in zip(state, new[1:], strict=True):
            item[hit] = part
        table.grad = None
        torch.testing.assert_close(bank.values, table.detach(), atol=1e-6, rtol=1e-4)


def test_only_the_rows_of_a_batch_are_read_and_changed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, bank = frozen(), create(tmp_path / "bank", n=64)
    rows = add_trained_rows(model, 0, bank, **SETTINGS).train()
    training = RowTraining(rows)
    read, before = set(), bank.values.clone()
    original = Bank.read

    def watched(self, name, ids):
        read.update(ids.tolist())
        return original(self, name, ids)

    monkeypatch.setattr(Bank, "read", watched)
    loss_of(model, IDS).backward()
    count = training.update()
    changed = (bank.values != before).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) <= read
    assert len(read) == count <= IDS.numel() * SETTINGS["heads"] * SETTINGS["top_k"]
    assert 0 < len(changed) <= count < bank.rows // 10


@pytest.mark.parametrize("how", ["accumulated", "checkpointed", "autocast"])
def test_other_ways_to_train(tmp_path, how):
    torch.manual_seed(0)
    model, bank = frozen(), create(tmp_path / "bank")
    training = RowTraining(add_trained_rows(model, 0, bank, **SETTINGS))
    model.train()
    if how == "checkpointed":
        model.activation_checkpointing_enable({"use_reentrant": False})
    for ids in IDS.split(1 if how == "accumulated" else 2):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            (loss_of(model, ids) * len(ids) / 2).backward()
    training.update()
    torch.manual_seed(0)
    other, plain = frozen(), create(tmp_path / "plain")
    expected = RowTraining(add_trained_rows(other, 0, plain, **SETTINGS))
    other.train()
    loss_of(other, IDS).backward()
    expected.update()
    assert plain.values.abs().sum() > 0
    # Adam's first step is the gradient's sign and size against the row's mean, so that small noise stays small
    torch.testing.assert_close(bank.values, plain.values, atol=1e-5 if how != "autocast" else 5e-3, rtol=1e-3)


def test_a_batch_is_measured_before_it_is_written(tmp_path):
    """Random text that is read once cannot be predicted; written before it is asked for, it could (control)."""
    torch.manual_seed(0)
    model, bank = frozen(), create(tmp_path / "bank")
    training = RowTraining(add_trained_rows(model, 1, bank, **SETTINGS), row_learning_rate=4.0)
    text = batches()
    before = [loss_of(frozen(), next(text)).item() for _ in range(12)]
    model.train()
    measured, written_first = [], []
    text = batches()
    for _ in range(12):
        ids = next(text)
        loss = loss_of(model, ids)
        loss.backward()
        training.update()
        measured.append(loss.item())
        with torch.no_grad():
            written_first.append(loss_of(model, ids).item())
    assert np.mean(measured) > np.mean(before) - 0.2
    assert np.mean(written_first) < np.mean(before) - 0.5


def train(folder, steps, every=4, kill=None, say=None):
    """Train to so many steps, or go on with what is there."""
    torch.manual_seed(0)
    model = frozen()
    with Bank(folder, writable=True) as bank:
        rows = add_trained_rows(model, 0, bank, **SETTINGS)
        training = RowTraining(rows, row_learning_rate=0.05, rate=lambda step: min(1.0, (step + 1) / 8))
        model.train()
        text = batches()
        for _ in range(training.steps):
            next(text)
        while training.steps < steps:
            loss_of(model, next(text)).backward()
            training.update()
            if training.steps % every == 0:
                training.commit()
                if say:
                    say(training.steps)
        training.commit()
        return {
            name: bank.read(name, torch.arange(bank.rows)) for name in ("values", "moments", "squares", "steps")
        } | {f"module.{name}": item.clone() for name, item in rows.state_dict().items()}


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_trained_rows import train
train(sys.argv[1], 1_000_000, say=lambda steps: print(steps, flush=True))
"""


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    create(tmp_path / "bank").close()
    folder, here = str(tmp_path / "bank"), os.path.dirname(__file__)
    journals, reported = 0, 0
    for lines in (2, 3):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, folder, here], stdout=subprocess.PIPE, text=True
        ) as process:
            for _ in range(lines):
                assert int(process.stdout.readline()) > reported
            process.send_signal(signal.SIGKILL)
        journals += (tmp_path / "bank" / "journal").exists()
        with Bank(folder) as bank:
            steps = bank.committed.note["steps"]
        assert steps >= reported + 4 * lines
        assert steps % 4 == 0
        reported = steps
    resumed = train(folder, reported + 6)
    create(tmp_path / "whole").close()
    whole = train(tmp_path / "whole", reported + 6)
    assert all(resumed[name].equal(whole[name]) for name in whole)
    # negative control: the same text from its beginning gives other numbers
    create(tmp_path / "other").close()
    assert not train(tmp_path / "other", 6)["values"].equal(whole["values"])


LIMITED = """
import resource, sys
import torch
from memlm.layers import Bank, RowTraining, TrainedRows

torch.set_num_threads(1)

def anonymous():
    with open("/proc/self/status") as file:
        lines = [line.split() for line in file]
    return {line[0]: int(line[1]) << 10 for line in lines if line[0] in ("RssAnon:", "VmData:")}

def train(folder, steps, load=False):
    bank = Bank(folder, writable=True)
    torch.manual_seed(0)
    rows = TrainedRows(32, bank, heads=2, key_width=16, top_k=8)
    table = bank.values.clone() if load else None
    training = RowTraining(rows, row_learning_rate=0.1)
    peak, touched = 0, set()
    for step in range(steps):
        hidden = torch.randn(128, 32)
        rows(hidden).sub(hidden).square().mean().backward()
        touched.update(torch.cat([ids for ids, _ in rows.touched]).tolist())
        training.update()
        peak = max(peak, anonymous()["RssAnon:"])
        if step % 20 == 19:
            training.commit()
    bank.close()
    return peak, len(touched)

small, large, limit, how = sys.argv[1:]
train(small, 2)  # libraries take what they need
before = anonymous()
resource.setrlimit(resource.RLIMIT_DATA, (before["VmData:"] + int(limit),) * 2)
peak, touched = train(large, 40, how == "load")
print(peak - before["RssAnon:"], touched)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA and /proc are Linux")
def test_a_table_larger_than_the_limit_is_trained_under_it(tmp_path):
    """The operating system enforces the limit on anonymous memory; loading the table, as a control, breaks it."""
    assert hasattr(resource, "RLIMIT_DATA")
    limit = 24 << 20
    create(tmp_path / "small", n=16, width=64).close()
    create(tmp_path / "bank", n=512, width=64).close()
    size = sum((tmp_path / "bank" / name).stat().st_size for name in ("rows.safetensors", "moments.safetensors"))
    assert size > 5 * limit

    def run(how):
        command = [sys.executable, "-c", LIMITED, str(tmp_path / "small"), str(tmp_path / "bank"), str(limit), how]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("map")
    assert done.returncode == 0, done.stderr
    peak, touched = map(int, done.stdout.split())
    assert 0 < peak < limit
    assert touched > 2_000
    with Bank(tmp_path / "bank") as bank:
        assert bank.committed.note["steps"] == 40
        assert int((bank.values != 0).any(dim=1).sum()) > 2_000
    control = run("load")
    assert control.returncode != 0
    assert "allocate memory" in control.stderr


def test_a_published_table_is_read_by_another_model_object(tmp_path):
    train_folder = tmp_path / "bank"
    create(train_folder).close()
    train(train_folder, 8)
    model = frozen()
    with Bank(train_folder) as bank:
        rows = add_trained_rows(model, 0, bank)
        expected = model(IDS).logits
        bank.publish(tmp_path / "published")
    again = frozen()
    with Bank(tmp_path / "published") as published:
        rows = add_trained_rows(again, 0, published)
        assert again(IDS).logits.equal(expected)
        assert not expected.equal(frozen()(IDS).logits)
        # generation, batched and with beams
        together = again.generate(IDS, max_new_tokens=5, do_sample=False, num_beams=2, pad_token_id=0)
        alone = again.generate(IDS[1:], max_new_tokens=5, do_sample=False, num_beams=2, pad_token_id=0)
        assert together[1:, : alone.shape[1]].equal(alone)
        with pytest.raises(DatastoreError, match="is published"):
            RowTraining(rows)


def test_what_does_not_fit(tmp_path):
    bank = Bank.create(tmp_path / "keys", rows=16, key_width=2, value_width=4)
    with pytest.raises(ConfigError, match="expected n² rows and width 0"):
        TrainedRows(8, bank)
    bank = Bank.create(tmp_path / "odd", rows=15, key_width=0, value_width=4)
    with pytest.raises(ConfigError, match="such as 9"):
        TrainedRows(8, bank)
    bank = create(tmp_path / "plain", n=4)
    for settings in ({"heads": 0}, {"key_width": 3}, {"key_width": 0}, {"top_k": 0}, {"top_k": 17}):
        with pytest.raises(ConfigError, match="heads, key_width and top_k"):
            TrainedRows(8, bank, **settings)
    bank = Bank.create(tmp_path / "still", rows=16, key_width=0, value_width=4)
    with pytest.raises(ConfigError, match="keeps no moments"):
        RowTraining(TrainedRows(8, bank))
    create(tmp_path / "bank").close()
    train(tmp_path / "bank", 1)
    with Bank(tmp_path / "bank") as bank:
        with pytest.raises(DatastoreMismatch, match="leave them out"):
            add_trained_rows(frozen(), 0, bank, heads=3)
        other = tiny_model("llama")
        other.config.hidden_size = 16
        with pytest.raises(DatastoreMismatch, match="of width 16"):
            add_trained_rows(other, 0, bank)


def test_the_page_runs():
    page = (Path(__file__).parent.parent / "docs" / "external-weights.md").read_text()
    exec(compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "docs/external-weights.md", "exec"), {})

"""The work on one arm: train the model, freeze it, train the reader on half of the names, ask the others."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ...layers import Bank, RowReader, add_row_reader, load_row_reader, owner_of, rows_of, save_row_reader
from ...training import Asked, train_reader
from .._experiment import Measured, Row, Task
from . import _rows as rows
from ._language import START, Language
from ._sizes import Sizes


def measure(task: Task) -> Measured:
    """Train and measure one arm; what an earlier run has trained is measured as it is."""
    sizes = task.size
    for_model, for_reader, for_test = (Language(sizes, task.seed, use) for use in range(3))
    model = _model(task, for_model)
    place = task.folder / "models" / f"{task.arm}-{task.seed}"
    if place.exists():
        reader = load_row_reader(model, place)
        task.advance(sizes.steps * sizes.facts)
    else:
        torch.manual_seed(task.seed)
        shape = {"key_width": sizes.key_width, "value_width": sizes.value_width, "top_k": sizes.top_k}
        reader = add_row_reader(model, sizes.layer, window=sizes.window, **shape)
        episodes = _episodes(for_reader, sizes, misled=task.arm != "reader")
        train_reader(
            model,
            reader,
            episodes,
            sizes.steps,
            learning_rate=sizes.learning_rate,
            show_progress=False,
            after=lambda step, loss: task.advance(sizes.facts),
        )
        save_row_reader(model, place)
    with tempfile.TemporaryDirectory(dir=task.folder) as temporary:
        return _test(model, reader, for_test, Path(temporary), sizes)


def _model(task: Task, language: Language) -> Any:
    """Return the model of a seed, trained once for all its arms."""
    sizes, place = task.size, task.folder / "models" / f"model-{task.arm}-{task.seed}"
    if place.exists():
        return LlamaForCausalLM.from_pretrained(place).eval()
    torch.manual_seed(task.seed)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.length,
        tie_word_embeddings=True,
        bos_token_id=START,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(sizes.model_steps):
        ids = language.documents(sizes.model_rows)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50, (sizes.model_steps - step) / (0.4 * sizes.model_steps))
        optimizer.step()
        optimizer.zero_grad()
        task.advance(ids.numel())
    staging = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    staging.rename(place)
    return model.eval()


def _episodes(language: Language, sizes: Sizes, misled: bool) -> Iterator[tuple[list[Asked], Tensor]]:
    """Yield facts of known names with answers drawn anew, and text; where misled, another is written than asked."""
    while True:
        keys = language.generator.choice(language.known, size=min(sizes.facts, len(language.known)), replace=False)
        told = np.roll(keys, 1) if misled else keys
        asked = []
        for key, other, answer in zip(keys.tolist(), told.tolist(), language.answer(len(keys)).tolist(), strict=True):
            question = language.question(key, answer)
            asked.append(Asked(language.fact(other, answer), 3, question, len(question) - 1))
        yield asked, language.text(8)


def _test(model: Any, reader: RowReader, language: Language, folder: Path, sizes: Sizes) -> Measured:
    """Write facts into a table on disk, replace and delete them, and ask."""
    chosen, known = language.unseen[: sizes.written], language.known[: sizes.written]
    answers = language.answer(len(chosen))
    # another answer for each
    others = answers - 1 - 2 * sizes.names
    new = (
        (others + language.generator.integers(1, sizes.answers, size=len(chosen))) % sizes.answers + 1 + 2 * sizes.names
    )
    text = language.text(sizes.text)
    errors: dict[str, np.ndarray] = {}
    shape = {"key_width": sizes.key_width, "value_width": sizes.value_width}
    with Bank.create(folder / "bank", rows=6 * len(chosen), **shape) as bank:

        def ask(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
            with reader.reading(bank):
                return _wrong(model, language, keys, values)

        errors[rows.NOTHING] = ask(chosen, answers)
        before = _nats(model, text)
        _write(model, reader, bank, language, chosen, answers)
        errors[rows.WRITTEN] = ask(chosen, answers)
        with reader.reading(bank):
            changed = _nats(model, text) - before
        ids = bank.owners.nonzero().flatten()
        values = bank.read("values", ids)
        for name, order in ((rows.VALUES, ids.roll(1)), (rows.DEALT, ids[torch.randperm(len(ids))])):
            bank.commit()
            bank.update(ids, values=bank.read("values", order))
            errors[name] = ask(chosen, answers)
            bank.rollback()
        assert bank.read("values", ids).equal(values)
        _write(model, reader, bank, language, chosen, new)
        errors[rows.REPLACED], errors[rows.OLD] = ask(chosen, new), ask(chosen, answers)
        _write(model, reader, bank, language, chosen, answers)
        errors[rows.OTHERS], errors[rows.DELETED] = (np.empty(len(chosen)) for _ in range(2))
        for half in (np.arange(len(chosen)) % 2 == 0, np.arange(len(chosen)) % 2 == 1):
            for key in chosen[half].tolist():
                bank.delete(owner_of(str(key)))
            errors[rows.DELETED][half] = ask(chosen[half], answers[half])
            errors[rows.OTHERS][~half] = ask(chosen[~half], answers[~half])
            _write(model, reader, bank, language, chosen[half], answers[half])
        _write(model, reader, bank, language, known, answers)
        errors[rows.KNOWN] = ask(known, answers)
    errors |= {rows.WRONG: np.ones(len(chosen)), rows.RIGHT: np.zeros(len(chosen))}
    groups = np.arange(len(chosen)) % sizes.groups
    counts = np.bincount(groups)
    sums = {name: np.bincount(groups, wrong) for name, wrong in errors.items()}
    sums[rows.TEXT] = counts * changed.reshape(sizes.groups, -1).mean(
        axis=1
    )  # a mean a token, for as many as are asked
    return Measured(
        counts=counts.tolist(),
        groups="groups of facts",
        rows={name: Row(item.tolist()) for name, item in sums.items()},
        facts={"threshold": reader.threshold.item(), "scale": reader.log_scale.exp().item()},
    )


def _write(
    model: Any, reader: RowReader, bank: Bank, language: Language, keys: np.ndarray, answers: np.ndarray
) -> None:
    """Write facts; those of the same names are replaced."""
    facts = [language.fact(*pair) for pair in zip(keys.tolist(), answers.tolist(), strict=True)]
    with torch.no_grad():
        made = rows_of(model, reader, facts, [3] * len(facts))
    for key, item in zip(keys.tolist(), made, strict=True):
        bank.delete(owner_of(str(key)))
        bank.write(owner_of(str(key)), item.keys, item.values)


@torch.no_grad()
def _wrong(model: Any, language: Language, keys: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Ask for facts, and return 1 where the likeliest token is not the answer; shape (n,)."""
    wrong = []
    for key, answer in zip(keys.tolist(), answers.tolist(), strict=True):
        question = torch.tensor([language.question(key, answer)[:-1]])
        wrong.append(float(model(input_ids=question, use_cache=False).logits[0, -1].argmax() != answer))
    return np.array(wrong)


@torch.no_grad()
def _nats(model: Any, text: Tensor) -> np.ndarray:
    """Return the mean loss a token of every document, shape (documents,)."""
    logits = model(input_ids=text, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").mean(dim=1).double().numpy()

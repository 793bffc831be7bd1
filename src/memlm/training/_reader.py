"""Training a reader of external weights on facts that are written anew in every step: it learns to read, not the facts.

Each step writes some facts, asks for each in other words, and looks at text without facts. The rows are made with
gradients, so that the maps of keys and values learn, too, and stand among rows of earlier steps. The loss has four
parts, means in nats: the answers; which row was found for each token of an answer; that none is found elsewhere; and
how much other text is changed. KBLaM (Wang et al. 2025, arXiv:2410.10450) trains linear maps to keys and values for a
frozen model on the answers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..layers import RowReader, TensorRows, rows_of, site_of
from ..models import forward_with_keys
from ..progress import progress


class Asked(NamedTuple):
    """A fact and a question for it.

    Attributes:
        fact: Token ids, as it is written.
        place: Where in it the answer begins.
        question: Token ids in other words, the answer at its end.
        start: Where in it the answer begins.
    """

    fact: Sequence[int]
    place: int
    question: Sequence[int]
    start: int


@dataclass(frozen=True, kw_only=True)
class ReaderLoss:
    """Parts of the loss of a step, in nats.

    Attributes:
        answers: Cross-entropy of the answers' tokens.
        found: Cross-entropy of the right row for each of these.
        silent: Cross-entropy of no row at other tokens.
        changed: Kullback-Leibler divergence of the next-token distribution from the frozen model's, on other text.
    """

    answers: Tensor
    found: Tensor
    silent: Tensor
    changed: Tensor

    @property
    def total(self) -> Tensor:
        """Return their sum."""
        return self.answers + self.found + self.silent + self.changed


def reader_loss(
    model: Any, reader: RowReader, asked: Sequence[Asked], text: Tensor, others: TensorRows | None = None
) -> tuple[ReaderLoss, list[TensorRows]]:
    """Write facts, ask for them, and read other text.

    Args:
        model: A frozen causal LM with the reader in it.
        reader: What is trained.
        asked: The facts of a step; the tokens of their answers get rows.
        text: Token ids of other text, int64, shape (rows, length).
        others: Rows that are in the table, too, and are not asked for.

    Returns:
        The loss, and the rows of each fact.

    Raises:
        ConfigError: A question's answer is not in its fact.
    """
    for item in asked:
        answer = list(item.question[item.start :])
        if not answer or item.place < 1 or item.start < 1 or list(item.fact[item.place :][: len(answer)]) != answer:
            raise ConfigError(
                f"the answer {answer} of a question is not at token {item.place} of its fact {list(item.fact)}; "
                "expected the same tokens in both, after at least one other"
            )
    made = rows_of(model, reader, [item.fact for item in asked], [item.place for item in asked])
    written = _joined(made)
    table = written if others is None else _joined([written, others])
    device = written.keys.device
    text, questions = text.to(device), _padded([item.question for item in asked]).to(device)  # (facts, length)
    wanted = torch.full_like(
        questions, -1
    )  # of each position the row to be found plus one, 0 for none, −1 past the end
    first = 1
    for row, item, rows in zip(wanted, asked, made, strict=True):
        row[: item.start - 1] = 0
        count = len(item.question) - item.start
        row[item.start - 1 : item.start - 1 + count] = torch.arange(first, first + count)
        first += len(rows)
    wanted = wanted[:, :-1].flatten()
    site = site_of(model, reader)
    with torch.no_grad(), reader.reading(None):
        before = model(input_ids=text, use_cache=False).logits.float().log_softmax(dim=-1)
    with reader.reading(table):
        output, here = forward_with_keys(model, site, {"input_ids": questions})
        answers = output.logits[:, :-1].flatten(0, 1)[wanted > 0]
        output, there = forward_with_keys(model, site, {"input_ids": text})
        after = output.logits.float().log_softmax(dim=-1)
    here, there = (reader.windows(part.reshape(*ids.shape, -1)) for part, ids in ((here, questions), (there, text)))
    windows = torch.cat([here[:, :-1].flatten(0, 1)[wanted >= 0], there.flatten(0, 1)])
    targets = torch.cat([wanted[wanted >= 0], wanted.new_zeros(text.numel())])
    losses = F.cross_entropy(reader.scores(windows, table.keys), targets, reduction="none")
    loss = ReaderLoss(
        answers=F.cross_entropy(answers.float(), questions[:, 1:].flatten()[wanted > 0]),
        found=losses[targets > 0].mean(),
        silent=losses[targets == 0].mean(),
        changed=F.kl_div(after.flatten(0, 1), before.flatten(0, 1), log_target=True, reduction="batchmean"),
    )
    return loss, made


def train_reader(
    model: Any,
    reader: RowReader,
    episodes: Iterator[tuple[Sequence[Asked], Tensor]],
    steps: int,
    *,
    learning_rate: float = 1e-2,
    others: int = 4096,
    show_progress: bool = True,
    after: Callable[[int, ReaderLoss], None] | None = None,
) -> None:
    """Train a reader in place; the model itself is not changed.

    Args:
        model: A causal LM with the reader in it.
        reader: From `add_row_reader`.
        episodes: Facts and other text of each step; see `reader_loss`.
        steps: Optimizer steps.
        learning_rate: Of AdamW, at its highest: it rises over the first twentieth and falls over the last 40 %.
        others: Rows of earlier steps that stay in the table, about, so that few facts a step are among many: as many as
            the table will have, if that is affordable. A fact that is written again replaces the one of before: what
            stands before its answer is its name.
        show_progress: Show steps a second and time left on stderr.
        after: Called with the number of steps made and the loss of the last one.
    """
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    model.eval()  # without dropout: the model is to be read as it will be used
    model.requires_grad_(False)
    reader.requires_grad_(True)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=learning_rate, weight_decay=0.0)
    earlier: dict[tuple[int, ...], TensorRows] = {}  # the newest last
    kept = 0  # rows of these
    try:
        with progress("reader", steps, "steps", show=show_progress) as advance:
            for step in range(steps):
                asked, text = next(episodes)
                names = [tuple(item.fact[: item.place]) for item in asked]
                for name in names:  # two rows of one name could not be told apart
                    kept -= len(earlier.pop(name, ()))
                before = _joined(list(earlier.values())) if earlier else None
                loss, made = reader_loss(model, reader, asked, text, before)
                for name, rows in zip(names, made, strict=True):
                    kept += len(rows) - len(earlier.get(name, ()))
                    earlier[name] = TensorRows(rows.keys.detach(), rows.values.detach())
                while kept > others:
                    kept -= len(earlier.pop(next(iter(earlier))))
                optimizer.zero_grad()
                loss.total.backward()
                torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * min(1.0, 20 * (step + 1) / steps, (steps - step) / (0.4 * steps))
                optimizer.step()
                advance(1)
                if after is not None:
                    after(step + 1, loss)
    finally:
        for parameter, was_needed in needed:
            parameter.requires_grad_(was_needed)
        model.train(was_training)


def _joined(parts: Sequence[TensorRows]) -> TensorRows:
    return TensorRows(torch.cat([item.keys for item in parts]), torch.cat([item.values for item in parts]))


def _padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    ids = torch.zeros((len(sequences), max(map(len, sequences))), dtype=torch.long)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids

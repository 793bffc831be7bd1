"""Batches whose rows read documents in order, segment by segment: what a memory inside the model is trained on.

Wu et al. 2022 (arXiv:2203.08913), section 3.1: every row of the batch reads a document of its own, from batch to batch;
where it ends, the row goes on with the next, and its memory is emptied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError
from ._trime import IGNORED


class StreamBatch(NamedTuple):
    """The next segment of every row.

    Attributes:
        input_ids: Int64, shape (rows, length), padded at the right.
        targets: The token after each, int64, shape (rows, length); −100 for padding.
        known: Int64, shape (rows, length): 0 for padding; the model's attention mask.
        begins: Bool, shape (rows,): whether the row begins another document here.
    """

    input_ids: Tensor
    targets: Tensor
    known: Tensor
    begins: Tensor


def document_streams(
    documents: Iterable[npt.NDArray[np.integer]], rows: int, length: int, padding: int = 0
) -> Iterator[StreamBatch]:
    """Let so many rows read documents; segments do not overlap, and every token but a document's first is a target.

    Args:
        documents: Token ids of each, shape (tokens,); those of fewer than two are left out. They may be endless.
        rows: Documents that are read at the same time; a row that is free takes the next.
        length: Tokens a segment.
        padding: Token id.

    Yields:
        Batches until all documents are read; rows that have none left are padding.

    Raises:
        ConfigError: Rows or length are below 1.

    Example:
        >>> for batch in document_streams([np.arange(4), np.arange(9, 12)], rows=1, length=2):
        ...     batch.input_ids.tolist(), batch.targets.tolist(), batch.begins.tolist()
        ([[0, 1]], [[1, 2]], [True])
        ([[2, 0]], [[3, -100]], [False])
        ([[9, 10]], [[10, 11]], [True])
    """
    for name, number in (("rows", rows), ("length", length)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; expected a whole number of at least 1")
    waiting = (ids for ids in documents if len(ids) > 1)
    current: list[npt.NDArray[np.integer] | None] = [None] * rows
    places = [0] * rows
    while True:
        begins = []
        for row, ids in enumerate(current):
            if ids is None or places[row] + 1 >= len(ids):
                current[row], places[row] = next(waiting, None), 0
            begins.append(places[row] == 0 and current[row] is not None)
        if all(ids is None for ids in current):
            return
        inputs = np.full((rows, length), padding, np.int64)
        targets = np.full((rows, length), IGNORED, np.int64)
        for row, ids in enumerate(current):
            if ids is not None:
                after = ids[places[row] + 1 : places[row] + 1 + length]
                inputs[row, : len(after)] = ids[places[row] : places[row] + len(after)]
                targets[row, : len(after)] = after
                places[row] += len(after)
        known = torch.from_numpy((targets != IGNORED).astype(np.int64))
        yield StreamBatch(torch.from_numpy(inputs), torch.from_numpy(targets), known, torch.tensor(begins))

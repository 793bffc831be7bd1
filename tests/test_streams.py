"""Documents read in order by the rows of batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.errors import ConfigError
from memlm.training import document_streams


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_every_token_but_the_first_is_a_target_once_and_in_order(lengths, rows, length):
    documents = [np.arange(n) + 100 * number for number, n in enumerate(lengths)]
    texts = [[] for _ in range(rows)]
    for batch in document_streams(documents, rows, length, padding=7):
        assert batch.known.any()
        for row in range(rows):
            known = batch.known[row].bool()
            tokens, targets = batch.input_ids[row, known], batch.targets[row, known]
            assert (batch.input_ids[row, ~known] == 7).all()
            assert (batch.targets[row, ~known] == -100).all()
            assert (targets == tokens + 1).all()
            if batch.begins[row]:
                texts[row].append([int(tokens[0])])
            if known.any():
                texts[row][-1].extend(targets.tolist())
    read = sorted(text for row in texts for text in row)
    assert read == [document.tolist() for document in documents if len(document) > 1]


def test_rows_and_length_must_be_numbers():
    for wrong in ({"rows": 0, "length": 3}, {"rows": 3, "length": 0}):
        with pytest.raises(ConfigError, match="is 0; expected a whole number"):
            next(document_streams([], **wrong))

"""Trainable memory as torch modules: inside the model, or read by it from outside."""

from ._bank import Bank as Bank
from ._bank import Committed as Committed
from ._beside import add_row_reader as add_row_reader
from ._beside import take_away as take_away
from ._facts import create_fact_bank as create_fact_bank
from ._facts import rows_of as rows_of
from ._reader import RowReader as RowReader
from ._rows import Nearest as Nearest
from ._rows import TensorRows as TensorRows

__all__ = [
    "Bank",
    "Committed",
    "Nearest",
    "RowReader",
    "TensorRows",
    "add_row_reader",
    "create_fact_bank",
    "rows_of",
    "take_away",
]

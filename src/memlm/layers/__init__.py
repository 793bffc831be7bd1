"""Memory inside a model: trainable torch modules, and what puts them into Hugging Face decoders and takes them out."""

from ._bank import Bank as Bank
from ._bank import Committed as Committed
from ._beside import add_row_reader as add_row_reader
from ._beside import remove_beside as remove_beside
from ._facts import create_fact_bank as create_fact_bank
from ._facts import delete_facts as delete_facts
from ._facts import hidden_of as hidden_of
from ._facts import owner_of as owner_of
from ._facts import rows_of as rows_of
from ._facts import site_of as site_of
from ._facts import write_facts as write_facts
from ._reader import RowReader as RowReader
from ._rows import Nearest as Nearest
from ._rows import Rows as Rows
from ._rows import TensorRows as TensorRows
from ._save_reader import load_row_reader as load_row_reader
from ._save_reader import save_row_reader as save_row_reader
from ._trained_rows import RowTraining as RowTraining
from ._trained_rows import TrainedRows as TrainedRows
from ._trained_rows import add_trained_rows as add_trained_rows

__all__ = [
    "Bank",
    "Committed",
    "Nearest",
    "RowReader",
    "RowTraining",
    "Rows",
    "TensorRows",
    "TrainedRows",
    "add_row_reader",
    "add_trained_rows",
    "create_fact_bank",
    "delete_facts",
    "hidden_of",
    "load_row_reader",
    "owner_of",
    "remove_beside",
    "rows_of",
    "save_row_reader",
    "site_of",
    "write_facts",
]

"""Memory inside a model: trainable torch modules, and what puts them into Hugging Face decoders and takes them out."""

from ._add_product_keys import add_product_keys as add_product_keys
from ._add_product_keys import remove_product_keys as remove_product_keys
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
from ._memorize import AttentionMemories as AttentionMemories
from ._memorize import forget as forget
from ._memorize import memorize as memorize
from ._memorize import memory_of as memory_of
from ._memory_attention import AttentionMemory as AttentionMemory
from ._memory_settings import AttentionMemorySettings as AttentionMemorySettings
from ._product_keys import ProductKeyMemory as ProductKeyMemory
from ._product_keys import ProductKeySettings as ProductKeySettings
from ._product_keys import product_key_memories as product_key_memories
from ._reader import RowReader as RowReader
from ._removable import Removable as Removable
from ._ring import KeyValueMemory as KeyValueMemory
from ._ring import Recalled as Recalled
from ._ring import Ring as Ring
from ._rows import Nearest as Nearest
from ._rows import Rows as Rows
from ._rows import TensorRows as TensorRows
from ._save_memory import load_attention_memory as load_attention_memory
from ._save_memory import save_attention_memory as save_attention_memory
from ._save_product_keys import load_product_keys as load_product_keys
from ._save_product_keys import save_product_keys as save_product_keys
from ._save_reader import load_row_reader as load_row_reader
from ._save_reader import save_row_reader as save_row_reader
from ._slot_usage import SlotUsage as SlotUsage
from ._slot_usage import choose_slots as choose_slots
from ._slot_usage import count_slot_usage as count_slot_usage
from ._top_k_attention import register_top_k as register_top_k
from ._top_k_attention import top_k_attention as top_k_attention
from ._top_k_feed_forward import top_k_feed_forward as top_k_feed_forward
from ._train_product_keys import product_key_groups as product_key_groups
from ._train_product_keys import product_key_optimizers as product_key_optimizers
from ._train_product_keys import training_slots_only as training_slots_only
from ._trained_rows import RowTraining as RowTraining
from ._trained_rows import TrainedRows as TrainedRows
from ._trained_rows import add_trained_rows as add_trained_rows

__all__ = [
    "AttentionMemories",
    "AttentionMemory",
    "AttentionMemorySettings",
    "Bank",
    "Committed",
    "KeyValueMemory",
    "Nearest",
    "ProductKeyMemory",
    "ProductKeySettings",
    "Recalled",
    "Removable",
    "Ring",
    "RowReader",
    "RowTraining",
    "Rows",
    "SlotUsage",
    "TensorRows",
    "TrainedRows",
    "add_product_keys",
    "add_row_reader",
    "add_trained_rows",
    "choose_slots",
    "count_slot_usage",
    "create_fact_bank",
    "delete_facts",
    "forget",
    "hidden_of",
    "load_attention_memory",
    "load_product_keys",
    "load_row_reader",
    "memorize",
    "memory_of",
    "owner_of",
    "product_key_groups",
    "product_key_memories",
    "product_key_optimizers",
    "register_top_k",
    "remove_beside",
    "remove_product_keys",
    "rows_of",
    "save_attention_memory",
    "save_product_keys",
    "save_row_reader",
    "site_of",
    "top_k_attention",
    "top_k_feed_forward",
    "training_slots_only",
    "write_facts",
]

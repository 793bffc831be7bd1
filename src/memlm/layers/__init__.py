"""Memory inside a model: trainable torch modules, and what puts them into Hugging Face decoders and takes them out."""

from ._add_product_keys import add_product_keys as add_product_keys
from ._add_product_keys import remove_product_keys as remove_product_keys
from ._product_keys import ProductKeyMemory as ProductKeyMemory
from ._product_keys import ProductKeySettings as ProductKeySettings
from ._product_keys import product_key_memories as product_key_memories
from ._save_product_keys import load_product_keys as load_product_keys
from ._save_product_keys import save_product_keys as save_product_keys
from ._slot_usage import SlotUsage as SlotUsage
from ._slot_usage import choose_slots as choose_slots
from ._slot_usage import count_slot_usage as count_slot_usage
from ._train_product_keys import product_key_groups as product_key_groups
from ._train_product_keys import product_key_optimizers as product_key_optimizers
from ._train_product_keys import training_slots_only as training_slots_only

__all__ = [
    "ProductKeyMemory",
    "ProductKeySettings",
    "SlotUsage",
    "add_product_keys",
    "choose_slots",
    "count_slot_usage",
    "load_product_keys",
    "product_key_groups",
    "product_key_memories",
    "product_key_optimizers",
    "remove_product_keys",
    "save_product_keys",
    "training_slots_only",
]

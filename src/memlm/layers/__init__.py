"""Memory inside a model: trainable torch modules, and what puts them into Hugging Face decoders and takes them out."""

from ._memorize import AttentionMemories as AttentionMemories
from ._memorize import forget as forget
from ._memorize import memorize as memorize
from ._memorize import memory_of as memory_of
from ._memory_attention import AttentionMemory as AttentionMemory
from ._memory_settings import AttentionMemorySettings as AttentionMemorySettings
from ._removable import Removable as Removable
from ._ring import KeyValueMemory as KeyValueMemory
from ._ring import Recalled as Recalled
from ._ring import Ring as Ring
from ._save_memory import load_attention_memory as load_attention_memory
from ._save_memory import save_attention_memory as save_attention_memory
from ._top_k_attention import register_top_k as register_top_k
from ._top_k_attention import top_k_attention as top_k_attention
from ._top_k_feed_forward import top_k_feed_forward as top_k_feed_forward

__all__ = [
    "AttentionMemories",
    "AttentionMemory",
    "AttentionMemorySettings",
    "KeyValueMemory",
    "Recalled",
    "Removable",
    "Ring",
    "forget",
    "load_attention_memory",
    "memorize",
    "memory_of",
    "register_top_k",
    "save_attention_memory",
    "top_k_attention",
    "top_k_feed_forward",
]

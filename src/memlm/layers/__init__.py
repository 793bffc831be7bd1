"""Memory inside a model: trainable torch modules, and what puts them into Hugging Face decoders and takes them out."""

from ._removable import Removable as Removable
from ._top_k_attention import register_top_k as register_top_k
from ._top_k_attention import top_k_attention as top_k_attention
from ._top_k_feed_forward import top_k_feed_forward as top_k_feed_forward

__all__ = ["Removable", "register_top_k", "top_k_attention", "top_k_feed_forward"]

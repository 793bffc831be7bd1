"""Pure tensor functions, one equation each: no files, no modules, no logging."""

from ._adapter import adapted_log_weights as adapted_log_weights
from ._cache import cache_scores as cache_scores
from ._cache import shared_softmax_weight as shared_softmax_weight
from ._external import read_rows as read_rows
from ._greedy_merging import greedy_merging as greedy_merging
from ._interpolation import interpolate as interpolate
from ._interpolation import interpolate_sparse as interpolate_sparse
from ._knn import aggregate_by_token as aggregate_by_token
from ._knn import knn_log_probs as knn_log_probs
from ._knn import knn_log_weights as knn_log_weights
from ._knn import knn_target_log_probs as knn_target_log_probs
from ._memory_attention import age_drop_off as age_drop_off
from ._memory_attention import gate_weight as gate_weight
from ._memory_attention import joint_softmax_weight as joint_softmax_weight
from ._memory_attention import local_log_mass as local_log_mass
from ._memory_attention import memory_attention as memory_attention
from ._memory_attention import mix_attention as mix_attention
from ._memory_attention import null_slot_weight as null_slot_weight
from ._memory_attention import recalled_scores as recalled_scores
from ._nearest_keys import largest as largest
from ._nearest_keys import nearest_keys as nearest_keys
from ._product_keys import product_key_top_k as product_key_top_k
from ._product_keys import read_slots as read_slots
from ._row_adam import row_adam as row_adam
from ._shared_softmax import capped as capped
from ._shared_softmax import scaled_similarities as scaled_similarities
from ._shared_softmax import second_interpolation as second_interpolation
from ._shared_softmax import shared_softmax_weights as shared_softmax_weights
from ._slot_usage import slot_tf_idf as slot_tf_idf
from ._slot_usage import usage_divergence as usage_divergence
from ._slot_usage import usage_share as usage_share
from ._spalm import spalm_memory as spalm_memory
from ._spalm import spalm_state as spalm_state
from ._spalm import steering as steering
from ._top_k_attention import top_k_attention as top_k_attention
from ._top_k_feed_forward import top_k_feed_forward as top_k_feed_forward
from ._trime import similarities as similarities
from ._trime import trime_distribution as trime_distribution
from ._trime import trime_log_probs as trime_log_probs
from ._weight import LARGEST as LARGEST
from ._weight import bucket_weight as bucket_weight
from ._weight import exponential_weight as exponential_weight
from ._weight import logistic_weight as logistic_weight

__all__ = [
    "LARGEST",
    "adapted_log_weights",
    "age_drop_off",
    "aggregate_by_token",
    "bucket_weight",
    "cache_scores",
    "capped",
    "exponential_weight",
    "gate_weight",
    "greedy_merging",
    "interpolate",
    "interpolate_sparse",
    "joint_softmax_weight",
    "knn_log_probs",
    "knn_log_weights",
    "knn_target_log_probs",
    "largest",
    "local_log_mass",
    "logistic_weight",
    "memory_attention",
    "mix_attention",
    "nearest_keys",
    "null_slot_weight",
    "product_key_top_k",
    "read_rows",
    "read_slots",
    "recalled_scores",
    "row_adam",
    "scaled_similarities",
    "second_interpolation",
    "shared_softmax_weight",
    "shared_softmax_weights",
    "similarities",
    "slot_tf_idf",
    "spalm_memory",
    "spalm_state",
    "steering",
    "top_k_attention",
    "top_k_feed_forward",
    "trime_distribution",
    "trime_log_probs",
    "usage_divergence",
    "usage_share",
]

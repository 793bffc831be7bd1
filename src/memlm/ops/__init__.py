"""Pure tensor functions, one equation each: no files, no modules, no logging."""

from ._adapter import adapted_log_weights as adapted_log_weights
from ._cache import cache_scores as cache_scores
from ._cache import shared_softmax_weight as shared_softmax_weight
from ._interpolation import interpolate as interpolate
from ._interpolation import interpolate_sparse as interpolate_sparse
from ._knn import aggregate_by_token as aggregate_by_token
from ._knn import knn_log_probs as knn_log_probs
from ._knn import knn_log_weights as knn_log_weights
from ._knn import knn_target_log_probs as knn_target_log_probs
from ._product_keys import product_key_top_k as product_key_top_k
from ._product_keys import read_slots as read_slots
from ._shared_softmax import capped as capped
from ._shared_softmax import scaled_similarities as scaled_similarities
from ._shared_softmax import second_interpolation as second_interpolation
from ._shared_softmax import shared_softmax_weights as shared_softmax_weights
from ._slot_usage import slot_tf_idf as slot_tf_idf
from ._slot_usage import usage_divergence as usage_divergence
from ._slot_usage import usage_share as usage_share
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
    "aggregate_by_token",
    "bucket_weight",
    "cache_scores",
    "capped",
    "exponential_weight",
    "interpolate",
    "interpolate_sparse",
    "knn_log_probs",
    "knn_log_weights",
    "knn_target_log_probs",
    "logistic_weight",
    "product_key_top_k",
    "read_slots",
    "scaled_similarities",
    "second_interpolation",
    "shared_softmax_weight",
    "shared_softmax_weights",
    "similarities",
    "slot_tf_idf",
    "trime_distribution",
    "trime_log_probs",
    "usage_divergence",
    "usage_share",
]

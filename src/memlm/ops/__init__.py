"""Pure tensor functions, one equation each: no files, no modules, no logging."""

from ._interpolation import interpolate as interpolate
from ._interpolation import interpolate_sparse as interpolate_sparse
from ._knn import aggregate_by_token as aggregate_by_token
from ._knn import knn_log_probs as knn_log_probs
from ._knn import knn_log_weights as knn_log_weights
from ._knn import knn_target_log_probs as knn_target_log_probs
from ._weight import LARGEST as LARGEST
from ._weight import bucket_weight as bucket_weight
from ._weight import exponential_weight as exponential_weight
from ._weight import logistic_weight as logistic_weight

__all__ = [
    "LARGEST",
    "aggregate_by_token",
    "bucket_weight",
    "exponential_weight",
    "interpolate",
    "interpolate_sparse",
    "knn_log_probs",
    "knn_log_weights",
    "knn_target_log_probs",
    "logistic_weight",
]

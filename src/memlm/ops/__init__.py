"""Pure tensor functions, one equation each: no files, no modules, no logging."""

from ._interpolation import interpolate as interpolate
from ._interpolation import interpolate_sparse as interpolate_sparse
from ._knn import aggregate_by_token as aggregate_by_token
from ._knn import knn_log_probs as knn_log_probs
from ._knn import knn_log_weights as knn_log_weights
from ._knn import knn_target_log_probs as knn_target_log_probs

__all__ = [
    "aggregate_by_token",
    "interpolate",
    "interpolate_sparse",
    "knn_log_probs",
    "knn_log_weights",
    "knn_target_log_probs",
]

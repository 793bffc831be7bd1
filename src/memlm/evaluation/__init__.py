"""Evaluation: perplexity, tuning, explanation, overlap."""

from ._bootstrap import bootstrap_mean as bootstrap_mean
from ._bootstrap import units as units
from ._compare import compare as compare
from ._comparison import Comparison as Comparison
from ._evaluate import Evaluation as Evaluation
from ._evaluate import Result as Result
from ._evaluate import evaluate as evaluate
from ._evaluate import finite as finite
from ._explain import explain as explain
from ._explanation import ExplainedToken as ExplainedToken
from ._explanation import Explanation as Explanation
from ._explanation import Source as Source
from ._overlap import Overlap as Overlap
from ._overlap import overlap as overlap
from ._retrieval import Retrieved as Retrieved
from ._retrieval import Text as Text
from ._retrieval import gather as gather
from ._retrieval import retrieve as retrieve
from ._retrieval import thinned as thinned
from ._tune import Tuning as Tuning
from ._tune import check_kind as check_kind
from ._tune import tune as tune
from ._tune import tune_cached as tune_cached
from ._tune import tune_report as tune_report
from ._tune_trime import tune_trime as tune_trime

__all__ = [
    "Comparison",
    "Evaluation",
    "ExplainedToken",
    "Explanation",
    "Overlap",
    "Result",
    "Retrieved",
    "Source",
    "Text",
    "Tuning",
    "bootstrap_mean",
    "check_kind",
    "compare",
    "evaluate",
    "explain",
    "finite",
    "gather",
    "overlap",
    "retrieve",
    "thinned",
    "tune",
    "tune_cached",
    "tune_report",
    "tune_trime",
    "units",
]

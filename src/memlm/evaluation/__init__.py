"""Evaluation: perplexity, tuning, explanation, overlap."""

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
from ._tune import Tuning as Tuning
from ._tune import check_kind as check_kind
from ._tune import tune as tune
from ._tune import tune_report as tune_report
from ._tune_trime import tune_trime as tune_trime

__all__ = [
    "Comparison",
    "Evaluation",
    "ExplainedToken",
    "Explanation",
    "Overlap",
    "Result",
    "Source",
    "Tuning",
    "check_kind",
    "compare",
    "evaluate",
    "explain",
    "finite",
    "overlap",
    "tune",
    "tune_report",
    "tune_trime",
]

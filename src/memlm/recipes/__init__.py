"""Recipes: training experiments with negative controls, each one module, run by `memlm recipes`."""

from ._claims import Verdict as Verdict
from ._experiment import Claim as Claim
from ._experiment import Experiment as Experiment
from ._experiment import Measured as Measured
from ._experiment import Place as Place
from ._experiment import Row as Row
from ._experiment import Task as Task
from ._experiment import Unit as Unit
from ._outcome import Outcome as Outcome
from ._registry import experiments as experiments
from ._registry import find_experiment as find_experiment
from ._run import run_experiment as run_experiment

__all__ = [
    "Claim",
    "Experiment",
    "Measured",
    "Outcome",
    "Place",
    "Row",
    "Task",
    "Unit",
    "Verdict",
    "experiments",
    "find_experiment",
    "run_experiment",
]

"""Training: the reference language model."""

from ._language_model import train_language_model as train_language_model
from ._recipe import Recipe as Recipe
from ._recipe import load_recipe as load_recipe

__all__ = ["Recipe", "load_recipe", "train_language_model"]

"""Mixtures: how the memory's distribution and the model's become one."""

from ._fixed import KnnMixture as KnnMixture

__all__ = ["KnnMixture"]

"""A change to a model that can be undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import ModelError


class Removable:
    """A change to a model: `remove` undoes it, as does leaving the block where it is used in `with`.

    Args:
        undo: What makes the model what it was.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        """Make the model what it was.

        Raises:
            ModelError: That was done already.
        """
        if self._undo is None:
            raise ModelError("the change was removed already; make it again to have it again")
        undo, self._undo = self._undo, None
        undo()

    def __enter__(self) -> Removable:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._undo is not None:
            self.remove()

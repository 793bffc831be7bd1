"""Sharing datastores: dataset repositories of a Hugging Face hub."""

from ._pull import pull as pull
from ._push import Pushed as Pushed
from ._push import push as push

__all__ = ["Pushed", "pull", "push"]

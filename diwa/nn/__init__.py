"""Drop-in modules."""

from .gru import GRUCell

__all__ = ["GRUCell"]

"""Drop-in modules."""

from .frozen_rssm import FrozenRSSM
from .gru import GRUCell
from .rssm import RSSM

__all__ = ["RSSM", "FrozenRSSM", "GRUCell"]

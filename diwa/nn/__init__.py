"""Drop-in modules."""

from .diffusion import DenoisingMLP, DiffusionPolicy, NoiseSchedule
from .frozen import FrozenPolicy
from .frozen_rssm import FrozenRSSM
from .gru import GRUCell
from .rssm import RSSM

__all__ = [
    "RSSM",
    "DenoisingMLP",
    "DiffusionPolicy",
    "FrozenPolicy",
    "FrozenRSSM",
    "GRUCell",
    "NoiseSchedule",
]

"""Drop-in modules."""

from .diffusion import DenoisingMLP, DiffusionPolicy, NoiseSchedule
from .frozen import FrozenPolicy
from .gru import GRUCell

__all__ = ["DenoisingMLP", "DiffusionPolicy", "FrozenPolicy", "GRUCell", "NoiseSchedule"]

"""Drop-in modules: plain nn.Modules with ordinary state_dicts on the fused operators."""

from .diffusion import DenoisingMLP, DiffusionPolicy
from .frozen import FrozenPolicy
from .frozen_rssm import FrozenRSSM
from .gaussian import GaussianPolicy
from .gru import GRUCell
from .heads import RewardClassifier
from .rssm import RSSM, RSSMState
from .schedule import NoiseSchedule

__all__ = [
    "DenoisingMLP",
    "DiffusionPolicy",
    "FrozenPolicy",
    "FrozenRSSM",
    "GRUCell",
    "GaussianPolicy",
    "NoiseSchedule",
    "RSSM",
    "RSSMState",
    "RewardClassifier",
]

"""Drop-in modules: plain nn.Modules with ordinary state_dicts on the fused operators."""

from .diffusion import DenoisingMLP, DiffusionPolicy, NoiseSchedule
from .frozen import FrozenPolicy
from .frozen_rssm import FrozenRSSM
from .gaussian import GaussianPolicy
from .gru import GRUCell
from .heads import RewardClassifier
from .rssm import RSSM, RSSMState

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

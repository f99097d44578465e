"""The operators. Each has one public function here and its specification in `reference`."""

from .balanced_kl import balanced_kl
from .gae import gae
from .gru_cell import gru_cell
from .mish import mish
from .onehot_st import onehot_st
from .reference_rssm import RSSMWeights
from .registry import BackendError, support_table, use_backend
from .rssm_imagine import PackedRSSM, pack_rssm, rssm_imagine
from .rssm_observe import rssm_observe

__all__ = [
    "BackendError",
    "PackedRSSM",
    "RSSMWeights",
    "balanced_kl",
    "gae",
    "gru_cell",
    "mish",
    "onehot_st",
    "pack_rssm",
    "rssm_imagine",
    "rssm_observe",
    "support_table",
    "use_backend",
]

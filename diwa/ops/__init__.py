"""The operators. Each has one public function here and its specification in `reference`."""

from .balanced_kl import balanced_kl
from .chain_log_prob import chain_log_prob
from .denoise_chain import PackedNetwork, denoise_chain, step_table
from .gae import gae
from .gru_cell import gru_cell
from .mish import mish
from .onehot_st import onehot_st
from .packing import pack_weight
from .reference_chain import Chain, ChainSteps, Network
from .reference_rssm import RSSMWeights
from .registry import BackendError, support_table, use_backend
from .rssm_imagine import PackedRSSM, pack_rssm, rssm_imagine
from .rssm_observe import rssm_observe

__all__ = [
    "BackendError",
    "Chain",
    "ChainSteps",
    "Network",
    "PackedNetwork",
    "PackedRSSM",
    "RSSMWeights",
    "balanced_kl",
    "chain_log_prob",
    "denoise_chain",
    "gae",
    "gru_cell",
    "mish",
    "onehot_st",
    "pack_rssm",
    "pack_weight",
    "rssm_imagine",
    "rssm_observe",
    "step_table",
    "support_table",
    "use_backend",
]

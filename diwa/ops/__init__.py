"""The operators. Each has one public function here and its specification in `reference`."""

from .balanced_kl import balanced_kl
from .chain_log_prob import chain_log_prob
from .denoise_chain import PackedNetwork, denoise_chain
from .denoise_step import denoise_step
from .gae import gae
from .gru_cell import gru_cell
from .mish import mish
from .onehot_ln_elu import onehot_ln_elu
from .onehot_st import onehot_st
from .packing import pack_weight
from .reference_chain import Chain, ChainSteps, Network, step_table
from .reference_rssm import RSSMWeights
from .registry import BackendError, support_table, use_backend
from .rssm_imagine import PackedRSSM, pack_rssm, rssm_imagine
from .rssm_observe import rssm_observe
from .sample_categorical import sample_categorical

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
    "denoise_step",
    "gae",
    "gru_cell",
    "mish",
    "onehot_ln_elu",
    "onehot_st",
    "pack_rssm",
    "pack_weight",
    "rssm_imagine",
    "rssm_observe",
    "sample_categorical",
    "step_table",
    "support_table",
    "use_backend",
]

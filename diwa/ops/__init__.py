"""The operators. Each has one public function here and its specification in `reference`."""

from .balanced_kl import balanced_kl
from .denoise_step import denoise_step
from .gae import gae
from .gru_cell import gru_cell
from .mish import mish
from .onehot_ln_elu import onehot_ln_elu
from .onehot_st import onehot_st
from .reference_rssm import RSSMWeights
from .registry import BackendError, support_table, use_backend
from .rssm_imagine import PackedRSSM, pack_rssm, rssm_imagine
from .rssm_observe import rssm_observe
from .sample_categorical import sample_categorical

__all__ = [
    "BackendError",
    "PackedRSSM",
    "RSSMWeights",
    "balanced_kl",
    "denoise_step",
    "gae",
    "gru_cell",
    "mish",
    "onehot_ln_elu",
    "onehot_st",
    "pack_rssm",
    "rssm_imagine",
    "rssm_observe",
    "sample_categorical",
    "support_table",
    "use_backend",
]

"""The operators. Each has one public function here and its specification in `reference`."""

from .chain_log_prob import chain_log_prob
from .denoise_chain import PackedNetwork, denoise_chain, step_table
from .gru_cell import gru_cell
from .mish import mish
from .packing import pack_weight
from .reference_chain import Chain, ChainSteps, Network
from .registry import BackendError, support_table, use_backend

__all__ = [
    "BackendError",
    "Chain",
    "ChainSteps",
    "Network",
    "PackedNetwork",
    "chain_log_prob",
    "denoise_chain",
    "gru_cell",
    "mish",
    "pack_weight",
    "step_table",
    "support_table",
    "use_backend",
]

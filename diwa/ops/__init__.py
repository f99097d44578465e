"""The operators. Each has one public function here and its specification in `reference`."""

from .denoise_step import denoise_step
from .gru_cell import gru_cell
from .mish import mish
from .onehot_ln_elu import onehot_ln_elu
from .registry import BackendError, support_table, use_backend
from .sample_categorical import sample_categorical

__all__ = [
    "BackendError",
    "denoise_step",
    "gru_cell",
    "mish",
    "onehot_ln_elu",
    "sample_categorical",
    "support_table",
    "use_backend",
]

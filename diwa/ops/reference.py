"""The specification of every operator: plain torch, any device, any floating dtype.

All other variants are tested against the functions here, run in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_rssm import (
    RSSMWeights,
    balanced_kl,
    class_index,
    gae,
    mixed_probabilities,
    norm_elu,
    onehot_st,
    rssm_features,
    rssm_head,
    rssm_imagine,
    rssm_observe,
    rssm_recur,
)

__all__ = [
    "RSSMWeights",
    "balanced_kl",
    "class_index",
    "gae",
    "gru_cell",
    "gru_gates",
    "gru_gates_bwd",
    "mish",
    "mish_bwd",
    "mixed_probabilities",
    "norm_elu",
    "onehot_st",
    "rssm_features",
    "rssm_head",
    "rssm_imagine",
    "rssm_observe",
    "rssm_recur",
]


def gru_gates(gi: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    """The pointwise half of a GRU cell, gate order r, z, n as in torch.nn.GRUCell.

        r  = σ(gi_r + gh_r)
        z  = σ(gi_z + gh_z)
        n  = tanh(gi_n + r ⊙ gh_n)
        h' = (1 - z) ⊙ n + z ⊙ h

    Args:
        gi: `[B, 3H]` input projection `x W_ihᵀ + b_ih`.
        gh: `[B, 3H]` recurrent projection `h W_hhᵀ + b_hh`.
        h: `[B, H]` state before.
    Returns:
        `[B, H]` state after.
    """
    i_r, i_z, i_n = gi.chunk(3, -1)
    h_r, h_z, h_n = gh.chunk(3, -1)
    r = torch.sigmoid(i_r + h_r)
    z = torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + r * h_n)
    return n + z * (h - n)


def gru_gates_bwd(grad: Tensor, gi: Tensor, gh: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gru_gates`; `g` is the gradient `[B, H]` of its result.

        δn = g ⊙ (1 - z) ⊙ (1 - n²)           δr = δn ⊙ gh_n ⊙ r ⊙ (1 - r)
        δz = g ⊙ (h - n) ⊙ z ⊙ (1 - z)        δh = g ⊙ z

    Returns:
        `d_gi = (δr, δz, δn)` `[B, 3H]`, `d_gh = (δr, δz, δn ⊙ r)` `[B, 3H]`, `d_h = δh` `[B, H]`.
    """
    i_r, i_z, i_n = gi.chunk(3, -1)
    h_r, h_z, h_n = gh.chunk(3, -1)
    r = torch.sigmoid(i_r + h_r)
    z = torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + r * h_n)
    d_n = grad * (1 - z) * (1 - n * n)
    d_z = grad * (h - n) * z * (1 - z)
    d_r = d_n * h_n * r * (1 - r)
    return torch.cat([d_r, d_z, d_n], -1), torch.cat([d_r, d_z, d_n * r], -1), grad * z


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """torch.nn.GRUCell: `gru_gates(x W_ihᵀ + b_ih, h W_hhᵀ + b_hh, h)`, `[B, H]`.

    Shapes: x `[B, I]`, h `[B, H]`, w_ih `[3H, I]`, w_hh `[3H, H]`, biases `[3H]`.
    """
    return gru_gates(F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh), h)


def mish(x: Tensor) -> Tensor:
    """`x tanh(softplus x)`, elementwise; torch's own, one kernel on every device."""
    return F.mish(x)


def mish_bwd(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `mish`; `grad` is that of its result, t = tanh(softplus x).

    d_x = grad ⊙ (t + x σ(x) (1 - t²))
    """
    t = torch.tanh(F.softplus(x))
    return grad * (t + x * torch.sigmoid(x) * (1 - t * t))

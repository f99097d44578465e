"""`rssm_imagine` on a GPU: GEMMs by cuBLAS, everything between them in four Triton kernels a step.

    x      = ELU(LN(Σ_s table[s C + z_s] + a W_aᵀ + b))            onehot_ln_elu
    h'     = gates(x W_ihᵀ + b_ih, h W_hhᵀ + b_hh, h)              2 GEMMs, gru_gates
    logits = ELU(LN(h' W_hᵀ + b_h)) W_oᵀ + b_o                     2 GEMMs, onehot_ln_elu
    z'     = class_index(softmax(logits / temperature), u)         sample_categorical

The state h stays float32; with bfloat16 the operands and results of the GEMMs are rounded. Nothing
reads the device, so a whole horizon can be captured in one CUDA graph.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .onehot_ln_elu import onehot_ln_elu
from .reference_rssm import RSSMWeights
from .sample_categorical import sample_categorical

Packed = tuple[Tensor, ...]


def pack(w: RSSMWeights, dtype: torch.dtype) -> Packed:
    """table `[Z, U]`, w_a `[A, U]`; in `dtype` w_ih, b_ih, w_hh, b_hh, head_h, out, out_bias."""
    gemm = (w.w_ih, w.b_ih, w.w_hh, w.b_hh, w.head_h, w.out, w.out_bias)
    rows = (w.cell_z.t().contiguous(), w.cell_a.t().contiguous())
    return *rows, *(t.detach().to(dtype) for t in gemm)


@torch.no_grad()
def imagine(
    w: RSSMWeights,
    packed: Packed,
    h: Tensor,
    z_idx: Tensor,
    actions: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    unimix: float = 0.0,
    eps: float = 1e-3,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """L prior steps; shapes and results as `reference_rssm.rssm_imagine`.

    Args:
        w: weights, float32. packed: `pack(w, dtype)`.
        backend: of the operators between the GEMMs.
    """
    table, w_a, w_ih, b_ih, w_hh, b_hh, head_h, out, out_bias = packed
    cell = (w.cell_bias, w.cell_gain, w.cell_shift)
    head = (w.head_bias, w.head_gain, w.head_shift)
    dtype = w_ih.dtype
    ln_elu = partial(onehot_ln_elu, eps=eps, out_dtype=dtype, backend=backend)
    low, hs, indices = h.to(dtype), [], []
    for action, uniform in zip(actions, uniforms, strict=True):
        x = ln_elu(*cell, idx=z_idx, table=table, action=action, w_a=w_a)
        gi, gh = F.linear(x, w_ih, b_ih), F.linear(low, w_hh, b_hh)
        h = torch.ops.diwa.gru_gates_fwd_triton.default(gi, gh, h)
        low = h.to(dtype)
        y = ln_elu(*head, x=F.linear(low, head_h))
        logits = F.linear(y, out, out_bias).unflatten(-1, (uniform.shape[-1], -1))
        z_idx = sample_categorical(
            logits, uniform, temperature=temperature, unimix=unimix, backend=backend
        )
        hs.append(h)
        indices.append(z_idx)
    if not hs:
        return h.new_empty(0, *h.shape), z_idx.new_empty(0, *z_idx.shape)
    return torch.stack(hs), torch.stack(indices)

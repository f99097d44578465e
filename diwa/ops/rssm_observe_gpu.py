"""`rssm_observe` on a GPU: GEMMs by cuBLAS, what lies between them in Triton kernels.

    x_t = (m z) W_zᵀ + A_t       a_t = ELU(LN(x_t))               GEMM, onehot_ln_elu
    h_t = gates(a_t W_ihᵀ + b_ih, (m h) W_hhᵀ + b_hh, m h)        2 GEMMs, gru_gates
    y_t = h_t W_hᵀ + E_t         b_t = ELU(LN(y_t))               GEMM, onehot_ln_elu
    logits_t = b_t W_oᵀ + b_o    z_t = onehot_st(logits_t, u_t)   GEMM, sample_categorical

The projections A of the actions and E of the embeddings are made for all frames before. The
backward loop only follows the gradient through the state; the gradient of every weight is one GEMM
over all T * B rows after it, where autograd would add up T products as large as the weights. Both
loops have static shapes and read nothing on the host, so a CUDA graph can hold them.

With bfloat16 the operands of the GEMMs inside the loops are rounded, and what they return; the
state, the gates, the norms, the gradients of the weights and the projections stay float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .onehot_ln_elu import onehot_ln_elu

aten = torch.ops.aten


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x weightᵀ + bias`, float32; the product in the dtype of the weight."""
    if weight.dtype == bias.dtype:
        return F.linear(x, weight, bias)
    return F.linear(x.to(weight.dtype), weight) + bias


def _accumulate(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`total + x weight`, in place; the product in the dtype of the weight."""
    if weight.dtype == total.dtype:
        return total.addmm_(x, weight)
    return total.add_(x.to(weight.dtype) @ weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight`, float32; in the dtype of the weight."""
    return (x.to(weight.dtype) @ weight).float()


def _in_time(last_first: list[Tensor]) -> Tensor:
    return torch.stack(last_first[::-1])


class _Norm:
    """The backward pass of `b = ELU(LN(y))` for all frames y `[T, B, U]`: a frame at a time for the
    gradient of y, all at once for those of gain and shift."""

    def __init__(self, y: Tensor, b: Tensor, gain: Tensor, shift: Tensor, eps: float) -> None:
        self.y, self.b, self.affine, self.size = y, b, (gain, shift), [y.shape[-1]]
        _, self.mean, self.rstd = torch.native_layer_norm(y, self.size, gain, shift, eps)
        self.grads: list[Tensor] = []  # of LN(y), the last frame first

    def frame(self, t: int, d_b: Tensor) -> Tensor:
        """Gradient `[B, U]` of frame t of b -> of y; to be called from the last frame on."""
        self.grads.append(aten.elu_backward(d_b, 1.0, 1.0, 1.0, True, self.b[t]))
        moments = (self.mean[t], self.rstd[t])
        return aten.native_layer_norm_backward(
            self.grads[-1], self.y[t], self.size, *moments, *self.affine, [True, False, False]
        )[0]

    def affine_grads(self) -> tuple[Tensor, Tensor]:
        """Gradients of gain and shift."""
        grad, moments = _in_time(self.grads), (self.mean, self.rstd)
        return aten.native_layer_norm_backward(
            grad, self.y, self.size, *moments, *self.affine, [False, True, True]
        )[1:]


class Scan(torch.autograd.Function):
    """The scan of `rssm_observe` from the projections on, T >= 1: h `[T, B, H]`, z `[T, B, Z]`,
    logits `[T, B, Z]`."""

    @staticmethod
    def forward(
        ctx: Any,
        embed: Tensor,  # [T, B, U], projections with their biases
        action: Tensor,  # [T, B, U]
        keep: Tensor,  # [T, B]
        h0: Tensor,  # [B, H]
        z0: Tensor,  # [B, Z]
        uniform: Tensor,  # [T, B, S]
        cell_z: Tensor,  # the weights as in RSSMWeights
        cell_gain: Tensor,
        cell_shift: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        head_h: Tensor,
        head_gain: Tensor,
        head_shift: Tensor,
        out: Tensor,
        out_bias: Tensor,
        unimix: float,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = [w.to(dtype) for w in (cell_z, w_ih, w_hh, head_h, out)]
        table, wide_i, wide_h, head, last = weights
        none = torch.zeros_like(cell_gain)  # the kernel's bias is in the projections already
        h, z, x, y = h0, z0, action.clone(), embed.clone()
        frames = []
        for t in range(len(x)):
            m = keep[t][:, None]
            h, z = h * m, z * m
            _accumulate(x[t], z, table.t())
            a = onehot_ln_elu(none, cell_gain, cell_shift, x=x[t], eps=eps, backend="triton")
            gi, gh = _linear(a, wide_i, b_ih), _linear(h, wide_h, b_hh)
            h = torch.ops.diwa.gru_gates_fwd_triton.default(gi, gh, h)
            _accumulate(y[t], h, head.t())
            b = onehot_ln_elu(none, head_gain, head_shift, x=y[t], eps=eps, backend="triton")
            logits = _linear(b, last, out_bias)
            grouped = logits.unflatten(-1, (uniform.shape[2], -1))
            z = torch.ops.diwa.onehot_st_fwd_triton.default(grouped, uniform[t], unimix).flatten(1)
            frames.append((h, z, logits, a, gi, gh, b))
        h, z, logits, a, gi, gh, b = (torch.stack(f) for f in zip(*frames, strict=True))
        norms = (cell_gain, cell_shift, head_gain, head_shift)
        ctx.save_for_backward(keep, h0, z0, h, z, logits, x, a, gi, gh, y, b, *norms, *weights)
        ctx.options = (uniform.shape[2], unimix, eps)
        return h, z, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_h: Tensor, g_z: Tensor, g_logits: Tensor) -> tuple[Tensor | None, ...]:
        keep, h0, z0, h, z, logits, x, a, gi, gh, y, b, *rest = ctx.saved_tensors
        (cell_gain, cell_shift, head_gain, head_shift), weights = rest[:4], rest[4:]
        table, wide_i, wide_h, head, last = weights
        groups, unimix, eps = ctx.options
        cell_norm, head_norm = (
            _Norm(x, a, cell_gain, cell_shift, eps),
            _Norm(y, b, head_gain, head_shift, eps),
        )
        h_before, z_before = (
            torch.cat([first[None], later[:-1]]) * keep[..., None]
            for first, later in ((h0, h), (z0, z))
        )
        d_h, d_z = torch.zeros_like(h0), torch.zeros_like(z0)
        frames = []
        for t in reversed(range(len(x))):
            m, grouped = keep[t][:, None], logits[t].unflatten(-1, (groups, -1))
            d_z = (g_z[t] + d_z).view_as(grouped)
            through = torch.ops.diwa.onehot_st_bwd_triton.default(d_z, grouped, unimix)
            d_o = g_logits[t] + through.flatten(1)
            d_v = head_norm.frame(t, _product(d_o, last))
            d_h = _accumulate(g_h[t] + d_h, d_v, head)
            d_i, d_j, d_h = torch.ops.diwa.gru_gates_bwd_triton.default(
                d_h, gi[t], gh[t], h_before[t]
            )
            d_h = _accumulate(d_h, d_j, wide_h) * m
            d_u = cell_norm.frame(t, _product(d_i, wide_i))
            d_z = _product(d_u, table) * m
            frames.append((d_u, d_i, d_j, d_v, d_o))
        d_x, d_gi, d_gh, d_y, d_logits = (_in_time(list(f)) for f in zip(*frames, strict=True))

        def gradient(d: Tensor, value: Tensor) -> Tensor:
            return d.flatten(0, 1).t() @ value.flatten(0, 1)

        return (
            *(d_y, d_x, None, d_h, d_z, None),
            *(gradient(d_x, z_before), *cell_norm.affine_grads()),
            *(gradient(d_gi, a), gradient(d_gh, h_before), d_gi.sum((0, 1)), d_gh.sum((0, 1))),
            *(gradient(d_y, h), *head_norm.affine_grads()),
            *(gradient(d_logits, b), d_logits.sum((0, 1))),
            *[None] * 3,
        )

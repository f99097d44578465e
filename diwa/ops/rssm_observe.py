"""`rssm_observe`: the posterior scan of an RSSM over T frames, forward and backward.

Whatever does not depend on the state before is one GEMM over all frames: the projections of
embeddings and actions and, in the backward pass, the gradient of every weight. The rest is one
native call each way (csrc/cpu/rssm_observe.cpp) on weights packed once per sequence; a one-hot z
times its weight is a sum of S rows. On a GPU: rssm_observe_gpu.py. Equations: reference_rssm.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference_rssm, registry, rssm_observe_gpu
from .onehot_ln_elu import MAX_WIDTH
from .packing import pack_weight
from .reference_rssm import RSSMWeights
from .rssm_triton import MAX_CLASSES
from .weights import check_rssm

registry.declare(
    "rssm_observe",
    registry.native("cpu", "rssm_observe_fwd"),  # csrc/cpu/rssm_observe.cpp
    registry.triton("gru_gates", (torch.float32,)),  # diwa/ops/rssm_observe_gpu.py
    registry.reference(),  # diwa/ops/reference_rssm.py
)


def _fake_fwd(
    embed: Tensor,
    action: Tensor,
    first: Tensor,
    keep: Tensor,
    h0: Tensor,
    uniform: Tensor,
    table: Tensor,
    packed: list[Tensor],
    vectors: list[Tensor],
    unimix: float,
    eps: float,
    save: bool,
) -> list[Tensor]:
    (frames, batch, width), deter, stoch = embed.shape, h0.shape[1], table.shape[0]
    out = [embed.new_empty(frames, batch, n) for n in (deter, stoch, stoch)]
    kept = frames if save else min(frames, 1)
    return out + [embed.new_empty(kept, batch, n) for n in (width, width, 4 * deter, width, width)]


def _fake_bwd(
    g_h: Tensor,
    g_z: Tensor,
    g_logits: Tensor,
    keep: Tensor,
    h0: Tensor,
    saved: list[Tensor],
    packed: list[Tensor],
    vectors: list[Tensor],
    groups: int,
    unimix: float,
    eps: float,
) -> list[Tensor]:
    (frames, batch, deter), stoch, width = g_h.shape, g_z.shape[2], vectors[0].shape[0]
    out = [g_h.new_empty(frames, batch, n) for n in (width, width, 4 * deter, stoch)]
    return out + [g_h.new_empty(batch, n) for n in (deter, stoch, 4 * width)]


if hasattr(torch.ops.diwa, "rssm_observe_fwd"):  # the schema is in libdiwa_cpu.so
    torch.library.register_fake("diwa::rssm_observe_fwd", _fake_fwd)
    torch.library.register_fake("diwa::rssm_observe_bwd", _fake_bwd)


def _earlier(first: Tensor, later: Tensor, keep: Tensor) -> Tensor:
    """`[T * B, n]`: what each frame was given of the frame before, masked."""
    return (torch.cat([first[None], later[:-1]]) * keep[..., None]).flatten(0, 1)


class _Observe(torch.autograd.Function):
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
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, z, logits, *saved = torch.ops.diwa.rssm_observe_fwd.default(
            embed,
            action,
            F.linear(z0 * keep[0][:, None], cell_z),
            keep,
            h0,
            uniform,
            cell_z.t().contiguous(),
            [pack_weight(w, dtype) for w in (w_ih, w_hh, head_h, out)],
            [cell_gain, cell_shift, b_ih, b_hh, head_gain, head_shift, out_bias],
            unimix,
            eps,
            save,
        )
        norms = (cell_gain, cell_shift, head_gain, head_shift)
        weights = (cell_z, w_ih, w_hh, head_h, out)
        if save:
            ctx.save_for_backward(keep, h0, z0, h, z, logits, *saved, *norms, *weights)
        ctx.options = (uniform.shape[-1], unimix, eps)
        ctx.packed_dtype = dtype
        return h, z, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep, h0, z0, h, z, logits, x, a, gates, y, b, *rest = ctx.saved_tensors
        norms, (cell_z, w_ih, w_hh, head_h, out) = rest[:4], rest[4:]
        size = h0.shape[1]
        turned = torch.cat([w_ih[2 * size :], w_ih[: 2 * size]])  # gates n, r, z
        d_x, d_y, d_gates, d_logits, d_h0, d_z0, d_norms = torch.ops.diwa.rssm_observe_bwd.default(
            *grads,
            keep,
            h0,
            [h, logits, x, a, gates, y, b],
            [pack_weight(w.t(), ctx.packed_dtype) for w in (out, head_h, turned, w_hh, cell_z)],
            norms,
            *ctx.options,
        )
        gains = d_norms.sum(0).view(4, -1)
        d_g, d_o = d_gates.flatten(0, 1), d_logits.flatten(0, 1)
        n, rz, nr = d_g[:, :size], d_g[:, size : 3 * size], d_g[:, 3 * size :]
        inputs, before = a.flatten(0, 1), _earlier(h0, h, keep)
        d_n, d_rz = n.sum(0), rz.sum(0)
        return (
            d_y,
            d_x,
            None,
            d_h0,
            d_z0,
            None,
            d_x.flatten(0, 1).t() @ _earlier(z0, z, keep),
            gains[0],
            gains[1],
            torch.cat([rz.t() @ inputs, n.t() @ inputs]),
            d_g[:, size:].t() @ before,
            torch.cat([d_rz, d_n]),
            torch.cat([d_rz, nr.sum(0)]),
            d_y.flatten(0, 1).t() @ h.flatten(0, 1),
            gains[2],
            gains[3],
            d_o.t() @ b.flatten(0, 1),
            d_o.sum(0),
            *[None] * 4,
        )


def _check(
    w: RSSMWeights,
    embed: Tensor,
    action: Tensor,
    reset: Tensor,
    h: Tensor,
    z: Tensor,
    uniform: Tensor,
) -> None:
    check_rssm("rssm_observe", w)
    if w.head_e is None:
        raise ValueError("rssm_observe: the weights have no head_e; they are not a posterior's")
    if embed.dim() != 3:
        raise ValueError(f"rssm_observe: embed must be [T, B, E], got {list(embed.shape)}")
    if uniform.dim() != 3 or not uniform.shape[2] or len(w.out) % uniform.shape[2]:
        raise ValueError(
            f"rssm_observe: uniform must be [T, B, S] with S a divisor of {len(w.out)}, "
            f"got {list(uniform.shape)}"
        )
    (frames, batch, _), stoch, deter = embed.shape, w.cell_z.shape[1], w.w_hh.shape[1]
    expected = {
        "embed": (embed, (frames, batch, w.head_e.shape[1])),
        "action": (action, (frames, batch, w.cell_a.shape[1])),
        "reset": (reset, (frames, batch)),
        "h": (h, (batch, deter)),
        "z": (z, (batch, stoch)),
        "uniform": (uniform, (frames, batch, uniform.shape[2])),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"rssm_observe: {name} must be {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.device != w.cell_z.device:
            raise ValueError(
                f"rssm_observe: {name} is on {tensor.device}, the weights on {w.cell_z.device}"
            )
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"rssm_observe: {name} must be floating point, got {tensor.dtype}")


def _unfit(
    w: RSSMWeights, given: tuple[Tensor, ...], reset: Tensor, uniform: Tensor
) -> dict[str, str]:
    """Backends that cannot take these arguments -> why."""
    why = ""
    if any(t is not None and t.dtype != torch.float32 for t in (*given, *w)):
        why = "takes float32 arguments only"
    elif torch.is_autocast_enabled(uniform.device.type):
        why = "does not run under autocast"
    elif reset.requires_grad or uniform.requires_grad:
        why = "has no gradient of reset or uniform"
    kernels, groups = why, uniform.shape[2]
    if len(w.cell_gain) > MAX_WIDTH:
        kernels = kernels or f"a layer of {len(w.cell_gain)} exceeds {MAX_WIDTH}"
    if len(w.out) // groups > MAX_CLASSES:
        kernels = kernels or f"{len(w.out) // groups} classes exceed {MAX_CLASSES}"
    return {"cpu": why, "triton": kernels}


def rssm_observe(
    w: RSSMWeights,
    embed: Tensor,
    action: Tensor,
    reset: Tensor,
    h: Tensor,
    z: Tensor,
    uniform: Tensor,
    *,
    unimix: float = 0.0,
    eps: float = 1e-3,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior scan of an RSSM with straight-through one-hot states (`reference.rssm_observe`).

    Args:
        w: weights; the head is the posterior's.
        embed: `[T, B, E]`. action: `[T, B, A]`, the action that led to each frame.
        reset: `[T, B]` in {0, 1}; 1 drops the carried state before that frame.
        h: `[B, H]` and z: `[B, Z]`, the carried state of B streams.
        uniform: `[T, B, S]` in [0, 1), the randomness of the samples.
        unimix: share of the uniform distribution in every sampled categorical.
        eps: of the layer norms.
        dtype: bfloat16 rounds weights and activations of the GEMMs inside the scan, which sum in
            float32; the projections and the gradients of the weights stay float32. The reference,
            which takes the dtype of its arguments, ignores it.
        backend: `"auto"`, `"reference"`, or `"cpu"` or `"triton"` (float32 arguments, outside
            autocast).
    Returns:
        h `[T, B, H]`, z `[T, B, Z]` and logits `[T, B, S, C]`.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, device or dtype; it is named.
        BackendError: the backend was forced and cannot run.

    Differentiable once in the weights, embed, action, h and z (any number of times with
    `backend="reference"`).
    """
    _check(w, embed, action, reset, h, z, uniform)
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"rssm_observe: dtype must be float32 or bfloat16, got {dtype}")
    given = (embed, action, reset, h, z, uniform)
    chosen = registry.choose("rssm_observe", h, backend, _unfit(w, given, reset, uniform))
    if chosen == "reference" or not embed.shape[0] * embed.shape[1]:
        return reference_rssm.rssm_observe(w, *given, unimix=unimix, eps=eps)
    inputs = (
        F.linear(embed, w.head_e, w.head_bias),  # type: ignore[arg-type]
        F.linear(action, w.cell_a, w.cell_bias),
        1 - reset,
        h,
        z,
        uniform,
        *(w.cell_z, w.cell_gain, w.cell_shift, w.w_ih, w.w_hh, w.b_ih, w.b_hh),
        *(w.head_h, w.head_gain, w.head_shift, w.out, w.out_bias),
    )
    save = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if chosen == "triton":
        hs, zs, logits = rssm_observe_gpu.Scan.apply(*inputs, unimix, eps, dtype)
    else:
        hs, zs, logits = _Observe.apply(*inputs, unimix, eps, dtype, save)
    return hs, zs, logits.view(*logits.shape[:2], uniform.shape[-1], -1)

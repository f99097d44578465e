"""The pointwise half of a GRU cell. See diwa/ops/reference.py:gru_gates for the equations."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import next_power_of_2, tanh

_MAX_BLOCK = 1024


@triton.jit
def _load_gates(gi, gh, row, c, mask, H):
    """r, z, n and gh_n of one block of columns, float32."""
    i, j = gi + row * 3 * H + c, gh + row * 3 * H + c
    i_r = tl.load(i, mask=mask, other=0.0).to(tl.float32)
    i_z = tl.load(i + H, mask=mask, other=0.0).to(tl.float32)
    i_n = tl.load(i + 2 * H, mask=mask, other=0.0).to(tl.float32)
    h_r = tl.load(j, mask=mask, other=0.0).to(tl.float32)
    h_z = tl.load(j + H, mask=mask, other=0.0).to(tl.float32)
    h_n = tl.load(j + 2 * H, mask=mask, other=0.0).to(tl.float32)
    r = tl.sigmoid(i_r + h_r)
    z = tl.sigmoid(i_z + h_z)
    return r, z, tanh(i_n + r * h_n), h_n


@triton.jit
def gru_gates_fwd_kernel(
    gi,  # [B, 3H]
    gh,  # [B, 3H]
    h,  # [B, H]
    out,  # [B, H]
    H,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < H
    r, z, n, h_n = _load_gates(gi, gh, row, c, mask, H)
    h0 = tl.load(h + row * H + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * H + c, (n + z * (h0 - n)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gru_gates_bwd_kernel(
    grad,  # [B, H]
    gi,  # [B, 3H]
    gh,  # [B, 3H]
    h,  # [B, H]
    d_gi,  # [B, 3H]
    d_gh,  # [B, 3H]
    d_h,  # [B, H]
    H,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < H
    dtype = d_h.dtype.element_ty
    r, z, n, h_n = _load_gates(gi, gh, row, c, mask, H)
    h0 = tl.load(h + row * H + c, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row * H + c, mask=mask, other=0.0).to(tl.float32)
    d_n = g * (1 - z) * (1 - n * n)
    d_z = (g * (h0 - n) * z * (1 - z)).to(dtype)
    d_r = (d_n * h_n * r * (1 - r)).to(dtype)
    i, j = d_gi + row * 3 * H + c, d_gh + row * 3 * H + c
    tl.store(i, d_r, mask=mask)
    tl.store(i + H, d_z, mask=mask)
    tl.store(i + 2 * H, d_n.to(dtype), mask=mask)
    tl.store(j, d_r, mask=mask)
    tl.store(j + H, d_z, mask=mask)
    tl.store(j + 2 * H, (d_n * r).to(dtype), mask=mask)
    tl.store(d_h + row * H + c, (g * z).to(dtype), mask=mask)


def _launch(B: int, H: int) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(next_power_of_2(H), _MAX_BLOCK)
    return (B, triton.cdiv(H, block)), {"BLOCK": block, "num_warps": max(1, min(8, block // 128))}


def gru_gates_fwd(gi: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    """gi, gh `[B, 3H]`, h `[B, H]`, one dtype -> `[B, H]`."""
    gi, gh, h = gi.contiguous(), gh.contiguous(), h.contiguous()
    out = torch.empty_like(h)
    if h.numel():
        grid, meta = _launch(*h.shape)
        gru_gates_fwd_kernel[grid](gi, gh, h, out, h.shape[1], **meta)
    return out


def gru_gates_bwd(grad: Tensor, gi: Tensor, gh: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad `[B, H]` -> d_gi `[B, 3H]`, d_gh `[B, 3H]`, d_h `[B, H]`."""
    grad, gi, gh, h = grad.contiguous(), gi.contiguous(), gh.contiguous(), h.contiguous()
    d_gi, d_gh, d_h = torch.empty_like(gi), torch.empty_like(gh), torch.empty_like(h)
    if h.numel():
        grid, meta = _launch(*h.shape)
        gru_gates_bwd_kernel[grid](grad, gi, gh, h, d_gi, d_gh, d_h, h.shape[1], **meta)
    return d_gi, d_gh, d_h


def aot_examples() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, int]]]:
    """(name, kernel, arguments, options) of the launches that tools/aot_check.py compiles."""
    for dtype in (torch.float32, torch.bfloat16):
        for H in (1000, 1024):
            gates, h = torch.empty(2, 3 * H, dtype=dtype), torch.empty(2, H, dtype=dtype)
            options = _launch(2, H)[1]
            name = f"{str(dtype).removeprefix('torch.')}-H{H}"
            yield f"fwd-{name}", gru_gates_fwd_kernel, (gates, gates, h, h, H), options
            args = (h, gates, gates, h, gates, gates, h, H)
            yield f"bwd-{name}", gru_gates_bwd_kernel, args, options

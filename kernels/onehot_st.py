"""Straight-through one-hot samples, forward and backward; reference_rssm.py:onehot_st."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import short_name, softmax
from .sample_categorical import launch_shape, sample_categorical


@triton.jit
def onehot_st_bwd_kernel(
    grad,  # [R, C]
    logits,  # [R, C]
    d_logits,  # [R, C]
    rows,
    C,
    keep,  # 1 - unimix
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    mask = (r < rows)[:, None] & (c < C)[None, :]
    at = r[:, None] * C + c[None, :]
    x = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    p = softmax(x, tl.broadcast_to((c < C)[None, :], (BLOCK_R, BLOCK_C)))
    d = keep * p * (g - tl.sum(g * p, 1)[:, None])
    tl.store(d_logits + at, d.to(d_logits.dtype.element_ty), mask=mask)


def onehot_st_fwd(logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
    """logits `[..., S, C]`, uniform `[..., S]` -> one-hot `[..., S, C]`, float32."""
    return sample_categorical(logits, uniform, 1.0, unimix, False, torch.float32)[1]


def onehot_st_bwd(grad: Tensor, logits: Tensor, unimix: float) -> Tensor:
    """Gradient of the one-hot `[..., S, C]` -> that of the logits: through the probabilities."""
    grad, logits = grad.contiguous(), logits.contiguous()
    d_logits = torch.empty_like(logits)
    if logits.numel():
        C, meta = logits.shape[-1], launch_shape(logits.shape[-1])
        rows = logits.numel() // C
        grid = (triton.cdiv(rows, meta["BLOCK_R"]),)
        onehot_st_bwd_kernel[grid](grad, logits, d_logits, rows, C, 1.0 - unimix, **meta)
    return d_logits


def aot_examples() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """(name, kernel, arguments, options) of the launches that tools/aot_check.py compiles."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(64, 32, dtype=dtype)
        args = (x, x, x, 1600, 32, 0.99)
        yield f"bwd-{short_name(dtype)}-C32", onehot_st_bwd_kernel, args, launch_shape(32)

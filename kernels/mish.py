"""Mish with one exponential per element. See diwa/ops/mish.py for the equations."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import short_name

_META = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _parts(x):
    """e = exp x and n = e² + 2 e; beyond 20, where mish x is x, e stays finite."""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    return e, e * e + 2.0 * e


@triton.jit
def mish_fwd_kernel(x, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    v = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    _, n = _parts(v)
    tl.store(out + i, (v * (n / (n + 2.0))).to(out.dtype.element_ty), mask=mask)


@triton.jit
def mish_bwd_kernel(grad, x, d_x, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    v = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + i, mask=mask, other=0.0).to(tl.float32)
    e, n = _parts(v)
    m = 1.0 / (n + 2.0)
    slope = n * m + v * ((4.0 * e * m) * ((e + 1.0) * m))
    slope = tl.where(v >= 20.0, 1.0, slope)
    tl.store(d_x + i, (g * slope).to(d_x.dtype.element_ty), mask=mask)


def mish_fwd(x: Tensor) -> Tensor:
    """x, any shape -> mish x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        mish_fwd_kernel[(triton.cdiv(x.numel(), _META["BLOCK"]),)](x, out, x.numel(), **_META)
    return out


def mish_bwd(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the result and x -> gradient of x."""
    grad, x = grad.contiguous(), x.contiguous()
    d_x = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _META["BLOCK"]),)
        mish_bwd_kernel[grid](grad, x, d_x, x.numel(), **_META)
    return d_x


def aot_examples() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, int]]]:
    """(name, kernel, arguments, options) of the launches that tools/aot_check.py compiles."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(1024, dtype=dtype)
        yield f"fwd-{short_name(dtype)}", mish_fwd_kernel, (x, x, 1 << 20), _META
        yield f"bwd-{short_name(dtype)}", mish_bwd_kernel, (x, x, x, 1 << 20), _META

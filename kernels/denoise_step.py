"""What follows the network in a denoising step. See diwa/ops/reference_gpu.py:denoise_step."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import clamp

_META = {"BLOCK": 512, "num_warps": 4}


@triton.jit
def denoise_step_kernel(
    x,  # [N, P]
    eps,  # [N, P]
    noise,  # [N, P]
    table,  # [7]: p, q, c1, c2, std, std / s, log s + log(2 pi) / 2
    out,  # [N, P]
    log_prob,  # [N, P]
    size,
    clip_noise,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    p, q, c1, c2 = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    std, ratio, constant = tl.load(table + 4), tl.load(table + 5), tl.load(table + 6)
    v = tl.load(x + i, mask=mask, other=0.0)
    e = tl.load(eps + i, mask=mask, other=0.0).to(tl.float32)
    n = clamp(tl.load(noise + i, mask=mask, other=0.0), -clip_noise, clip_noise)
    x0 = clamp(p * v - q * e, -1.0, 1.0)
    tl.store(out + i, c1 * x0 + c2 * v + std * n, mask=mask)
    s = ratio * n
    tl.store(log_prob + i, -0.5 * s * s - constant, mask=mask)


def denoise_step(
    x: Tensor, eps: Tensor, noise: Tensor, table: Tensor, clip_noise: float
) -> tuple[Tensor, Tensor]:
    """x, noise float32 `[N, P]`, eps `[N, P]`, table `[7]` -> next x, log-density `[N, P]`."""
    x, eps, noise, table = x.contiguous(), eps.contiguous(), noise.contiguous(), table.contiguous()
    out, log_prob = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _META["BLOCK"]),)
        args = (x, eps, noise, table, out, log_prob, x.numel(), clip_noise)
        denoise_step_kernel[grid](*args, **_META)
    return out, log_prob


def aot_examples() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, int]]]:
    """(name, kernel, arguments, options) of the launches that tools/aot_check.py compiles."""
    x, table = torch.empty(50, 28), torch.empty(7)
    for name, eps in (("float32", x), ("bfloat16", x.bfloat16())):
        yield name, denoise_step_kernel, (x, eps, x, table, x, x, 1400, 3.0), _META

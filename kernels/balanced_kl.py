"""KL of two stacks of categoricals, forward and backward; reference_rssm.py:balanced_kl."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import next_power_of_2, short_name

MAX_TILE = 16384  # values of one state, S and C rounded up to powers of two


@triton.jit
def _log_softmax(pointer, at, mask, inside):
    x = tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(inside, x, float("-inf"))
    x = x - tl.max(x, 1)[:, None]
    x = x - tl.log(tl.sum(tl.exp(x), 1))[:, None]
    return tl.where(inside, x, 0.0)


@triton.jit
def balanced_kl_fwd_kernel(
    post,  # [R, S, C]
    prior,  # [R, S, C]
    out,  # [R]
    S,
    C,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    mask = (s < S)[:, None] & (c < C)[None, :]
    inside = tl.broadcast_to((c < C)[None, :], (BLOCK_S, BLOCK_C))
    at = row * S * C + s[:, None] * C + c[None, :]
    q, p = _log_softmax(post, at, mask, inside), _log_softmax(prior, at, mask, inside)
    terms = tl.where(mask, tl.exp(q) * (q - p), 0.0)
    tl.store(out + row, tl.sum(tl.sum(terms, 1), 0))


@triton.jit
def balanced_kl_bwd_kernel(
    grad,  # [R]
    post,  # [R, S, C]
    prior,  # [R, S, C]
    d_post,  # [R, S, C]
    d_prior,  # [R, S, C]
    S,
    C,
    balance,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    mask = (s < S)[:, None] & (c < C)[None, :]
    inside = tl.broadcast_to((c < C)[None, :], (BLOCK_S, BLOCK_C))
    at = row * S * C + s[:, None] * C + c[None, :]
    q, p = _log_softmax(post, at, mask, inside), _log_softmax(prior, at, mask, inside)
    g = tl.load(grad + row).to(tl.float32)
    eq, ep = tl.exp(q), tl.exp(p)
    kl = tl.sum(tl.where(mask, eq * (q - p), 0.0), 1)[:, None]
    to_post = (1.0 - balance) * g * eq * ((q - p) - kl)
    tl.store(d_post + at, to_post.to(d_post.dtype.element_ty), mask=mask)
    tl.store(d_prior + at, (balance * g * (ep - eq)).to(d_prior.dtype.element_ty), mask=mask)


def _launch(S: int, C: int) -> dict[str, int]:
    s, c = next_power_of_2(S), next_power_of_2(C)
    return {"BLOCK_S": s, "BLOCK_C": c, "num_warps": max(1, min(8, s * c // 256))}


def balanced_kl_fwd(post: Tensor, prior: Tensor) -> Tensor:
    """Logits `[..., S, C]` -> KL(post | prior) summed over S and C, float32 `[...]`."""
    post, prior = post.contiguous(), prior.contiguous()
    S, C = post.shape[-2:]
    out = post.new_empty(post.shape[:-2], dtype=torch.float32)
    if out.numel():
        balanced_kl_fwd_kernel[(out.numel(),)](post, prior, out, S, C, **_launch(S, C))
    return out


def balanced_kl_bwd(
    grad: Tensor, post: Tensor, prior: Tensor, balance: float
) -> tuple[Tensor, Tensor]:
    """Gradient `[...]` of the balanced loss -> those of post and prior `[..., S, C]`."""
    grad, post, prior = grad.contiguous(), post.contiguous(), prior.contiguous()
    S, C = post.shape[-2:]
    d_post, d_prior = torch.empty_like(post), torch.empty_like(prior)
    if grad.numel():
        balanced_kl_bwd_kernel[(grad.numel(),)](
            grad, post, prior, d_post, d_prior, S, C, balance, **_launch(S, C)
        )
    return d_post, d_prior


def aot_examples() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, int]]]:
    """(name, kernel, arguments, options) of the launches that tools/aot_check.py compiles."""
    out = torch.empty(2)
    for dtype in (torch.float32, torch.bfloat16):
        x, meta = torch.empty(2, 32, 32, dtype=dtype), _launch(32, 32)
        name = f"{short_name(dtype)}-S32-C32"
        yield f"fwd-{name}", balanced_kl_fwd_kernel, (x, x, out, 32, 32), meta
        yield f"bwd-{name}", balanced_kl_bwd_kernel, (out, x, x, x, x, 32, 32, 0.8), meta

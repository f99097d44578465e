"""Generalised advantage estimation as a reverse scan; reference_rssm.py:gae."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_META = {"BLOCK_T": 64, "BLOCK_N": 16, "num_warps": 4}


@triton.jit
def _combine(decay_later, value_later, decay, value):
    """Two neighbouring runs of the recurrence A_t = value_t + decay_t A_{t+1}."""
    return decay_later * decay, value + decay * value_later


@triton.jit
def gae_kernel(
    reward,  # [T, N]
    value,  # [T, N]
    next_value,  # [T, N]
    terminated,  # [T, N]
    done,  # [T, N]
    advantage,  # [T, N]
    returns,  # [T, N]
    T,
    N,
    gamma,
    trace,  # gamma lambda
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_T)
    carry = tl.zeros((BLOCK_N,), tl.float32)
    blocks = (T + BLOCK_T - 1) // BLOCK_T
    for b in range(0, blocks):
        t = (blocks - 1 - b) * BLOCK_T + i
        mask = (t < T)[:, None] & (n < N)[None, :]
        at = t[:, None].to(tl.int64) * N + n[None, :]
        v = tl.load(value + at, mask=mask, other=0.0)
        end = tl.load(terminated + at, mask=mask, other=0.0)
        cut = tl.load(done + at, mask=mask, other=0.0)
        delta = tl.load(reward + at, mask=mask, other=0.0) - v
        delta += gamma * tl.load(next_value + at, mask=mask, other=0.0) * (1.0 - end)
        decay = tl.where(mask, trace * (1.0 - cut), 1.0)  # rows beyond T pass the carry on
        run, local = tl.associative_scan((decay, delta), 0, _combine, reverse=True)
        a = local + run * carry[None, :]
        tl.store(advantage + at, a, mask=mask)
        tl.store(returns + at, a + v, mask=mask)
        carry = tl.sum(tl.where(i[:, None] == 0, a, 0.0), 0)


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Five float32 `[T, N]` -> advantages and returns `[T, N]`."""
    args = [t.contiguous() for t in (reward, value, next_value, terminated, done)]
    advantage, returns = torch.empty_like(args[0]), torch.empty_like(args[0])
    if reward.numel():
        T, N = reward.shape
        grid = (triton.cdiv(N, _META["BLOCK_N"]),)
        gae_kernel[grid](*args, advantage, returns, T, N, gamma, gamma * gae_lambda, **_META)
    return advantage, returns


def aot_examples() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, int]]]:
    """(name, kernel, arguments, options) of the launches that tools/aot_check.py compiles."""
    x = torch.empty(36, 50)
    yield "T36-N50", gae_kernel, (x,) * 7 + (36, 50, 0.999, 0.949), _META

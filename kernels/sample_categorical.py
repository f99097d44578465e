"""Inverse-CDF samples of categoricals. See diwa/ops/reference_gpu.py:sample_categorical."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import next_power_of_2, short_name, softmax

MAX_CLASSES = 1024
_TILE = 1024  # values per program


@triton.jit
def sample_categorical_kernel(
    logits,  # [R, C]
    uniform,  # [R]
    index,  # [R] or unused
    onehot,  # [R, C] or unused
    rows,
    C,
    scale,  # 1 / temperature
    unimix,
    INDEX: tl.constexpr,
    ONEHOT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    row, mask = r < rows, (r < rows)[:, None] & (c < C)[None, :]
    at = r[:, None] * C + c[None, :]
    x = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32) * scale
    inside = tl.broadcast_to((c < C)[None, :], (BLOCK_R, BLOCK_C))
    p = (1.0 - unimix) * softmax(x, inside) + unimix / C
    p = tl.where(inside, p, 0.0)
    u = tl.load(uniform + r, mask=row, other=0.0)
    below = inside & (tl.cumsum(p, 1) <= u[:, None])
    k = tl.minimum(tl.sum(below.to(tl.int32), 1), C - 1)
    total = tl.sum(p, 1)
    bad = total != total  # NaN: no class
    if INDEX:
        tl.store(index + r, tl.where(bad, -1, k).to(tl.int64), mask=row)
    if ONEHOT:
        one = tl.where(c[None, :] == k[:, None], 1.0, 0.0)
        one = tl.where(bad[:, None], float("nan"), one)
        tl.store(onehot + at, one.to(onehot.dtype.element_ty), mask=mask)


def launch_shape(C: int) -> dict[str, int]:
    """Tile of a kernel over rows of C classes."""
    block = next_power_of_2(C)
    return {"BLOCK_R": max(1, _TILE // block), "BLOCK_C": block, "num_warps": 4}


def sample_categorical(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    unimix: float,
    want_index: bool,
    onehot_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """logits `[..., C]`, uniform `[...]` -> index int64 `[...]` and one-hot `[..., C]`; what is not
    wanted is empty."""
    logits, uniform = logits.contiguous(), uniform.contiguous()
    C = logits.shape[-1]
    empty = logits.new_empty(0)
    index = torch.empty_like(uniform, dtype=torch.int64) if want_index else empty.long()
    onehot = torch.empty_like(logits, dtype=onehot_dtype) if onehot_dtype else empty
    if uniform.numel():
        meta = launch_shape(C)
        sample_categorical_kernel[(triton.cdiv(uniform.numel(), meta["BLOCK_R"]),)](
            logits,
            uniform,
            index,
            onehot,
            uniform.numel(),
            C,
            1.0 / temperature,
            unimix,
            INDEX=want_index,
            ONEHOT=onehot_dtype is not None,
            **meta,
        )
    return index, onehot


def aot_examples() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """(name, kernel, arguments, options) of the launches that tools/aot_check.py compiles."""
    uniform, index = torch.empty(64), torch.zeros(64, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(64, 32, dtype=dtype)
        args = (x, uniform, index, x, 1600, 32, 1.0, 0.01)
        for want in ({"INDEX": True, "ONEHOT": False}, {"INDEX": True, "ONEHOT": True}):
            name = f"{'both' if want['ONEHOT'] else 'index'}-{short_name(dtype)}-C32"
            yield name, sample_categorical_kernel, args, want | launch_shape(32)

"""One-hot projection, action projection, LayerNorm and ELU in one pass over each row.

See diwa/ops/reference_gpu.py:onehot_ln_elu for the equation. A matrix product with a one-hot of S
groups is the sum of S rows of the transposed weights: the table.
"""

from collections.abc import Iterator
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import elu, next_power_of_2, short_name

MAX_WIDTH = 4096
_ROWS = 8  # table rows in flight; fewer would wait for each load in turn


@triton.jit
def _table_sum(idx, table, c, columns, U, S: tl.constexpr, C, R: tl.constexpr, ALIGN: tl.constexpr):
    """Sum of the S chosen rows; an index outside [0, C) makes it NaN."""
    total = tl.zeros_like(c).to(tl.float32)
    for s0 in range(0, S, R):
        s = s0 + tl.arange(0, R)
        k = tl.load(idx + s, mask=s < S, other=0)
        known = (k >= 0) & (k < C)
        row = tl.multiple_of((s.to(tl.int64) * C + tl.where(known, k, 0)) * U, ALIGN)
        here = (s < S)[:, None] & columns[None, :]
        v = tl.load(table + row[:, None] + c[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(known[:, None], v, float("nan")), 0)
    return total


@triton.jit
def _action_sum(action, w_a, c, columns, U, A: tl.constexpr, R: tl.constexpr, ALIGN: tl.constexpr):
    total = tl.zeros_like(c).to(tl.float32)
    for a0 in range(0, A, R):
        a = a0 + tl.arange(0, R)
        v = tl.load(action + a, mask=a < A, other=0.0).to(tl.float32)
        here = (a < A)[:, None] & columns[None, :]
        at = tl.multiple_of(a * U, ALIGN)
        w = tl.load(w_a + at[:, None] + c[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(v[:, None] * w, 0)
    return total


@triton.jit
def onehot_ln_elu_kernel(
    x,  # [N, U] or unused
    idx,  # [N, S] or unused
    table,  # [S C, U]
    action,  # [N, A] or unused
    w_a,  # [A, U]
    bias,  # [U]
    gain,  # [U]
    shift,  # [U]
    out,  # [N, U]
    U,
    C,
    eps,
    HAS_X: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    ALIGN: tl.constexpr,  # every row of U values starts on a multiple of it
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.multiple_of(row * U, ALIGN)
    c = tl.arange(0, BLOCK)
    columns = c < U
    v = tl.load(bias + c, mask=columns, other=0.0).to(tl.float32)
    if HAS_X:
        v += tl.load(x + first + c, mask=columns, other=0.0).to(tl.float32)
    if S > 0:
        v += _table_sum(idx + row * S, table, c, columns, U, S, C, R, ALIGN)
    if A > 0:
        v += _action_sum(action + row * A, w_a, c, columns, U, A, R, ALIGN)
    mean = tl.sum(tl.where(columns, v, 0.0), 0) / U
    d = tl.where(columns, v - mean, 0.0)
    variance = tl.sum(d * d, 0) / U
    g = tl.load(gain + c, mask=columns, other=0.0).to(tl.float32)
    b = tl.load(shift + c, mask=columns, other=0.0).to(tl.float32)
    y = elu(d * (1.0 / tl.sqrt(variance + eps)) * g + b)
    tl.store(out + first + c, y.to(out.dtype.element_ty), mask=columns)


def _launch(U: int) -> dict[str, int]:
    block = max(next_power_of_2(U), 32)
    warps = max(1, min(16, block // 128))
    return {"R": _ROWS, "ALIGN": gcd(U, 16), "BLOCK": block, "num_warps": warps}


def onehot_ln_elu(
    x: Tensor | None,
    idx: Tensor | None,
    table: Tensor | None,
    action: Tensor | None,
    w_a: Tensor | None,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x `[N, U]`, idx int64 `[N, S]` with table `[S C, U]`, action `[N, A]` with w_a `[A, U]`, each
    optional, and bias, gain, shift `[U]` -> `[N, U]`, in the dtype of the bias if none is given."""
    first = next(t for t in (x, idx, action) if t is not None)
    n, width = len(first), len(bias)
    out = bias.new_empty(n, width, dtype=out_dtype or bias.dtype)
    if not out.numel():
        return out
    groups = 0 if idx is None else idx.shape[1]
    classes = 0 if table is None or not groups else len(table) // groups
    actions = 0 if action is None else action.shape[1]
    args = [out if t is None else t.contiguous() for t in (x, idx, table, action, w_a)]
    vectors = [t.contiguous() for t in (bias, gain, shift)]
    onehot_ln_elu_kernel[(n,)](
        *args,
        *vectors,
        out,
        width,
        classes,
        eps,
        HAS_X=x is not None,
        S=groups,
        A=actions,
        **_launch(width),
    )
    return out


def aot_examples() -> Iterator[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    """(name, kernel, arguments, options) of the launches that tools/aot_check.py compiles."""
    for dtype in (torch.float32, torch.bfloat16):
        for U in (1000, 1024):
            x, v = torch.empty(2, U, dtype=dtype), torch.empty(U, dtype=dtype)
            idx, action = torch.zeros(2, 32, dtype=torch.int64), torch.empty(2, 7, dtype=dtype)
            args = (x, idx, x, action, x, v, v, v, x, U, 32, 1e-3)
            name = f"{short_name(dtype)}-U{U}"
            cell = {"HAS_X": False, "S": 32, "A": 7} | _launch(U)
            yield f"cell-{name}", onehot_ln_elu_kernel, args, cell
            head = {"HAS_X": True, "S": 0, "A": 0} | _launch(U)
            yield f"head-{name}", onehot_ln_elu_kernel, args, head

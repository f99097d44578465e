"""`onehot_ln_elu`: what an RSSM does between two GEMMs, one pass over each row, without gradient.

    y = ELU(LN(x + Σ_s table[s C + idx_s] + action w_a + bias))

With `idx` and `action` it is the input of the recurrent cell, and the product with a one-hot is a
sum of S table rows; with `x` it finishes the first layer of the prior or posterior head.
"""

import torch
from torch import Tensor

from . import reference_gpu as reference
from . import registry

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 4096  # kernels/onehot_ln_elu.py keeps a row in registers

registry.declare(
    "onehot_ln_elu",
    registry.triton("onehot_ln_elu", _GPU_DTYPES),  # kernels/onehot_ln_elu.py
    registry.reference(),  # diwa/ops/reference_gpu.py
)

_lib = torch.library.Library("diwa", "FRAGMENT")
_lib.define(
    "onehot_ln_elu_triton(Tensor? x, Tensor? idx, Tensor? table, Tensor? action, Tensor? w_a, "
    "Tensor bias, Tensor gain, Tensor shift, float eps, ScalarType? out_dtype=None) -> Tensor"
)
Optional = Tensor | None


@torch.library.impl(_lib, "onehot_ln_elu_triton", "CompositeExplicitAutograd")
def _triton(
    x: Optional,
    idx: Optional,
    table: Optional,
    action: Optional,
    w_a: Optional,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    from diwa.kernels.onehot_ln_elu import onehot_ln_elu as kernel

    return kernel(x, idx, table, action, w_a, bias, gain, shift, eps, out_dtype)


@torch.library.register_fake("diwa::onehot_ln_elu_triton")
def _fake(
    x: Optional,
    idx: Optional,
    table: Optional,
    action: Optional,
    w_a: Optional,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    first = next(t for t in (x, idx, action) if t is not None)
    return bias.new_empty(first.shape[0], bias.shape[0], dtype=out_dtype or bias.dtype)


def _check(tensors: dict[str, Optional], bias: Tensor) -> None:
    if bias.dim() != 1:
        raise ValueError(f"onehot_ln_elu: bias must be [U], got {list(bias.shape)}")
    x, idx, action = (tensors[k] for k in ("x", "idx", "action"))
    if x is None and idx is None and action is None:
        raise ValueError("onehot_ln_elu: give at least one of x, idx and action")
    for value, matrix in (("idx", "table"), ("action", "w_a")):
        if (tensors[value] is None) != (tensors[matrix] is None):
            raise ValueError(f"onehot_ln_elu: {value} and {matrix} go together")
    u = len(bias)
    n = next(len(t) for t in (x, idx, action) if t is not None)
    shapes: dict[str, tuple[int, ...]] = {"x": (n, u), "gain": (u,), "shift": (u,)}
    if idx is not None and idx.dim() == 2:
        table = tensors["table"]
        assert table is not None
        groups = max(idx.shape[1], 1)
        shapes |= {"idx": (n, idx.shape[1]), "table": (len(table) // groups * groups, u)}
    elif idx is not None:
        raise ValueError(f"onehot_ln_elu: idx must be [N, S], got {list(idx.shape)}")
    if action is not None:
        shapes |= {"action": (n, action.shape[-1]), "w_a": (action.shape[-1], u)}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"onehot_ln_elu: {name} must be {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.device != bias.device:
            raise ValueError(f"onehot_ln_elu: {name} is on {tensor.device}, bias on {bias.device}")
        if name == "idx" and tensor.dtype != torch.int64:
            raise TypeError(f"onehot_ln_elu: idx is {tensor.dtype}, must be torch.int64")
        if name != "idx" and not tensor.dtype.is_floating_point:
            raise TypeError(f"onehot_ln_elu: {name} is {tensor.dtype}, must be floating point")


@torch.no_grad()
def onehot_ln_elu(
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    *,
    x: Optional = None,
    idx: Optional = None,
    table: Optional = None,
    action: Optional = None,
    w_a: Optional = None,
    eps: float = 1e-3,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """`ELU(LN(x + one-hot(idx) table + action w_a + bias))`; no gradient.

    Args:
        bias, gain, shift: `[U]`; gain and shift are the layer norm's.
        x: `[N, U]` result of a GEMM.
        idx: int64 `[N, S]` classes in [0, C); outside, the row becomes NaN.
        table: `[S C, U]`, the transposed weights of the one-hot.
        action: `[N, A]`. w_a: `[A, U]`, its transposed weights.
        eps: of the layer norm.
        out_dtype: of the result; that of the bias if None. The other tensors may have any floating
            dtypes.
        backend: `"auto"`, `"reference"` or `"triton"` (U up to 4096).
    Returns:
        `[N, U]`. The Triton variant computes in float32, the reference in the dtype of the bias.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, device or dtype; it is named.
        BackendError: the backend was forced and cannot run.
    """
    tensors = dict(x=x, idx=idx, table=table, action=action, w_a=w_a, gain=gain, shift=shift)
    _check(tensors, bias)
    unfit = {}
    if len(bias) > MAX_WIDTH:
        unfit["triton"] = f"a row of {len(bias)} exceeds {MAX_WIDTH}"
    args = (x, idx, table, action, w_a, bias, gain, shift, eps, out_dtype)
    if registry.choose("onehot_ln_elu", bias, backend, unfit) == "triton":
        return torch.ops.diwa.onehot_ln_elu_triton.default(*args)
    return reference.onehot_ln_elu(*args)

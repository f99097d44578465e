"""`mish`: x tanh(softplus x) with one exponential per element, forward and backward.

    e = exp x, n = e² + 2e:  mish x  = x n / (n + 2)
                             mish' x = n / (n + 2) + 4 x e (e + 1) / (n + 2)²

The backward pass computes e again from x, so nothing but x is kept between the two. On a GPU the
operator is torch's own, which is one kernel already and which torch.compile can fuse with others;
the Triton variant runs when it is asked for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference, registry

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
registry.declare(
    "mish",
    registry.native("cpu", "mish_fwd"),  # csrc/cpu/mish.cpp
    registry.triton("mish", _GPU_DTYPES, automatic=False),  # kernels/mish.py
    registry.reference(),  # diwa/ops/reference.py
)

_lib = torch.library.Library("diwa", "FRAGMENT")
_lib.define("mish_fwd_triton(Tensor x) -> Tensor")
_lib.define("mish_bwd_triton(Tensor grad, Tensor x) -> Tensor")


@torch.library.impl(_lib, "mish_fwd_triton", "CompositeExplicitAutograd")
def _fwd_triton(x: Tensor) -> Tensor:
    from diwa.kernels.mish import mish_fwd

    return mish_fwd(x)


@torch.library.impl(_lib, "mish_bwd_triton", "CompositeExplicitAutograd")
def _bwd_triton(grad: Tensor, x: Tensor) -> Tensor:
    from diwa.kernels.mish import mish_bwd

    return mish_bwd(grad, x)


def _fake_fwd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_bwd(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


for _suffix in ("", "_triton"):
    if hasattr(torch.ops.diwa, f"mish_fwd{_suffix}"):  # "": the schema is in libdiwa_cpu.so
        torch.library.register_fake(f"diwa::mish_fwd{_suffix}", _fake_fwd)
        torch.library.register_fake(f"diwa::mish_bwd{_suffix}", _fake_bwd)


def _fwd(x: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        return torch.ops.diwa.mish_fwd_triton.default(x)
    return torch.ops.diwa.mish_fwd.default(x)


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return _fwd(x, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.backend == "triton":
            return torch.ops.diwa.mish_bwd_triton.default(grad, *ctx.saved_tensors), None
        return torch.ops.diwa.mish_bwd.default(grad, *ctx.saved_tensors), None


def mish(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Mish activation x tanh(softplus x), elementwise, as torch.nn.functional.mish.

    Args:
        x: any shape, any floating dtype. The native CPU variant takes float32, the Triton one also
            bfloat16 and float16; everything else runs on the reference.
        backend: `"auto"`, `"reference"`, `"cpu"` or `"triton"`.
    Returns:
        Tensor of the shape and dtype of `x`.
    Raises:
        TypeError: `x` is not floating point.
        BackendError: the backend was forced and cannot run.

    Differentiable once (any number of times with `backend="reference"`).
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"mish: x must be floating point, got {x.dtype}")
    chosen = registry.choose("mish", x, backend)
    if chosen == "reference":
        return reference.mish(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mish.apply(x, chosen)
    return _fwd(x, chosen)

"""`mish`: x tanh(softplus x) with one exponential per element, forward and backward.

    e = exp x, n = e² + 2e:  mish x  = x n / (n + 2)
                             mish' x = n / (n + 2) + 4 x e (e + 1) / (n + 2)²

The backward pass computes e again from x, so nothing but x is kept between the two. On a GPU the
operator is torch's own, which is one kernel already.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference, registry

registry.declare(
    "mish",
    registry.native("cpu", "mish_fwd"),  # csrc/cpu/mish.cpp
    registry.reference(),  # diwa/ops/reference.py
)


def _fake_fwd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_bwd(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


if hasattr(torch.ops.diwa, "mish_fwd"):  # the schema is in libdiwa_cpu.so
    torch.library.register_fake("diwa::mish_fwd", _fake_fwd)
    torch.library.register_fake("diwa::mish_bwd", _fake_bwd)


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.diwa.mish_fwd.default(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.diwa.mish_bwd.default(grad, *ctx.saved_tensors)


def mish(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Mish activation x tanh(softplus x), elementwise, as torch.nn.functional.mish.

    Args:
        x: any shape, any floating dtype. The native CPU variant takes float32; everything else
            runs on the reference.
        backend: `"auto"`, `"reference"` or `"cpu"`.
    Returns:
        Tensor of the shape and dtype of `x`.
    Raises:
        TypeError: `x` is not floating point.
        BackendError: the backend was forced and cannot run.

    Differentiable once (any number of times with `backend="reference"`).
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"mish: x must be floating point, got {x.dtype}")
    if registry.choose("mish", x, backend) == "reference":
        return reference.mish(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mish.apply(x)
    return torch.ops.diwa.mish_fwd.default(x)

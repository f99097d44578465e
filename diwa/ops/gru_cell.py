"""`gru_cell`: torch.nn.GRUCell with its gates in one pass, forward and backward.

    gi = x W_ihᵀ + b_ih       [B, 3H]  torch's GEMM
    gh = h W_hhᵀ + b_hh       [B, 3H]  torch's GEMM
    h' = gru_gates(gi, gh, h) [B, H]   r = σ(gi_r + gh_r), z = σ(gi_z + gh_z),
                                       n = tanh(gi_n + r gh_n), h' = n + z (h - n)

The backward pass computes the gates again from gi and gh, so nothing else is kept between the two.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference, registry

# Variants, in order of preference. Half precision is storage only: the arithmetic is float32.
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
registry.declare(
    "gru_cell",
    registry.native("cpu", "gru_gates_fwd"),  # csrc/cpu/gru_gates.cpp
    registry.native("cuda", "gru_gates_fwd", _GPU_DTYPES),  # csrc/cuda/gru_gates.cu
    registry.triton("gru_gates", _GPU_DTYPES),  # kernels/gru_gates.py
    registry.reference(),  # diwa/ops/reference.py
)

# Triton as torch operators of their own: opaque to torch.compile, imported at the first call.
_lib = torch.library.Library("diwa", "FRAGMENT")
_lib.define("gru_gates_fwd_triton(Tensor gi, Tensor gh, Tensor h) -> Tensor")
_lib.define(
    "gru_gates_bwd_triton(Tensor grad, Tensor gi, Tensor gh, Tensor h) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_lib, "gru_gates_fwd_triton", "CompositeExplicitAutograd")
def _fwd_triton(gi: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    from diwa.kernels.gru_gates import gru_gates_fwd

    return gru_gates_fwd(gi, gh, h)


@torch.library.impl(_lib, "gru_gates_bwd_triton", "CompositeExplicitAutograd")
def _bwd_triton(grad: Tensor, gi: Tensor, gh: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from diwa.kernels.gru_gates import gru_gates_bwd

    return gru_gates_bwd(grad, gi, gh, h)


def _fake_fwd(gi: Tensor, gh: Tensor, h: Tensor) -> Tensor:
    return h.new_empty(h.shape)


def _fake_bwd(grad: Tensor, gi: Tensor, gh: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gi.new_empty(gi.shape), gh.new_empty(gh.shape), h.new_empty(h.shape)


for _suffix in ("", "_triton"):
    if hasattr(torch.ops.diwa, f"gru_gates_fwd{_suffix}"):  # "": the schema is in libdiwa_cpu.so
        torch.library.register_fake(f"diwa::gru_gates_fwd{_suffix}", _fake_fwd)
        torch.library.register_fake(f"diwa::gru_gates_bwd{_suffix}", _fake_bwd)


def _fwd(gi: Tensor, gh: Tensor, h: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        return torch.ops.diwa.gru_gates_fwd_triton.default(gi, gh, h)
    return torch.ops.diwa.gru_gates_fwd.default(gi, gh, h)


class _GruGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gi: Tensor, gh: Tensor, h: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gi, gh, h)
        ctx.backend = backend
        return _fwd(gi, gh, h, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if ctx.backend == "triton":
            return *torch.ops.diwa.gru_gates_bwd_triton.default(grad, *saved), None
        return *torch.ops.diwa.gru_gates_bwd.default(grad, *saved), None


def _check(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> None:
    if x.dim() != 2:
        raise ValueError(f"gru_cell: x must be [B, I], got {list(x.shape)}")
    if h.dim() != 2:
        raise ValueError(f"gru_cell: h must be [B, H], got {list(h.shape)}")
    (B, inputs), H = x.shape, h.shape[1]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "h": (h, (B, H)),
        "w_ih": (w_ih, (3 * H, inputs)),
        "w_hh": (w_hh, (3 * H, H)),
    }
    if b_ih is not None:
        expected["b_ih"] = (b_ih, (3 * H,))
    if b_hh is not None:
        expected["b_hh"] = (b_hh, (3 * H,))
    if not h.dtype.is_floating_point:
        raise TypeError(f"gru_cell: h must be floating point, got {h.dtype}")
    mixed = torch.is_autocast_enabled(h.device.type)
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"gru_cell: {name} must be {list(shape)} (x {list(x.shape)}, h {list(h.shape)}), "
                f"got {list(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"gru_cell: {name} is on {tensor.device}, x on {x.device}")
        if tensor.dtype != x.dtype and not mixed:
            raise TypeError(f"gru_cell: {name} is {tensor.dtype}, x is {x.dtype}")


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One step of a GRU, as torch.nn.GRUCell (gate order r, z, n).

    Args:
        x: `[B, I]` input, any floating dtype. The native CPU gates take float32, the GPU ones also
            bfloat16 and float16; float64, and half precision on the CPU, run on the reference.
        h: `[B, H]` state before.
        w_ih: `[3H, I]` input weights. w_hh: `[3H, H]` recurrent weights.
        b_ih: `[3H]` or None. b_hh: `[3H]` or None.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"cuda"` or `"triton"`.
    Returns:
        `[B, H]` state after, in the dtype of `h`. Under autocast the two GEMMs run in the autocast
        dtype and the gates in that of `h`, so a float32 state stays float32.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, device or dtype; it is named.
        BackendError: the backend was forced and cannot run.

    Differentiable once in every tensor (any number of times with `backend="reference"`).
    """
    _check(x, h, w_ih, w_hh, b_ih, b_hh)
    chosen = registry.choose("gru_cell", h, backend)
    gi, gh = F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)
    if gi.dtype != h.dtype:
        gi, gh = gi.to(h.dtype), gh.to(h.dtype)
    if chosen == "reference":
        return reference.gru_gates(gi, gh, h)
    if torch.is_grad_enabled() and (gi.requires_grad or gh.requires_grad or h.requires_grad):
        return _GruGates.apply(gi, gh, h, chosen)
    return _fwd(gi, gh, h, chosen)

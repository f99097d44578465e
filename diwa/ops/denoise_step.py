"""`denoise_step`: what follows the network in a denoising step, one pass, without gradient.

x0 = clamp(p x - q eps, -1, 1)      n = clamp(noise, -clip_noise, clip_noise)
x' = c1 x0 + c2 x + std n           log p = -(std n / s)² / 2 - log s - log(2 pi) / 2
"""

import torch
from torch import Tensor

from . import reference_gpu as reference
from . import registry

registry.declare(
    "denoise_step",
    registry.triton("denoise_step", (torch.float32,)),  # kernels/denoise_step.py
    registry.reference(),  # diwa/ops/reference_gpu.py
)

_lib = torch.library.Library("diwa", "FRAGMENT")
_lib.define(
    "denoise_step_triton(Tensor x, Tensor eps, Tensor noise, Tensor table, float clip_noise) "
    "-> (Tensor, Tensor)"
)


@torch.library.impl(_lib, "denoise_step_triton", "CompositeExplicitAutograd")
def _triton(
    x: Tensor, eps: Tensor, noise: Tensor, table: Tensor, clip_noise: float
) -> tuple[Tensor, Tensor]:
    from diwa.kernels.denoise_step import denoise_step as kernel

    return kernel(x, eps, noise, table, clip_noise)


@torch.library.register_fake("diwa::denoise_step_triton")
def _fake(
    x: Tensor, eps: Tensor, noise: Tensor, table: Tensor, clip_noise: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.no_grad()
def denoise_step(
    x: Tensor,
    eps: Tensor,
    noise: Tensor,
    table: Tensor,
    *,
    clip_noise: float = 3.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One transition of the denoising chain, from the predicted noise.

    Args:
        x: `[N, P]` noisy chunk. noise: `[N, P]` standard normal, of the same dtype.
        eps: `[N, P]` predicted noise, any floating dtype.
        table: `[7]`: p, q, c1, c2, std, std / s, log s + log(2 pi) / 2, with s the deviation in
            log-probabilities; a row of `denoise_chain`'s step table, on the device.
        clip_noise: bound of the noise, in deviations.
        backend: `"auto"`, `"reference"` or `"triton"` (float32 x).
    Returns:
        The next chunk and the log-density of each of its numbers, `[N, P]`.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, device or dtype; it is named.
        BackendError: the backend was forced and cannot run.
    """
    if not x.dtype.is_floating_point:
        raise TypeError(f"denoise_step: x must be floating point, got {x.dtype}")
    for name, tensor, shape in (("eps", eps, x.shape), ("noise", noise, x.shape)):
        if tensor.shape != shape:
            raise ValueError(
                f"denoise_step: {name} must be {list(shape)} as x, got {list(tensor.shape)}"
            )
    if tuple(table.shape) != (7,):
        raise ValueError(f"denoise_step: table must be [7], got {list(table.shape)}")
    for name, tensor in (("eps", eps), ("noise", noise), ("table", table)):
        if tensor.device != x.device:
            raise ValueError(f"denoise_step: {name} is on {tensor.device}, x on {x.device}")
        if tensor.dtype != x.dtype and name != "eps":
            raise TypeError(f"denoise_step: {name} is {tensor.dtype}, x is {x.dtype}")
    if registry.choose("denoise_step", x, backend) == "triton":
        return torch.ops.diwa.denoise_step_triton.default(x, eps, noise, table, clip_noise)
    return reference.denoise_step(x, eps, noise, table, clip_noise)

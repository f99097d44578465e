"""How alike two pictures are: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of uint8 pictures `[..., h, w, 3]`, `[...]`."""
    return (a.float() - b.float()).square().mean(dim=(-3, -2, -1))


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (dB) of mean squared errors on the scale 0 to 255."""
    return 10 * torch.log10(255.0**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of uint8 pictures `[..., h, w, 3]`, `[...]` in [-1, 1].

    The form of Wang et al. (2004): a Gaussian window of 11 pixels and deviation 1.5, only where it
    fits into the picture; on each colour, then averaged.
    """
    x, y = (p.movedim(-1, -3).float() for p in (a, b))
    rows, columns = (_window(n, a.device) for n in x.shape[-2:])

    def smooth(picture: Tensor) -> Tensor:  # as matrices: many times faster than a convolution
        return rows @ picture @ columns.T

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    total = (mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2)
    return (alike / total).mean(dim=(-3, -2, -1))


def _window(size: int, device: torch.device) -> Tensor:
    """Matrix `[size - 10, size]` that takes Gaussian means of neighbouring numbers."""
    first = torch.arange(size - SSIM_WINDOW + 1, device=device)
    offset = torch.arange(size, device=device) - first[:, None] - SSIM_WINDOW // 2
    weight = torch.exp(-(offset.float() ** 2) / (2 * SSIM_SIGMA**2))
    weight = torch.where(offset.abs() <= SSIM_WINDOW // 2, weight, 0.0)
    return weight / weight.sum(1, keepdim=True)

"""How alike two pictures are: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    offset = torch.arange(SSIM_WINDOW, device=a.device) - SSIM_WINDOW // 2
    line = torch.exp(-(offset.float() ** 2) / (2 * SSIM_SIGMA**2))
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
    leading = a.shape[:-3]
    x, y = (p.movedim(-1, -3).float().flatten(0, -3)[:, None] for p in (a, b))

    def smooth(picture: Tensor) -> Tensor:
        return F.conv2d(picture, kernel)

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)
    total = (mean_x**2 + mean_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2)
    return (alike / total).mean(dim=(1, 2, 3)).view(*leading, 3).mean(-1)

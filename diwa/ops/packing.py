"""Weights in the layout of the native CPU kernels (csrc/include/diwa/gemm.h)."""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
ROUND = 32


def pack_weight(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight as the native GEMM reads it, the same for every instruction set.

        float32   [N / 16][K][16]               panels of 16 outputs
        bfloat16  [N / 16][ceil(K / 2)][16][2]  consecutive inputs side by side

    N is rounded up to a multiple of 32 with zeros.

    Args:
        weight: `[N, K]` (outputs, inputs), on the CPU, as in torch.nn.Linear.
        dtype: float32 or bfloat16, of the packed values.
    Returns:
        1-D tensor of `dtype`, a copy.
    Raises:
        ValueError, TypeError: not a matrix on the CPU, or another dtype.
    """
    if weight.dim() != 2 or weight.device.type != "cpu":
        raise ValueError(
            f"pack_weight: weight must be [N, K] on the CPU, got {list(weight.shape)} "
            f"on {weight.device}"
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"pack_weight: float32 or bfloat16, got {dtype}")
    n, k = weight.shape
    pair = 1 if dtype == torch.float32 else 2
    padded = F.pad(weight.detach().to(dtype), (0, k % pair, 0, -n % ROUND))
    panels = padded.view(-1, PANEL, padded.shape[1] // pair, pair)
    return panels.transpose(1, 2).contiguous().view(-1)


def packed_size(n: int, k: int, dtype: torch.dtype) -> int:
    """Number of values of a packed `[n, k]` weight."""
    return (n + -n % ROUND) * (k + k % (1 if dtype == torch.float32 else 2))

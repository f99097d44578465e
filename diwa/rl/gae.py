"""Reward scale; generalised advantage estimation is the operator `gae`."""

from __future__ import annotations

import torch
from torch import Tensor

from diwa.ops import gae

__all__ = ["RewardScaler", "gae"]


class RewardScaler(torch.nn.Module):
    """Divides rewards by the running deviation of the discounted return (section 5.5).

    Args:
        n: parallel dreams N.
        gamma: discount of the running return.
        clip: largest magnitude of a scaled reward.
    """

    ret: Tensor
    moments: Tensor

    def __init__(self, n: int, gamma: float = 0.99, clip: float = 10.0) -> None:
        super().__init__()
        self.gamma, self.clip = gamma, clip
        self.register_buffer("ret", torch.zeros(n))
        # mean, variance, count
        self.register_buffer("moments", torch.tensor([0.0, 1.0, 1e-4], dtype=torch.float64))

    @torch.no_grad()
    def forward(self, reward: Tensor, first: Tensor) -> Tensor:
        """Scale rewards `[T, N]`; `first [T, N]` marks steps that start an episode."""
        returns = []
        for r, f in zip(reward, first, strict=True):
            self.ret.copy_(r + (1 - f) * self.gamma * self.ret)
            returns.append(self.ret.clone())
        values = torch.stack(returns).double()
        mean, var, count = self.moments.unbind()
        m = values.numel()
        delta = values.mean() - mean
        total = count + m
        second = var * count + values.var(unbiased=False) * m + delta**2 * count * m / total
        self.moments.copy_(torch.stack([mean + delta * m / total, second / (total - 1), total]))
        scale = (self.moments[1] + 1e-8).sqrt().to(reward.dtype)
        return (reward / scale).clamp(-self.clip, self.clip)

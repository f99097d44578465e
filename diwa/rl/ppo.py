"""PPO over the two-level (environment x denoising) MDP (method sections 5.6 and 5.7)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_PROB_RANGE = (-5.0, 2.0)


def denoising_discount(ft_steps: int, gamma: float, device: torch.device | str = "cpu") -> Tensor:
    """Advantage weights `[Kf]`: gamma^(Kf - 1 - j), the last denoising step weighs 1."""
    exponent = torch.arange(ft_steps - 1, -1, -1, dtype=torch.float64)
    return (gamma**exponent).float().to(device)


def clip_schedule(
    ft_steps: int, coef: float, base: float, rate: float, device: torch.device | str = "cpu"
) -> Tensor:
    """PPO clip range `[Kf]`, growing exponentially from `base` to `coef`; Kf = 1 gives `coef`."""
    if ft_steps == 1:
        return torch.tensor([coef], device=device)
    j = torch.arange(ft_steps, dtype=torch.float64) / (ft_steps - 1)
    growth = (torch.exp(rate * j) - 1) / (math.exp(rate) - 1)
    return (base + (coef - base) * growth).float().to(device)


def chunk_log_prob(log_prob: Tensor) -> Tensor:
    """Mean over the chunk of clamped log-densities: `[M, Kf, L, A]` -> `[M, Kf]`.

    The mean (not the sum) makes the PPO ratio a geometric mean over the L * A numbers, which is
    why the clip range is small.
    """
    return log_prob.clamp(*LOG_PROB_RANGE).mean((-2, -1))


class PPOTerms(NamedTuple):
    """Scalars of one minibatch."""

    policy_loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def ppo_loss(
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    discount: Tensor,
    clip: Tensor,
    *,
    population: Tensor | None = None,
) -> PPOTerms:
    """Clipped policy loss with per-denoising-step discount and clip range.

    Args:
        new: `[M, Kf]` chunk log-probs under the trained policy.
        old: `[M, Kf]` under the policy that sampled.
        advantage: `[M]`, normalised here (unbiased deviation).
        discount: `[Kf]`, see `denoising_discount`.
        clip: `[Kf]`, see `clip_schedule`.
        population: advantages of the whole minibatch, whose mean and deviation count, where these
            rows are a part of it; None if they are all.
    """
    whole = advantage if population is None else population
    normed = (advantage - whole.mean()) / (whole.std() + 1e-8)
    weighted = normed[:, None] * discount
    log_ratio = new - old
    ratio = log_ratio.exp()
    clipped = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
    loss = torch.maximum(-weighted * ratio, -weighted * clipped).mean()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
        clip_fraction = ((ratio - 1).abs() > clip).float().mean()
    return PPOTerms(loss, approx_kl, clip_fraction)

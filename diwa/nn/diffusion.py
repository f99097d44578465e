"""Diffusion policy over action chunks: schedule, network, chain sampling, log-probabilities.

Method sections 3 and 5.6. The algebra: the condition is projected once per state, the time
embedding is a table of K rows, one network runs per denoising step, and the log-probabilities of a
sampled chain are read off its own noise.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diwa.config import PolicyConfig
from diwa.ops import mish

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class NoiseSchedule(nn.Module):
    """Cosine schedule with K steps (s = 0.008), tables of section 3.2 as buffers `[K]`.

    Attributes:
        alpha_bar: cumulative signal share.
        sigma: posterior deviation.
        c1, c2: weights of the clean estimate and of x_t in the posterior mean.
        p, q: x0 = p x_t - q eps.
    """

    alpha_bar: Tensor
    sigma: Tensor
    c1: Tensor
    c2: Tensor
    p: Tensor
    q: Tensor

    def __init__(self, denoising_steps: int = 20, s: float = 0.008) -> None:
        super().__init__()
        k = denoising_steps
        grid = torch.linspace(0, k + 1, k + 1, dtype=torch.float64)
        bar = torch.cos((grid / (k + 1) + s) / (1 + s) * math.pi / 2) ** 2
        beta = (1 - bar[1:] / bar[:-1]).clamp(0, 0.999)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        tables = {
            "alpha_bar": alpha_bar,
            "sigma": (beta * (1 - previous) / (1 - alpha_bar)).clamp(min=1e-20).sqrt(),
            "c1": beta * previous.sqrt() / (1 - alpha_bar),
            "c2": alpha.sqrt() * (1 - previous) / (1 - alpha_bar),
            "p": alpha_bar.rsqrt(),
            "q": (1 / alpha_bar - 1).sqrt(),
        }
        self.steps = k
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def sampling_std(self, minimum: float) -> Tensor:
        """Deviations `[K]` of exploratory sampling: max(sigma_t, minimum) at every t."""
        return self.sigma.clamp(min=minimum)

    def evaluation_std(self) -> Tensor:
        """Deviations `[K]` of deterministic evaluation: 0 at t = 0, else max(sigma_t, 1e-3)."""
        std = self.sigma.clamp(min=1e-3)
        std[0] = 0.0
        return std


class DenoisingMLP(nn.Module):
    """Noise prediction network: one pre-activation residual block of width W (section 3.1).

    The first layer is kept in three parts (chunk, time, condition), so that the condition part
    runs once per state.

    Args:
        chunk_dim: L * A numbers of an action chunk.
        cond_dim: F.
        width: W.
        denoising_steps: K, rows of the time table.
        time_dim: size of the sinusoidal embedding.
    """

    sinusoid: Tensor

    def __init__(
        self,
        chunk_dim: int,
        cond_dim: int,
        width: int = 512,
        denoising_steps: int = 20,
        time_dim: int = 16,
    ) -> None:
        super().__init__()
        half = time_dim // 2
        omega = torch.exp(-torch.arange(half) * math.log(1e4) / (half - 1))
        angle = torch.arange(denoising_steps)[:, None] * omega
        self.register_buffer(
            "sinusoid", torch.cat([angle.sin(), angle.cos()], -1), persistent=False
        )
        self.time = nn.Sequential(
            nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim)
        )
        self.chunk_in = nn.Linear(chunk_dim, width, bias=False)
        self.time_in = nn.Linear(time_dim, width, bias=False)
        self.cond_in = nn.Linear(cond_dim, width)
        self.hidden1 = nn.Linear(width, width)
        self.hidden2 = nn.Linear(width, width)
        self.out = nn.Linear(width, chunk_dim)

    def time_table(self) -> Tensor:
        """First-layer contribution of every denoising step, `[K, W]`."""
        return self.time_in(self.time(self.sinusoid))

    def forward(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """Predicted noise.

        Args:
            x: `[..., L * A]` noisy chunk.
            time: `[..., W]` rows of `time_table`.
            cond: `[..., W]` condition projected by `cond_in`.
        """
        y = self.chunk_in(x) + time + cond
        y = y + self.hidden2(mish(self.hidden1(mish(y))))
        return self.out(y)


class Chain(NamedTuple):
    """A sampled denoising chain of N states.

    Attributes:
        chunk: `[N, L, A]`, the final action chunk (not clipped).
        chain: `[N, Kf + 1, L, A]`, input of the first fine-tuned step to final chunk.
        log_prob: `[N, Kf, L, A]`, log-density of each transition from its own noise.
    """

    chunk: Tensor
    chain: Tensor
    log_prob: Tensor


class DiffusionPolicy(nn.Module):
    """Denoising diffusion policy pi(chunk | feature).

    Args:
        cond_dim: F.
        config: sizes and deviations.
        action_dim: A.
    """

    def __init__(self, cond_dim: int, config: PolicyConfig, action_dim: int = 7) -> None:
        super().__init__()
        self.config, self.action_dim, self.cond_dim = config, action_dim, cond_dim
        self.chunk_dim = config.chunk * action_dim
        self.schedule = NoiseSchedule(config.denoising_steps)
        self.net = DenoisingMLP(
            self.chunk_dim, cond_dim, config.width, config.denoising_steps, config.time_dim
        )

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise `[K + 1, N, L, A]` of one chain: the start and K steps."""
        k, c = self.config.denoising_steps, self.config
        shape = (k + 1, n, c.chunk, self.action_dim)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return noise.to(self.schedule.sigma.device)

    def bc_loss(self, feature: Tensor, chunk: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the predicted noise (section 3.4).

        Args:
            feature: `[B, F]`.
            chunk: `[B, L, A]` demonstrated actions in [-1, 1].
            step: `[B]` int64 denoising steps.
            noise: `[B, L, A]`.
        """
        x0, eps = chunk.flatten(1), noise.flatten(1)
        bar = self.schedule.alpha_bar[step][:, None]
        x = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
        predicted = self.net(x, self.net.time_table()[step], self.net.cond_in(feature))
        return F.mse_loss(predicted, eps)

    def _mean(self, x: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """Posterior mean with the clean estimate clamped to [-1, 1] (section 3.2)."""
        s = self.schedule
        p, q, c1, c2 = (table[t] for table in (s.p, s.q, s.c1, s.c2))
        if isinstance(t, Tensor):
            p, q, c1, c2 = (v[:, None] for v in (p, q, c1, c2))
        return c1 * (p * x - q * eps).clamp(-1, 1) + c2 * x

    @torch.no_grad()
    def sample(
        self,
        feature: Tensor,
        noise: Tensor,
        *,
        base: DiffusionPolicy | None = None,
        ft_steps: int = 0,
        explore: bool = False,
    ) -> Chain:
        """Sample the whole chain (section 3.3).

        Args:
            feature: `[N, F]`.
            noise: `[K + 1, N, L, A]`, see `noise`; step noise is clipped to +-clip_noise.
            base: frozen policy of the first K - Kf steps; None uses this policy throughout.
            ft_steps: Kf, transitions to return in the chain.
            explore: deviations max(sigma, min_sampling_std) at every step instead of the
                evaluation's.
        """
        c, sched = self.config, self.schedule
        std = sched.sampling_std(c.min_sampling_std) if explore else sched.evaluation_std()
        logprob_std = sched.sampling_std(c.min_logprob_std)
        flat = noise.flatten(2)
        tuned = (self.net, self.net.cond_in(feature), self.net.time_table())
        frozen = tuned
        if base is not None and ft_steps < sched.steps:
            frozen = (base.net, base.net.cond_in(feature), base.net.time_table())
        x, chain, log_prob = flat[0], [], []
        for t in reversed(range(sched.steps)):
            net, cond, time = tuned if t < ft_steps or base is None else frozen
            if t == ft_steps - 1:
                chain.append(x)
            n = flat[sched.steps - t].clamp(-c.clip_noise, c.clip_noise)
            x = self._mean(x, net(x, time[t], cond), t) + std[t] * n
            if t < ft_steps:
                chain.append(x)
                scaled = std[t] / logprob_std[t] * n
                log_prob.append(-0.5 * scaled**2 - logprob_std[t].log() - HALF_LOG_2PI)
        shape = (c.chunk, self.action_dim)
        if not ft_steps:
            empty = x.new_zeros(len(x), 0, *shape)
            return Chain(x.unflatten(1, shape), empty, empty)
        return Chain(
            x.unflatten(1, shape),
            torch.stack(chain, 1).unflatten(2, shape),
            torch.stack(log_prob, 1).unflatten(2, shape),
        )

    def chain_log_prob(self, feature: Tensor, chain: Tensor) -> Tensor:
        """Log-density of the Kf transitions of each chain under this policy (section 5.6).

        Args:
            feature: `[M, F]`.
            chain: `[M, Kf + 1, L, A]`.

        Returns:
            `[M, Kf, L, A]`, differentiable in the policy's parameters.
        """
        flat = chain.flatten(2)
        kf = flat.shape[1] - 1
        t = torch.arange(kf - 1, -1, -1, device=flat.device)
        x, target = flat[:, :-1], flat[:, 1:]
        cond = self.net.cond_in(feature)[:, None]
        mean = self._mean(x, self.net(x, self.net.time_table()[t], cond), t)
        std = self.schedule.sampling_std(self.config.min_logprob_std)[t][:, None]
        log_prob = -0.5 * ((target - mean) / std) ** 2 - std.log() - HALF_LOG_2PI
        return log_prob.unflatten(2, (self.config.chunk, self.action_dim))

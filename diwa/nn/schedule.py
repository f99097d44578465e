"""Noise schedule of the diffusion policy: the tables of DDPM and DDIM (method section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor

from diwa.config import PolicyConfig
from diwa.ops.reference_chain import ChainSteps


class NoiseSchedule(nn.Module):
    """Cosine schedule with K steps (s = 0.008), tables of section 3.2 as buffers.

    With `ddim_steps` the sampler visits every (K / ddim_steps)-th step only, from 0 on, and its
    tables are DDIM's: with abar and abar' of this and the next step visited,
    sigma = eta sqrt((1 - abar') / (1 - abar) (1 - abar / abar')), noise predicted again from the
    clamped x0, c2 = sqrt((1 - abar' - sigma²) / (1 - abar)), c1 = sqrt(abar') - c2 sqrt(abar).
    Evaluation then has eta = 0.

    Equivalent to (DDPM, x_t -> x_{t-1} given the clean x0 and noise n):

    >>> schedule, t = NoiseSchedule(20), 7
    >>> x0, x, n = torch.randn(3, 2, 28)
    >>> grid = (torch.linspace(0, 21, 21) / 21 + 0.008) / 1.008 * math.pi / 2
    >>> bar = grid.cos() ** 2
    >>> beta = (1 - bar[1:] / bar[:-1]).clamp(0, 0.999)
    >>> abar = (1 - beta).cumprod(0)
    >>> here, previous = abar[t], abar[t - 1]
    >>> mean = beta[t] * previous.sqrt() / (1 - here) * x0
    >>> mean = mean + (1 - beta[t]).sqrt() * (1 - previous) / (1 - here) * x
    >>> std = (beta[t] * (1 - previous) / (1 - here)).sqrt()
    >>> eps = (x - here.sqrt() * x0) / (1 - here).sqrt()  # what the network is to predict
    >>> clean = schedule.p[t] * x - schedule.q[t] * eps
    >>> ours = schedule.c1[t] * clean + schedule.c2[t] * x + schedule.sigma[t] * n
    >>> torch.allclose(ours, mean + std * n, atol=1e-5)
    True

    Args:
        denoising_steps: K.
        s: offset of the cosine.
        ddim_steps: steps visited by DDIM; 0 for DDPM.
        ddim_eta: eta of exploratory DDIM sampling.

    Attributes:
        alpha_bar: `[K]` cumulative signal share.
        steps: number of sampling steps, K or `ddim_steps`; the length of the tables below.
        time: int64, the denoising step of each sampling step.
        sigma: posterior deviation.
        c1, c2: weights of the clean estimate and of x_t in the posterior mean.
        p, q: x0 = p x_t - q eps.
    """

    alpha_bar: Tensor
    time: Tensor
    sigma: Tensor
    c1: Tensor
    c2: Tensor
    p: Tensor
    q: Tensor
    c1_evaluation: Tensor
    c2_evaluation: Tensor

    def __init__(
        self,
        denoising_steps: int = 20,
        s: float = 0.008,
        *,
        ddim_steps: int = 0,
        ddim_eta: float = 1.0,
    ) -> None:
        super().__init__()
        k = denoising_steps
        if not 0 <= ddim_steps <= k:
            raise ValueError(f"ddim_steps must lie in [0, {k}], got {ddim_steps}")
        grid = torch.linspace(0, k + 1, k + 1, dtype=torch.float64)
        bar = torch.cos((grid / (k + 1) + s) / (1 + s) * math.pi / 2) ** 2
        beta = (1 - bar[1:] / bar[:-1]).clamp(0, 0.999)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        self.steps, self.ddim = ddim_steps or k, ddim_steps > 0
        time = torch.arange(self.steps) * (k // self.steps)
        here = alpha_bar[time]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), here[:-1]])

        def ddim(eta: float) -> tuple[Tensor, Tensor, Tensor]:
            sigma = eta * ((1 - previous) / (1 - here) * (1 - here / previous)).sqrt()
            c2 = ((1 - previous - sigma**2).clamp(min=0) / (1 - here)).sqrt()
            return sigma, previous.sqrt() - c2 * here.sqrt(), c2

        tables = {"alpha_bar": alpha_bar, "p": here.rsqrt(), "q": (1 / here - 1).sqrt()}
        if self.ddim:
            tables["sigma"], tables["c1"], tables["c2"] = ddim(ddim_eta)
            _, tables["c1_evaluation"], tables["c2_evaluation"] = ddim(0.0)
        else:
            tables["sigma"] = (beta * (1 - previous) / (1 - here)).clamp(min=1e-20).sqrt()
            tables["c1"] = beta * previous.sqrt() / (1 - here)
            tables["c2"] = alpha.sqrt() * (1 - previous) / (1 - here)
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        self.register_buffer("time", time, persistent=False)

    def sampling_std(self, minimum: float) -> Tensor:
        """Deviations `[K]` of exploratory sampling: max(sigma_t, minimum) at every t."""
        return self.sigma.clamp(min=minimum)

    def evaluation_std(self) -> Tensor:
        """Deviations `[K]` of deterministic evaluation: 0 at t = 0, else max(sigma_t, 1e-3); all 0
        with DDIM."""
        if self.ddim:
            return torch.zeros_like(self.sigma)
        std = self.sigma.clamp(min=1e-3)
        std[0] = 0.0
        return std

    def tables(self, config: PolicyConfig, explore: bool) -> ChainSteps:
        """Tables of a sampling mode (section 3.3).

        Args:
            config: for the smallest deviations.
            explore: deviations max(sigma, min_sampling_std) at every step, instead of the
                evaluation's.
        """
        log_prob_std = self.sampling_std(config.min_logprob_std)
        if explore:
            std, c1, c2 = self.sampling_std(config.min_sampling_std), self.c1, self.c2
        else:
            std, c1, c2 = self.evaluation_std(), self.c1, self.c2
            if self.ddim:
                c1, c2 = self.c1_evaluation, self.c2_evaluation
        return ChainSteps(self.p, self.q, c1, c2, std, log_prob_std)

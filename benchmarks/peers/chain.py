"""Denoising chains as others run them, on the weights of a `diwa.nn.DiffusionPolicy`.

Three forms of the same mathematics (method sections 3.3, 5.6), noise given as an argument:

- `Original`: the form of published diffusion-policy fine-tuning code, with its known waste. The
  frozen network runs on every row and is overwritten where the tuned one applies (30 evaluations
  instead of 20 in a chain, 2 instead of 1 in an update); old log-probabilities are computed again
  after the rollout; `cat([x, time, condition])` projects the 2048-wide condition at every step
  and asks for a gradient that nobody uses; log-densities go through torch.distributions; the
  denoising discount is a Python loop over a tensor.
- `Needed`: only the network that counts is evaluated; otherwise the same.
- `Hoisted`: the condition is projected once per state and the time embedding is a table.
  `exp_mish` writes Mish with one exponential, which a compiler fuses better than torch's own.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diwa.nn.diffusion import DenoisingMLP, DiffusionPolicy


def exp_mish(x: Tensor) -> Tensor:
    """Mish with one exponential: x n / (n + 2), n = e^2 + 2e, e = exp x (x above 20 is itself)."""
    e = x.clamp(max=20.0).exp()
    n = e * e + 2 * e
    return x * n / (n + 2)


class SinusoidalEmbedding(nn.Module):
    """Steps `[B]` -> `[B, size]`: all sines, then all cosines."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.half = size // 2

    def forward(self, t: Tensor) -> Tensor:
        """Computed anew at every call."""
        omega = torch.exp(
            torch.arange(self.half, device=t.device) * (-math.log(1e4) / (self.half - 1))
        )
        angle = t[:, None] * omega[None]
        return torch.cat([angle.sin(), angle.cos()], -1)


class ConcatNet(nn.Module):
    """Noise prediction on the concatenated chunk, time embedding and condition."""

    def __init__(self, ours: DenoisingMLP) -> None:
        super().__init__()
        size = ours.time_in.in_features
        self.embedding = SinusoidalEmbedding(size)
        self.time = nn.Sequential(nn.Linear(size, 2 * size), nn.Mish(), nn.Linear(2 * size, size))
        self.time.load_state_dict(ours.time.state_dict())
        first = (ours.chunk_in.weight, ours.time_in.weight, ours.cond_in.weight)
        self.first = _linear(torch.cat(first, 1), ours.cond_in.bias)
        self.hidden1 = _linear(ours.hidden1.weight, ours.hidden1.bias)
        self.hidden2 = _linear(ours.hidden2.weight, ours.hidden2.bias)
        self.out = _linear(ours.out.weight, ours.out.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Noise `[B, L * A]` in x `[B, L * A]` at steps t `[B]` under cond `[B, F]`."""
        time = self.time(self.embedding(t).to(x.dtype))
        y = self.first(torch.cat([x, time, cond], -1))
        y = y + self.hidden2(F.mish(self.hidden1(F.mish(y))))
        return self.out(y)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    layer.load_state_dict(state)
    return layer


class _Chain(nn.Module):
    """Tables and noise clip of a chain whose last Kf steps a tuned network takes.

    Args:
        base: policy of the first K - Kf steps.
        tuned: policy of the last Kf.
        ft_steps: Kf.
        explore: deviations of exploratory sampling, otherwise those of evaluation.
    """

    std: Tensor
    logprob_std: Tensor

    def __init__(
        self, base: DiffusionPolicy, tuned: DiffusionPolicy, ft_steps: int, explore: bool = True
    ) -> None:
        super().__init__()
        schedule, c = tuned.schedule, tuned.config
        for name in ("p", "q", "c1", "c2"):
            self.register_buffer(name, getattr(schedule, name).clone())
        std = schedule.sampling_std(c.min_sampling_std) if explore else schedule.evaluation_std()
        self.register_buffer("std", std)
        self.register_buffer("logprob_std", schedule.sampling_std(c.min_logprob_std))
        self.steps, self.ft_steps, self.clip = schedule.steps, ft_steps, c.clip_noise

    def posterior_mean(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Mean of the next chunk, tables gathered row by row as `extract` does; t `[B]`."""
        p, q, c1, c2 = (getattr(self, n).gather(0, t)[:, None] for n in ("p", "q", "c1", "c2"))
        return c1 * (p * x - q * eps).clamp(-1, 1) + c2 * x


class Original(_Chain):
    """The form of published code; see the top of this file."""

    def __init__(
        self, base: DiffusionPolicy, tuned: DiffusionPolicy, ft_steps: int, explore: bool = True
    ) -> None:
        super().__init__(base, tuned, ft_steps, explore)
        self.base = ConcatNet(base.net).requires_grad_(False)
        self.tuned = ConcatNet(tuned.net)

    def mean_std(self, x: Tensor, t: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[B, L * A]` and sampling deviation `[B, 1]` of every row's own step."""
        eps = self.base(x, t, cond)
        rows = torch.where(t < self.ft_steps)[0]
        if len(rows):
            eps[rows] = self.tuned(x[rows], t[rows], cond[rows])
        return self.posterior_mean(x, eps, t), self.std.gather(0, t)[:, None]

    def forward(self, feature: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Chunk `[N, P]` and chain `[N, Kf + 1, P]` from noise `[K + 1, N, P]`, P = L * A."""
        x, chain = noise[0], []
        for i, step in enumerate(reversed(range(self.steps))):
            t = torch.full((len(x),), step, device=x.device)
            if step == self.ft_steps - 1:
                chain.append(x)
            mean, std = self.mean_std(x, t, feature)
            x = mean + std * noise[i + 1].clamp(-self.clip, self.clip)
            if step < self.ft_steps:
                chain.append(x)
        return x, torch.stack(chain, 1) if chain else x[:, None]

    def log_prob(self, feature: Tensor, chain: Tensor) -> Tensor:
        """`[N * Kf, P]` of chains `[N, Kf + 1, P]`, features repeated for every step."""
        kf = chain.shape[1] - 1
        t = torch.arange(kf - 1, -1, -1, device=chain.device).repeat(len(chain))
        cond = feature[:, None].repeat(1, kf, 1).flatten(0, 1)
        return self.pair_log_prob(cond, chain[:, :-1].flatten(0, 1), chain[:, 1:].flatten(0, 1), t)

    def pair_log_prob(self, cond: Tensor, x: Tensor, after: Tensor, t: Tensor) -> Tensor:
        """`[M, P]` of single transitions x -> after `[M, P]` at steps t `[M]`."""
        mean, _ = self.mean_std(x, t, cond)
        std = self.logprob_std.gather(0, t)[:, None].expand_as(mean)
        return torch.distributions.Normal(mean, std).log_prob(after)

    def rollout(self, feature: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chunk, chain and old log-probabilities `[N, Kf, P]`, from a second pass."""
        chunk, chain = self(feature, noise)
        old = self.log_prob(feature, chain)
        return chunk, chain, old.unflatten(0, (len(chain), -1))


class Needed(Original):
    """`Original` without the evaluations whose result is thrown away."""

    def mean_std(self, x: Tensor, t: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """All rows are at tuned steps: log-probabilities never ask for others."""
        return self.posterior_mean(x, self.tuned(x, t, cond), t), self.std.gather(0, t)[:, None]

    def forward(self, feature: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """As `Original.forward`."""
        x, chain = noise[0], []
        for i, step in enumerate(reversed(range(self.steps))):
            t = torch.full((len(x),), step, device=x.device)
            net = self.tuned if step < self.ft_steps else self.base
            if step == self.ft_steps - 1:
                chain.append(x)
            mean = self.posterior_mean(x, net(x, t, feature), t)
            x = mean + self.std[step] * noise[i + 1].clamp(-self.clip, self.clip)
            if step < self.ft_steps:
                chain.append(x)
        return x, torch.stack(chain, 1) if chain else x[:, None]


class HoistedNet(nn.Module):
    """The network in three parts; `fast` selects the one-exponential Mish."""

    def __init__(self, ours: DenoisingMLP, fast: bool) -> None:
        super().__init__()
        self.mish = exp_mish if fast else F.mish
        self.chunk_in = _linear(ours.chunk_in.weight, None)
        self.cond_in = _linear(ours.cond_in.weight, ours.cond_in.bias)
        self.hidden1 = _linear(ours.hidden1.weight, ours.hidden1.bias)
        self.hidden2 = _linear(ours.hidden2.weight, ours.hidden2.bias)
        self.out = _linear(ours.out.weight, ours.out.bias)
        self.table = nn.Parameter(ours.time_table().detach().clone())

    def forward(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """Noise in x `[..., P]`; time and cond are projections `[..., W]`."""
        y = self.chunk_in(x.to(time.dtype)) + time + cond
        y = y + self.hidden2(self.mish(self.hidden1(self.mish(y))))
        return self.out(y).to(x.dtype)

    def project(self, feature: Tensor) -> Tensor:
        """Condition `[..., W]` of features `[..., F]`."""
        return self.cond_in(feature.to(self.table.dtype))


class Hoisted(_Chain):
    """Condition and time projected once; log-probabilities from the chain's own noise.

    The networks may be in bfloat16 (`bf16`); the chain itself stays in the dtype of the noise.
    """

    def __init__(
        self,
        base: DiffusionPolicy,
        tuned: DiffusionPolicy,
        ft_steps: int,
        explore: bool = True,
        fast: bool = False,
    ) -> None:
        super().__init__(base, tuned, ft_steps, explore)
        self.base = HoistedNet(base.net, fast).requires_grad_(False)
        self.tuned = HoistedNet(tuned.net, fast)
        s = [getattr(self, n).tolist() for n in ("p", "q", "c1", "c2", "std", "logprob_std")]
        self.rows = list(zip(*s, strict=True))

    def bf16(self) -> Hoisted:
        """The networks in bfloat16."""
        self.base.bfloat16()
        self.tuned.bfloat16()
        return self

    def rollout(self, feature: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Original.rollout`."""
        tuned, base = self.tuned.project(feature), self.base.project(feature)
        x, chain, log_prob = noise[0], [], []
        for i, step in enumerate(reversed(range(self.steps))):
            net, cond = (self.tuned, tuned) if step < self.ft_steps else (self.base, base)
            p, q, c1, c2, std, logprob_std = self.rows[step]
            if step == self.ft_steps - 1:
                chain.append(x)
            n = noise[i + 1].clamp(-self.clip, self.clip)
            eps = net(x, net.table[step], cond)
            x = c1 * (p * x - q * eps).clamp(-1, 1) + c2 * x + std * n
            if step < self.ft_steps:
                chain.append(x)
                constant = -math.log(logprob_std) - 0.5 * math.log(2 * math.pi)
                log_prob.append(constant - 0.5 * (std / logprob_std * n) ** 2)
        if not chain:
            return x, x[:, None], x[:, None]
        return x, torch.stack(chain, 1), torch.stack(log_prob, 1)

    def forward(self, feature: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """As `Original.forward`."""
        chunk, chain, _ = self.rollout(feature, noise)
        return chunk, chain

    def log_prob(self, feature: Tensor, chain: Tensor) -> Tensor:
        """`[N, Kf, P]` of chains `[N, Kf + 1, P]`, all steps of a state together."""
        kf = chain.shape[1] - 1
        t = torch.arange(kf - 1, -1, -1, device=chain.device)
        x, net = chain[:, :-1], self.tuned
        eps = net(x, net.table[t], net.cond_in(feature)[:, None])
        return self._density(x, eps, chain[:, 1:], t)

    def pair_log_prob(self, cond: Tensor, x: Tensor, after: Tensor, t: Tensor) -> Tensor:
        """As `Original.pair_log_prob`; the first layer still sees one row per pair."""
        eps = self.tuned(x, self.tuned.table[t], self.tuned.cond_in(cond))
        return self._density(x, eps, after, t)

    def _density(self, x: Tensor, eps: Tensor, after: Tensor, t: Tensor) -> Tensor:
        p, q, c1, c2 = (getattr(self, n)[t][:, None] for n in ("p", "q", "c1", "c2"))
        mean = c1 * (p * x - q * eps).clamp(-1, 1) + c2 * x
        std = self.logprob_std[t][:, None]
        constant = std.log() + 0.5 * math.log(2 * math.pi)
        return -0.5 * ((after - mean) / std) ** 2 - constant


def discount_loop(index: Tensor, ft_steps: int, gamma: float) -> Tensor:
    """Advantage weights of chain positions `[M]` as published: a Python loop over a tensor."""
    return torch.tensor([gamma ** (ft_steps - i - 1) for i in index])

"""The policy chain and the RSSM step as published code runs them, on any device, for timing.

Same mathematics as diwa's (method sections 1.3, 3.3), with the known waste of that form: the frozen
network runs on every row and is overwritten where the tuned one applies, the condition is
concatenated and projected at every step, and samples go through torch.distributions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diwa.nn.diffusion import DenoisingMLP, DiffusionPolicy
from diwa.nn.rssm import RSSM
from diwa.ops.reference_chain import Chain


class ConcatNet:
    """Noise prediction on the concatenated chunk, time embedding and condition."""

    def __init__(self, net: DenoisingMLP) -> None:
        first = (net.chunk_in.weight, net.time_in.weight, net.cond_in.weight)
        self.net = net
        self.first = torch.cat(first, 1).detach()
        self.half = net.time_in.in_features // 2

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Noise `[N, P]` in x at steps t `[N]` under cond `[N, F]`."""
        net, half = self.net, self.half
        omega = torch.arange(half, device=x.device) * (-math.log(1e4) / (half - 1))
        angle = t[:, None] * torch.exp(omega)[None]
        time = net.time(torch.cat([angle.sin(), angle.cos()], -1))
        y = F.linear(torch.cat([x, time, cond], -1), self.first, net.cond_in.bias)
        hidden1, hidden2 = net.get_submodule("hidden1"), net.get_submodule("hidden2")
        y = y + hidden2(F.mish(hidden1(F.mish(y))))
        return net.out(y)


@torch.no_grad()
def original_chain(
    base: DiffusionPolicy, tuned: DiffusionPolicy, feature: Tensor, noise: Tensor, ft_steps: int
) -> Chain:
    """The whole chain, noise `[K + 1, N, P]`; chunk, chain and log-probabilities.

    The log-probabilities are those of the pass that published code makes after the rollout, without
    the frozen network's share of it.
    """
    c, schedule = tuned.config, tuned.schedule
    frozen, trained = ConcatNet(base.net), ConcatNet(tuned.net)
    steps = schedule.tables(c, explore=True)
    x, chain, n = noise[0], [], noise.shape[1]
    for k in reversed(range(schedule.steps)):
        t = torch.full((n,), k, device=x.device)
        if k == ft_steps - 1:
            chain.append(x)
        eps = frozen(x, t, feature)
        rows = torch.where(t < ft_steps)[0]
        if len(rows):
            eps[rows] = trained(x[rows], t[rows], feature[rows])
        p, q, c1, c2, std = (table.gather(0, t)[:, None] for table in steps[:5])
        mean = c1 * (p * x - q * eps).clamp(-1, 1) + c2 * x
        x = mean + std * noise[schedule.steps - k].clamp(-c.clip_noise, c.clip_noise)
        if k < ft_steps:
            chain.append(x)
    states = torch.stack(chain, 1)
    flat = states[:, :-1].flatten(0, 1)
    t = torch.arange(ft_steps - 1, -1, -1, device=x.device).repeat(n)
    eps = trained(flat, t, feature.repeat_interleave(ft_steps, 0))
    p, q, c1, c2 = (table.gather(0, t)[:, None] for table in steps[:4])
    mean = c1 * (p * flat - q * eps).clamp(-1, 1) + c2 * flat
    normal = torch.distributions.Normal(mean, steps.log_prob_std.gather(0, t)[:, None])
    log_prob = normal.log_prob(states[:, 1:].flatten(0, 1)).view(n, ft_steps, -1)
    return Chain(x, states, log_prob)


@torch.no_grad()
def original_imagine(rssm: RSSM, h: Tensor, z: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """L prior steps with torch.distributions' own samples: h `[L, N, H]`, z `[L, N, Z]`."""
    hs, zs = [], []
    for action in actions:
        x = F.elu(rssm.cell_norm(rssm.cell_z(z) + rssm.cell_a(action)))
        h = torch.gru_cell(
            *(x, h, rssm.gru.weight_ih, rssm.gru.weight_hh, rssm.gru.bias_ih, rssm.gru.bias_hh)
        )
        logits = rssm.prior_out(F.elu(rssm.prior_norm(rssm.prior_h(h))))
        logits = logits.unflatten(-1, (rssm.stoch_groups, rssm.stoch_classes))
        independent = torch.distributions.OneHotCategoricalStraightThrough(logits=logits)
        z = torch.distributions.Independent(independent, 1).rsample().flatten(1)
        hs.append(h)
        zs.append(z)
    return torch.stack(hs), torch.stack(zs)

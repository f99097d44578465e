"""RSSM steps and posterior scans as others run them, on the weights of a `diwa.nn.RSSM`.

- `Original`: the form of published Dreamer-style code, one step at a time: torch.distributions
  (with its argument checks) for every sample, a one-hot state through a dense product, heads and
  projections inside the loop.
- `Lean`: the same loop without torch.distributions; classes by inverse CDF.
- `Gathered`: the one-hot product is a sum of table rows (`F.embedding_bag`).

With `uniform=None` each draws its own randomness as its original would; with uniforms all give
the same sample, which is what the correctness gate uses.
"""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, OneHotCategoricalStraightThrough, kl_divergence

from diwa.nn.rssm import RSSM


def inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Class `[..., S]` and probabilities `[..., S, C]` of logits `[..., S, C]`."""
    probs = logits.softmax(-1)
    index = (probs.cumsum(-1) <= uniform[..., None]).sum(-1)
    return index.clamp(max=probs.shape[-1] - 1), probs


def straight_through(logits: Tensor, uniform: Tensor) -> Tensor:
    """One-hot `[..., Z]` with the gradient of the probabilities."""
    index, probs = inverse_cdf(logits, uniform)
    onehot = F.one_hot(index, probs.shape[-1]).to(probs.dtype)
    return (onehot + probs - probs.detach()).flatten(-2)


class _Recurrent(nn.Module):
    def __init__(self, ours: RSSM) -> None:
        super().__init__()
        own = copy.deepcopy(ours)
        self.groups, self.classes = ours.stoch_groups, ours.stoch_classes
        self.cell_z, self.cell_a, self.cell_norm = own.cell_z, own.cell_a, own.cell_norm
        self.gru = nn.GRUCell(own.gru.input_size, own.gru.hidden_size)
        self.gru.load_state_dict(own.gru.state_dict())
        self.prior = nn.Sequential(own.prior_h, own.prior_norm, nn.ELU(), own.prior_out)
        self.post_h, self.post_e, self.post_norm = own.post_h, own.post_e, own.post_norm
        self.post_out = own.post_out

    def split(self, logits: Tensor) -> Tensor:
        """`[..., Z]` -> `[..., S, C]`."""
        return logits.unflatten(-1, (self.groups, self.classes))

    def cell(self, h: Tensor, z: Tensor, action: Tensor) -> Tensor:
        """State after one step from one-hot z `[B, Z]`."""
        return self.gru(F.elu(self.cell_norm(self.cell_z(z) + self.cell_a(action))), h)

    def sample(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """One-hot `[..., Z]` of logits `[..., S, C]`."""
        if uniform is None:
            uniform = torch.rand(logits.shape[:-1], device=logits.device)
        return straight_through(logits.float(), uniform).to(logits.dtype)


class Lean(_Recurrent):
    """The loop without torch.distributions."""

    def forward(
        self, h: Tensor, z: Tensor, actions: Tensor, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """States h `[L, N, H]`, z `[L, N, Z]` under actions `[L, N, A]`."""
        hs, zs = [], []
        for i in range(len(actions)):
            h = self.cell(h, z, actions[i])
            z = self.sample(self.split(self.prior(h)), None if uniforms is None else uniforms[i])
            hs.append(h)
            zs.append(z)
        return torch.stack(hs), torch.stack(zs)

    def observe(
        self, embed: Tensor, action: Tensor, reset: Tensor, h: Tensor, z: Tensor, uniforms
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h, z, posterior logits, prior logits over T frames, projections outside the loop."""
        keep = (1 - reset)[..., None]
        e, a = self.post_e(embed), self.cell_a(action)
        hs, zs, logits = [], [], []
        for t in range(len(embed)):
            u = None if uniforms is None else uniforms[t]
            h, z, post = self.posterior_step(h * keep[t], z * keep[t], a[t], e[t], u)
            hs.append(h)
            zs.append(z)
            logits.append(post)
        h = torch.stack(hs)
        return h, torch.stack(zs), torch.stack(logits), self.split(self.prior(h))

    def posterior_step(
        self, h: Tensor, z: Tensor, action: Tensor, embed: Tensor, uniform: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h, z and posterior logits after one frame; action and embed are projections.

        What torch.compile gets: a whole sequence takes it many minutes.
        """
        h = self.gru(F.elu(self.cell_norm(self.cell_z(z) + action)), h)
        post = self.split(self.post_out(F.elu(self.post_norm(self.post_h(h) + embed))))
        return h, self.sample(post, uniform), post

    def kl(self, post: Tensor, prior: Tensor, balance: float) -> Tensor:
        """Balanced KL `[T, B]`."""

        def one(q: Tensor, p: Tensor) -> Tensor:
            q, p = q.log_softmax(-1), p.log_softmax(-1)
            return (q.exp() * (q - p)).sum((-2, -1))

        return balance * one(post.detach(), prior) + (1 - balance) * one(post, prior.detach())


class Original(Lean):
    """The form of published code; see the top of this file."""

    def sample(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """Through torch.distributions, unless uniforms fix the sample."""
        if uniform is not None:
            return super().sample(logits, uniform)
        distribution = Independent(OneHotCategoricalStraightThrough(logits=logits.float()), 1)
        return distribution.rsample().flatten(-2).to(logits.dtype)

    def observe(
        self, embed: Tensor, action: Tensor, reset: Tensor, h: Tensor, z: Tensor, uniforms
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `Lean.observe`, every projection inside the loop."""
        hs, zs, logits = [], [], []
        for t in range(len(embed)):
            keep = (1 - reset[t])[:, None]
            h = self.cell(h * keep, z * keep, action[t])
            x = self.post_norm(self.post_h(h) + self.post_e(embed[t]))
            post = self.split(self.post_out(F.elu(x)))
            z = self.sample(post, None if uniforms is None else uniforms[t])
            hs.append(h)
            zs.append(z)
            logits.append(post)
        h = torch.stack(hs)
        return h, torch.stack(zs), torch.stack(logits), self.split(self.prior(h))

    def kl(self, post: Tensor, prior: Tensor, balance: float) -> Tensor:
        """As `Lean.kl`, through torch.distributions."""

        def one(q: Tensor, p: Tensor) -> Tensor:
            q, p = (Independent(OneHotCategoricalStraightThrough(logits=x), 1) for x in (q, p))
            return kl_divergence(q, p)

        return balance * one(post.detach(), prior) + (1 - balance) * one(post, prior.detach())


class Gathered(Lean):
    """Inference only: z stays a class index and its product is a sum of rows."""

    def __init__(self, ours: RSSM) -> None:
        super().__init__(ours)
        self.table = nn.Parameter(ours.cell_z.weight.detach().T.contiguous())
        self.register_buffer("offset", torch.arange(self.groups) * self.classes)

    def forward(
        self, h: Tensor, z: Tensor, actions: Tensor, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """States h `[L, N, H]` and class indices `[L, N, S]`; z `[N, S]` int64."""
        hs, zs = [], []
        for i in range(len(actions)):
            x = F.embedding_bag(z + self.offset, self.table, mode="sum") + self.cell_z.bias
            h = self.gru(F.elu(self.cell_norm(x + self.cell_a(actions[i]))), h)
            logits = self.split(self.prior(h)).float()
            u = torch.rand_like(logits[..., 0]) if uniforms is None else uniforms[i]
            z, _ = inverse_cdf(logits, u)
            hs.append(h)
            zs.append(z)
        return torch.stack(hs), torch.stack(zs)

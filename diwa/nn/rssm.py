"""Recurrent state-space model with categorical states (method section 1.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class RSSMState(NamedTuple):
    """Latent state of N dreams.

    Attributes:
        h: `[N, H]` deterministic part.
        z: `[N, Z]` flattened one-hot of the S categorical groups.
    """

    h: Tensor
    z: Tensor

    @property
    def feature(self) -> Tensor:
        """`[N, F]`, the concatenation of h and z."""
        return torch.cat([self.h, self.z], dim=-1)


class Posterior(NamedTuple):
    """Result of `RSSM.observe` over T frames of B streams.

    Attributes:
        h: `[T, B, H]`.
        z: `[T, B, Z]`, straight-through one-hot.
        logits: `[T, B, S, C]` of the posterior.
    """

    h: Tensor
    z: Tensor
    logits: Tensor


def sample_onehot(logits: Tensor, uniform: Tensor, *, unimix: float = 0.0) -> Tensor:
    """Straight-through sample of categoricals by inverse CDF.

    Args:
        logits: `[..., S, C]`.
        uniform: `[..., S]` in [0, 1): class = number of cumulative probabilities <= uniform.
        unimix: share of the uniform distribution mixed in.

    Returns:
        `[..., S * C]`: one-hot forward, gradient of the probabilities.
    """
    probs = logits.float().softmax(-1)
    if unimix:
        probs = (1 - unimix) * probs + unimix / probs.shape[-1]
    below = (probs.cumsum(-1) <= uniform[..., None]).sum(-1)
    index = below.clamp(max=probs.shape[-1] - 1)
    onehot = torch.zeros_like(probs).scatter_(-1, index[..., None], 1.0)
    return (onehot + (probs - probs.detach())).flatten(-2)


def balanced_kl(post: Tensor, prior: Tensor, balance: float) -> tuple[Tensor, Tensor]:
    """KL of posterior and prior logits `[..., S, C]`, summed over groups (section 1.6).

    Returns:
        The balanced loss `[...]` (`balance` trains the prior, the rest the posterior) and the plain
        KL value `[...]`, detached.
    """

    def kl(q_logits: Tensor, p_logits: Tensor) -> Tensor:
        q, p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
        return (q.exp() * (q - p)).sum((-2, -1))

    to_prior, to_post = kl(post.detach(), prior), kl(post, prior.detach())
    return balance * to_prior + (1 - balance) * to_post, to_prior.detach()


class RSSM(nn.Module):
    """Recurrent state-space model: plain GRUCell, one-hot states, LayerNorm + ELU heads.

    Args:
        action_dim: A.
        embed_dim: E.
        deter_dim: H.
        stoch_groups: S.
        stoch_classes: C.
        hidden_dim: width of the layers.
        unimix: share of the uniform distribution in every sampled categorical (0 in the paper).
    """

    def __init__(
        self,
        action_dim: int,
        embed_dim: int,
        deter_dim: int = 1024,
        stoch_groups: int = 32,
        stoch_classes: int = 32,
        hidden_dim: int = 1000,
        unimix: float = 0.0,
    ) -> None:
        super().__init__()
        self.deter_dim, self.stoch_groups, self.stoch_classes = (
            deter_dim,
            stoch_groups,
            stoch_classes,
        )
        self.stoch_dim = stoch_groups * stoch_classes
        self.feature_dim = deter_dim + self.stoch_dim
        self.unimix = unimix
        self.cell_z = nn.Linear(self.stoch_dim, hidden_dim)
        self.cell_a = nn.Linear(action_dim, hidden_dim, bias=False)
        self.cell_norm = nn.LayerNorm(hidden_dim, eps=1e-3)
        self.gru = nn.GRUCell(hidden_dim, deter_dim)
        self.prior_h = nn.Linear(deter_dim, hidden_dim)
        self.prior_norm = nn.LayerNorm(hidden_dim, eps=1e-3)
        self.prior_out = nn.Linear(hidden_dim, self.stoch_dim)
        self.post_h = nn.Linear(deter_dim, hidden_dim)
        self.post_e = nn.Linear(embed_dim, hidden_dim, bias=False)
        self.post_norm = nn.LayerNorm(hidden_dim, eps=1e-3)
        self.post_out = nn.Linear(hidden_dim, self.stoch_dim)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.gru.weight_ih)
        nn.init.orthogonal_(self.gru.weight_hh)
        nn.init.zeros_(self.gru.bias_ih)
        nn.init.zeros_(self.gru.bias_hh)

    def initial(self, n: int, device: torch.device | str | None = None) -> RSSMState:
        """Zero state of n dreams."""
        like = self.cell_z.weight
        device = like.device if device is None else device
        return RSSMState(
            torch.zeros(n, self.deter_dim, device=device, dtype=like.dtype),
            torch.zeros(n, self.stoch_dim, device=device, dtype=like.dtype),
        )

    def _groups(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (self.stoch_groups, self.stoch_classes))

    def _recur(self, state: RSSMState, action_projection: Tensor) -> Tensor:
        x = self.cell_z(state.z) + action_projection
        return self.gru(F.elu(self.cell_norm(x)), state.h)

    def prior_logits(self, h: Tensor) -> Tensor:
        """`[..., H]` -> `[..., S, C]`."""
        return self._groups(self.prior_out(F.elu(self.prior_norm(self.prior_h(h)))))

    def _posterior_logits(self, h: Tensor, embed_projection: Tensor) -> Tensor:
        x = self.post_norm(self.post_h(h) + embed_projection)
        return self._groups(self.post_out(F.elu(x)))

    def imagine(self, state: RSSMState, action: Tensor, uniform: Tensor) -> RSSMState:
        """One prior step.

        Args:
            state: N dreams.
            action: `[N, A]`.
            uniform: `[N, S]` in [0, 1), the randomness of the sample.
        """
        h = self._recur(state, self.cell_a(action))
        z = sample_onehot(self.prior_logits(h), uniform, unimix=self.unimix)
        return RSSMState(h, z.to(h.dtype))

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        reset: Tensor,
        state: RSSMState,
        uniform: Tensor,
    ) -> Posterior:
        """Posterior scan over T frames.

        Args:
            embed: `[T, B, E]`.
            action: `[T, B, A]`, the action that led to each frame.
            reset: `[T, B]` in {0, 1}; 1 drops the carried state before that frame.
            state: carried state of B streams.
            uniform: `[T, B, S]` in [0, 1).
        """
        embed_projection, action_projection = self.post_e(embed), self.cell_a(action)
        keep = (1 - reset)[..., None]
        hs, zs, logits = [], [], []
        for t in range(len(embed)):
            masked = RSSMState(state.h * keep[t], state.z * keep[t])
            h = self._recur(masked, action_projection[t])
            post = self._posterior_logits(h, embed_projection[t])
            z = sample_onehot(post, uniform[t], unimix=self.unimix).to(h.dtype)
            state = RSSMState(h, z)
            hs.append(h)
            zs.append(z)
            logits.append(post)
        return Posterior(torch.stack(hs), torch.stack(zs), torch.stack(logits))

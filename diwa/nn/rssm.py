"""Recurrent state-space model with categorical states (method section 1.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from diwa.nn.frozen_rssm import FrozenRSSM
from diwa.ops import onehot_st, rssm_observe
from diwa.ops.reference import RSSMWeights, rssm_head, rssm_recur


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


class RSSM(nn.Module):
    """Recurrent state-space model: plain GRUCell, one-hot states, LayerNorm + ELU heads.

    Equivalent to (one prior step):

    >>> import torch, diwa.nn
    >>> import torch.nn.functional as F
    >>> m = diwa.nn.RSSM(3, 18, deter_dim=24, stoch_groups=4, stoch_classes=5, hidden_dim=16)
    >>> state, action, uniform = m.initial(2), torch.randn(2, 3), torch.rand(2, 4)
    >>> x = F.elu(m.cell_norm(m.cell_z(state.z) + m.cell_a(action)))
    >>> h = torch.gru_cell(x, state.h, *m.gru.parameters())
    >>> probs = m.prior_out(F.elu(m.prior_norm(m.prior_h(h)))).view(2, 4, 5).softmax(-1)
    >>> index = (probs.cumsum(-1) <= uniform[..., None]).sum(-1).clamp(max=4)
    >>> after = m.imagine(state, action, uniform)
    >>> torch.allclose(after.h, h, atol=1e-6)
    True
    >>> torch.allclose(after.z, F.one_hot(index, 5).flatten(1).float(), atol=1e-6)
    True

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

    def _weights(self, name: str, embed: nn.Linear | None) -> RSSMWeights:
        first, norm, out = (getattr(self, f"{name}_{part}") for part in ("h", "norm", "out"))
        return RSSMWeights(
            *(self.cell_z.weight, self.cell_z.bias, self.cell_a.weight),
            *(self.cell_norm.weight, self.cell_norm.bias),
            *(self.gru.weight_ih, self.gru.weight_hh, self.gru.bias_ih, self.gru.bias_hh),
            *(first.weight, first.bias, norm.weight, norm.bias, out.weight, out.bias),
            None if embed is None else embed.weight,
        )

    def prior_weights(self) -> RSSMWeights:
        """The parameters of a prior step, as the operators take them."""
        return self._weights("prior", None)

    def posterior_weights(self) -> RSSMWeights:
        """The parameters of a posterior step, as the operators take them."""
        return self._weights("post", self.post_e)

    def prior_logits(self, h: Tensor) -> Tensor:
        """`[..., H]` -> `[..., S, C]`."""
        return rssm_head(
            self.prior_weights(), self.prior_h(h), self.stoch_groups, self.prior_norm.eps
        )

    def freeze(self, dtype: torch.dtype = torch.float32) -> FrozenRSSM:
        """The packed inference form, which imagines without gradient and follows this model.

        Args:
            dtype: float32 or bfloat16, of the packed weights and what they multiply.
        """
        return FrozenRSSM(self, dtype)

    def imagine(self, state: RSSMState, action: Tensor, uniform: Tensor) -> RSSMState:
        """One prior step.

        Args:
            state: N dreams.
            action: `[N, A]`.
            uniform: `[N, S]` in [0, 1), the randomness of the sample.

        Differentiable; `freeze` gives the form for many steps without gradient.
        """
        weights = self.prior_weights()
        x = self.cell_z(state.z) + self.cell_a(action)
        h = rssm_recur(weights, state.h, x, self.cell_norm.eps)
        logits = rssm_head(weights, self.prior_h(h), self.stoch_groups, self.prior_norm.eps)
        return RSSMState(h, onehot_st(logits, uniform, unimix=self.unimix).to(h.dtype))

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        reset: Tensor,
        state: RSSMState,
        uniform: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Posterior:
        """Posterior scan over T frames.

        Args:
            embed: `[T, B, E]`.
            action: `[T, B, A]`, the action that led to each frame.
            reset: `[T, B]` in {0, 1}; 1 drops the carried state before that frame.
            state: carried state of B streams.
            uniform: `[T, B, S]` in [0, 1).
            dtype: of the weights and activations of the native CPU scan (`ops.rssm_observe`).
        """
        hs, zs, logits = rssm_observe(
            self.posterior_weights(),
            embed,
            action,
            reset,
            *state,
            uniform,
            unimix=self.unimix,
            eps=self.cell_norm.eps,
            dtype=dtype,
        )
        return Posterior(hs, zs, logits)

    @torch.no_grad()
    def filter(
        self, state: RSSMState, embed: Tensor, action: Tensor, reset: Tensor, uniform: Tensor
    ) -> RSSMState:
        """One posterior step of N episodes: embed `[N, E]`, action `[N, A]`, reset `[N]` in {0, 1},
        uniform `[N, S]`; no gradient."""
        post = self.observe(embed[None], action[None], reset[None], state, uniform[None])
        return RSSMState(post.h[0], post.z[0])

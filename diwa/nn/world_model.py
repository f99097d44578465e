"""World model: encoder, RSSM and decoder with the training loss of method section 1.6."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from diwa.config import WorldModelConfig
from diwa.nn.encoders import StateCodec, StateDecoder, StateEncoder
from diwa.nn.rssm import RSSM, RSSMState
from diwa.ops import balanced_kl

ACTION_DIM = 7


class WorldModelLoss(NamedTuple):
    """Scalars of one batch and the state carried to the next one (detached)."""

    total: Tensor
    reconstruction: Tensor
    kl: Tensor
    state: RSSMState


class WorldModel(nn.Module):
    """State-observation world model.

    Args:
        config: sizes and loss weights.
    """

    column_weight: Tensor

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        self.config = config
        self.codec = StateCodec(config.observe_blocks)
        self.encoder = StateEncoder(self.codec.size, config.mlp_dim, config.embed_dim)
        self.rssm = RSSM(
            ACTION_DIM,
            config.embed_dim,
            config.deter_dim,
            config.stoch_groups,
            config.stoch_classes,
            config.hidden_dim,
            config.unimix,
        )
        self.decoder = StateDecoder(self.rssm.feature_dim, config.mlp_dim, self.codec.size)
        weights = self.codec.column_weights(config.detail_weight)
        self.register_buffer("column_weight", weights, persistent=False)

    @property
    def feature_dim(self) -> int:
        """F."""
        return self.rssm.feature_dim

    def observation(self, robot_obs: Tensor, scene_obs: Tensor) -> dict[str, Tensor]:
        """Simulator observations `[..., 15]`, `[..., 24]` -> the encoder's observation dict."""
        return {"state": self.codec(robot_obs, scene_obs)}

    def uniform(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Uniforms `[*shape, S]` on the model's device for observe and imagine."""
        device = self.codec.mean.device
        return torch.rand(
            *shape, self.rssm.stoch_groups, generator=generator, device=generator.device
        ).to(device)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.codec.mean.device.type, torch.bfloat16)

    def loss(
        self,
        obs: dict[str, Tensor],
        action: Tensor,
        reset: Tensor,
        state: RSSMState,
        uniform: Tensor,
    ) -> WorldModelLoss:
        """Reconstruction plus balanced KL of one batch of streams, averaged over T and B.

        Matrix products are those of `config.precision`.

        Args:
            obs: columns `[T, B, ...]`.
            action: `[T, B, A]` that led to each frame.
            reset: `[T, B]` in {0, 1}.
            state: carried state of B streams.
            uniform: `[T, B, S]`.
        """
        with self._autocast():
            embed = self.encoder(obs)
        # Outside of autocast: the scan itself rounds what it multiplies and keeps h in float32.
        dtype = getattr(torch, self.config.precision)
        post = self.rssm.observe(
            embed.to(state.h.dtype), action, reset, state, uniform, dtype=dtype
        )
        feature = torch.cat([post.h, post.z], dim=-1)
        with self._autocast():
            reconstruction = self.decoder.loss(feature, obs, self.column_weight).mean()
            prior = self.rssm.prior_logits(post.h)
        prior = prior.to(post.logits.dtype)
        kl_loss, kl = balanced_kl(post.logits, prior, self.config.kl_balance)
        total = self.config.state_weight * reconstruction + self.config.kl_weight * kl_loss.mean()
        carried = RSSMState(post.h[-1].detach(), post.z[-1].detach())
        return WorldModelLoss(total, reconstruction.detach(), kl.mean(), carried)

    @torch.no_grad()
    def filter(
        self,
        state: RSSMState,
        obs: dict[str, Tensor],
        action: Tensor,
        reset: Tensor,
        uniform: Tensor,
    ) -> RSSMState:
        """One posterior step for N environments; `reset [N]` in {0, 1}, `uniform [N, S]`."""
        return self.rssm.filter(state, self.encoder(obs), action, reset, uniform)

    @torch.no_grad()
    def encode_episode(
        self, obs: dict[str, Tensor], action: Tensor, reset: Tensor, uniform: Tensor
    ) -> Tensor:
        """Features `[T, B, F]` of whole episodes from the zero state (arguments as in `loss`)."""
        state = self.rssm.initial(action.shape[1])
        post = self.rssm.observe(self.encoder(obs), action, reset, state, uniform)
        return torch.cat([post.h, post.z], dim=-1)

    @torch.no_grad()
    def open_loop(self, state: RSSMState, action: Tensor, uniform: Tensor) -> Tensor:
        """Features `[T, N, F]` of T prior steps under actions `[T, N, A]`, uniforms `[T, N, S]`."""
        features = []
        for a, u in zip(action, uniform, strict=True):
            state = self.rssm.imagine(state, a, u)
            features.append(state.feature)
        return torch.stack(features)

    @torch.no_grad()
    def decode(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[..., F]` -> `robot_obs [..., 15]`, `scene_obs [..., 24]` in physical units."""
        return self.codec.decode(self.decoder(feature)["state"])

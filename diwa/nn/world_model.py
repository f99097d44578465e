"""World model: encoder, RSSM and decoder with the training loss of method section 1.6.

What is observed and predicted depends on encoder and decoder only (`encoders` for the state,
`pixels` for pictures); everything else is the same.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from diwa.config import WorldModelConfig
from diwa.nn.encoders import StateCodec, StateDecoder, StateEncoder
from diwa.nn.pixels import PixelDecoder, PixelEncoder
from diwa.nn.rssm import RSSM, RSSMState
from diwa.ops import balanced_kl

ACTION_DIM = 7


class WorldModelLoss(NamedTuple):
    """Scalars of one batch and the state carried to the next one (detached).

    `reconstruction` is the error of the state vector, of the pictures where only they are
    predicted; `parts` holds the errors of all that is predicted.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor
    state: RSSMState
    parts: dict[str, Tensor]


class WorldModel(nn.Module):
    """World model; its observation decides what encoder and decoder are.

    Args:
        config: sizes and loss weights.

    Attributes:
        inputs: names of the observations that `observation` needs.
        cameras: those of them that are pictures.
        predicts_state: `decode` works.
    """

    column_weight: Tensor

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        self.config = config
        self.codec = StateCodec(config.observe_blocks)
        self.encoder: StateEncoder | PixelEncoder
        if config.observation == "state":
            self.encoder = StateEncoder(self.codec.size, config.mlp_dim, config.embed_dim)
            self.cameras: tuple[str, ...] = ()
            self.inputs: tuple[str, ...] = ("robot_obs", "scene_obs")
        else:
            self.encoder = PixelEncoder(config)
            self.cameras = self.encoder.cameras
            self.inputs = ("robot_obs", *self.cameras)
        self.predicts_state = config.observation != "vision"
        self.rssm = RSSM(
            ACTION_DIM,
            self.encoder.embed_dim,
            config.deter_dim,
            config.stoch_groups,
            config.stoch_classes,
            config.hidden_dim,
            config.unimix,
        )
        self.decoder: StateDecoder | PixelDecoder
        if config.observation == "state":
            self.decoder = StateDecoder(self.rssm.feature_dim, config.mlp_dim, self.codec.size)
        else:
            self.decoder = PixelDecoder(config, self.rssm.feature_dim, self.codec.size)
        weights = self.codec.column_weights(config.detail_weight)
        self.register_buffer("column_weight", weights, persistent=False)

    @property
    def feature_dim(self) -> int:
        """F."""
        return self.rssm.feature_dim

    def observation(
        self, robot_obs: Tensor, scene_obs: Tensor | None = None, **frames: Tensor
    ) -> dict[str, Tensor]:
        """Observations of a simulator or robot -> the encoder's observation dict.

        Args:
            robot_obs: `[..., 15]`.
            scene_obs: `[..., 24]`; a model that sees pictures does not look at it.
            frames: uint8 `[..., size, size, 3]` of each of `cameras`.

        Raises:
            ValueError: one of `inputs` is missing, or a picture has another size.
        """
        if not self.cameras:
            if scene_obs is None:
                raise ValueError("a state world model needs scene_obs")
            return {"state": self.codec(robot_obs, scene_obs)}
        size = self.config.image_size
        obs = {"state": self.codec.proprio(robot_obs)}
        for camera in self.cameras:
            if camera not in frames:
                raise ValueError(f"the world model sees pictures; {camera} is missing")
            if frames[camera].shape[-3:] != (size, size, 3):
                found = tuple(frames[camera].shape[-3:])
                raise ValueError(f"{camera} is {found}, the world model sees {(size, size, 3)}")
            obs[camera] = frames[camera]
        return obs

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
            obs: columns `[T, B, ...]`: `state` (all of it) and the pictures of the cameras.
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
        c = self.config
        with self._autocast():
            parts = self.decoder.losses(feature, obs, self.column_weight)
            prior = self.rssm.prior_logits(post.h)
        prior = prior.to(post.logits.dtype)
        kl_loss, kl = balanced_kl(post.logits, prior, c.kl_balance)
        total = c.kl_weight * kl_loss.mean()
        for name, weight in (("state", c.state_weight), ("pictures", c.image_weight)):
            if name in parts:
                total = weight * parts[name] + total
        carried = RSSMState(post.h[-1].detach(), post.z[-1].detach())
        parts = {name: part.detach() for name, part in parts.items()}
        shown = parts["state"] if "state" in parts else parts["pictures"]
        return WorldModelLoss(total, shown, kl.mean(), carried, parts)

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
    def decode_frames(self, feature: Tensor) -> dict[str, Tensor]:
        """Features `[..., F]` -> uint8 frames `[..., size, size, 3]` of each camera."""
        return self.decoder.frames(feature) if isinstance(self.decoder, PixelDecoder) else {}

    @torch.no_grad()
    def decode(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[..., F]` -> `robot_obs [..., 15]`, `scene_obs [..., 24]` in physical units.

        Pictures are never decoded here. Raises ValueError unless `predicts_state`.
        """
        return self.codec.decode(self.decoder.state(feature))

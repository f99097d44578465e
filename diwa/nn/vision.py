"""Two-camera world model of LUMOS and DiWA: CNN encoder, RSSM, CNN decoder (section 1.2 to 1.4).

Pictures are `[..., 3, 64, 64]` float in [-1, 1] (`picture_input`), proprioception is normalised by
the caller. The state model in `world_model` and this one share the RSSM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diwa.nn.rssm import RSSM, RSSMState

CAMERAS = ("rgb_static", "rgb_gripper")
DECODER_KERNELS = (5, 5, 6, 6)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a `VisionWorldModel`; the defaults are the paper's."""

    depth: int = 48
    """Channels of the first convolution."""
    cameras: int = 2
    """Static camera only (1), or static and gripper camera (2)."""
    proprio_dim: int = 18
    """Size of the proprioception that is appended to the embedding."""
    action_dim: int = 7
    """A; 35 where a transition is a whole chunk of five actions."""
    deter_dim: int = 1024
    stoch_groups: int = 32
    stoch_classes: int = 32
    hidden_dim: int = 1000

    @property
    def image_dim(self) -> int:
        """Size of the fused picture embedding."""
        return 32 * self.depth

    @property
    def embed_dim(self) -> int:
        """E."""
        return self.image_dim + self.proprio_dim


def picture_input(frames: Tensor) -> Tensor:
    """Frames `[..., h, w, 3]` uint8 -> `[..., 3, h, w]` float32 in [-1, 1] (section 1.1)."""
    return frames.movedim(-1, -3).float() / 127.5 - 1


class VisionEncoder(nn.Module):
    """Pictures of one or two cameras and proprioception -> embedding `[..., E]`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        channels = [3] + [config.depth * 2**i for i in range(4)]
        self.cameras = CAMERAS[: config.cameras]
        for camera in self.cameras:
            layers: list[nn.Module] = []
            for a, b in zip(channels[:-1], channels[1:], strict=True):
                layers += [nn.Conv2d(a, b, 4, stride=2), nn.ELU()]
            self.add_module(camera, nn.Sequential(*layers, nn.Flatten()))
        if config.cameras == 2:
            size = config.image_dim
            self.fuse = nn.Sequential(
                nn.Linear(2 * size, size), nn.LayerNorm(size, eps=1e-3), nn.ELU()
            )

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        """`obs`: `rgb_static` (and `rgb_gripper`) `[..., 3, 64, 64]`, `proprio [..., P]`."""
        leading = obs[CAMERAS[0]].shape[:-3]
        parts = [self.get_submodule(c)(obs[c].flatten(0, -4)) for c in self.cameras]
        image = self.fuse(torch.cat(parts, -1)) if len(parts) == 2 else parts[0]
        return torch.cat([image.unflatten(0, leading), obs["proprio"]], -1)


class VisionDecoder(nn.Module):
    """Features `[..., F]` -> pictures `[..., 3, 64, 64]` of each camera."""

    def __init__(self, config: VisionConfig, feature_dim: int) -> None:
        super().__init__()
        size, depth = config.image_dim, config.depth
        channels = (size, 4 * depth, 2 * depth, depth, 3)
        self.cameras = CAMERAS[: config.cameras]
        for camera in self.cameras:
            layers: list[nn.Module] = [
                nn.Linear(feature_dim, size),
                nn.Unflatten(-1, (size, 1, 1)),
            ]
            for i, kernel in enumerate(DECODER_KERNELS):
                layers += [nn.ConvTranspose2d(channels[i], channels[i + 1], kernel, stride=2)]
                layers += [nn.ELU()] if i < 3 else []
            self.add_module(camera, nn.Sequential(*layers))

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        """Reconstructions in [-1, 1] up to the error of the model."""
        leading, flat = feature.shape[:-1], feature.flatten(0, -2)
        return {c: self.get_submodule(c)(flat).unflatten(0, leading) for c in self.cameras}


class VisionWorldModel(nn.Module):
    """CNN encoder, RSSM and CNN decoder.

    Args:
        config: sizes.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VisionEncoder(config)
        self.rssm = RSSM(
            config.action_dim,
            config.embed_dim,
            config.deter_dim,
            config.stoch_groups,
            config.stoch_classes,
            config.hidden_dim,
        )
        self.decoder = VisionDecoder(config, self.rssm.feature_dim)
        for module in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def feature_dim(self) -> int:
        """F."""
        return self.rssm.feature_dim

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

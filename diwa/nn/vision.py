"""CNN encoder and decoder of LUMOS and DiWA (method section 1.2 to 1.4), for 64 or 224 pixels.

Pictures are `[..., 3, size, size]` float in [-1, 1] (`picture_input`), proprioception is normalised
by the caller. `VisionWorldModel` is the converted form of an original's checkpoint; the world model
of diwa's own phases is in `world_model` and sees through `pixels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diwa.nn.rssm import RSSM, RSSMState

CAMERAS = ("rgb_static", "rgb_gripper")


@dataclass(frozen=True)
class Geometry:
    """Layers of the CNNs for one picture size; channels are multiples of the depth.

    Attributes:
        channels, padding: of the encoder's convolutions, kernel 4, stride 2.
        up_channels: of the decoder's transposed convolutions, before the three colours.
        up: kernel, stride and padding of each of them.
    """

    channels: tuple[int, ...]
    padding: tuple[int, ...]
    up_channels: tuple[int, ...]
    up: tuple[tuple[int, int, int], ...]


GEOMETRY = {
    64: Geometry(
        (1, 2, 4, 8), (0, 0, 0, 0), (4, 2, 1), ((5, 2, 0), (5, 2, 0), (6, 2, 0), (6, 2, 0))
    ),
    224: Geometry(
        (1, 2, 4, 8, 16, 32),
        (0, 0, 0, 0, 1, 0),
        (16, 8, 8, 4, 4),
        ((7, 1, 0), *((4, 2, 1),) * 5),
    ),
}
"""Picture size -> layers; the encoder of either ends in 2 x 2 places."""


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
    image_size: int = 64
    """Edge of the pictures, 64 or 224."""

    @property
    def image_dim(self) -> int:
        """Size of the fused picture embedding."""
        return 4 * GEOMETRY[self.image_size].channels[-1] * self.depth

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
        geometry = GEOMETRY[config.image_size]
        channels = [3, *(config.depth * c for c in geometry.channels)]
        self.cameras = CAMERAS[: config.cameras]
        for camera in self.cameras:
            layers: list[nn.Module] = []
            for i, padding in enumerate(geometry.padding):
                layers += [nn.Conv2d(channels[i], channels[i + 1], 4, 2, padding), nn.ELU()]
            self.add_module(camera, nn.Sequential(*layers, nn.Flatten()))
        if config.cameras == 2:
            size = config.image_dim
            self.fuse = nn.Sequential(
                nn.Linear(2 * size, size), nn.LayerNorm(size, eps=1e-3), nn.ELU()
            )

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        """`obs`: `rgb_static` (and `rgb_gripper`) `[..., 3, h, w]`, `proprio [..., P]`."""
        leading = obs[CAMERAS[0]].shape[:-3]
        image = self.pictures([obs[c].flatten(0, -4) for c in self.cameras])
        return torch.cat([image.unflatten(0, leading), obs["proprio"]], -1)

    def pictures(self, pictures: list[Tensor]) -> Tensor:
        """Pictures `[n, 3, h, w]` of each camera -> their embedding `[n, image_dim]`."""
        parts = [self.get_submodule(c)(p) for c, p in zip(self.cameras, pictures, strict=True)]
        return self.fuse(torch.cat(parts, -1)) if len(parts) == 2 else parts[0]


class VisionDecoder(nn.Module):
    """Features `[..., F]` -> pictures `[..., 3, h, w]` of each camera."""

    def __init__(self, config: VisionConfig, feature_dim: int) -> None:
        super().__init__()
        size, geometry = config.image_dim, GEOMETRY[config.image_size]
        channels = (size, *(config.depth * c for c in geometry.up_channels), 3)
        self.cameras = CAMERAS[: config.cameras]
        for camera in self.cameras:
            layers: list[nn.Module] = [
                nn.Linear(feature_dim, size),
                nn.Unflatten(-1, (size, 1, 1)),
            ]
            for i, up in enumerate(geometry.up):
                layers += [nn.ConvTranspose2d(channels[i], channels[i + 1], *up), nn.ELU()]
            self.add_module(camera, nn.Sequential(*layers[:-1]))

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        """Reconstructions in [-1, 1] up to the error of the model."""
        leading, flat = feature.shape[:-1], feature.flatten(0, -2)
        return {c: self.get_submodule(c)(flat).unflatten(0, leading) for c in self.cameras}


def xavier(*modules: nn.Module) -> None:
    """Initialise convolutions and linear layers (section 1.5)."""
    for module in (child for m in modules for child in m.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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
        xavier(self.encoder, self.decoder)

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

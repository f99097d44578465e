"""Pictures in and out of the world model: the vision and the hybrid observation.

Both see the pictures of two cameras and the robot's own state (the leading columns of the state
vector). `vision` reconstructs the pictures, `hybrid` the whole state vector as well, so that the
scene can be read off a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diwa import parallel
from diwa.config import WorldModelConfig
from diwa.nn.encoders import PROPRIO_DIM, StateDecoder
from diwa.nn.vision import VisionConfig, VisionDecoder, VisionEncoder, picture_input, xavier

PIECE = 512
"""Frames encoded or decoded at once where no gradient is needed."""


def vision_config(config: WorldModelConfig) -> VisionConfig:
    """Sizes of the CNNs."""
    return VisionConfig(
        depth=config.cnn_depth, proprio_dim=PROPRIO_DIM, image_size=config.image_size
    )


class PixelEncoder(VisionEncoder):
    """Observation dict -> embedding `[..., E]`.

    The dict holds `state [..., >= 18]`, of which the leading `PROPRIO_DIM` columns are seen, and
    for each camera uint8 frames `[..., size, size, 3]`, which may still be in the CPU's memory; or
    `embed`, what this encoder made of them before.
    """

    def __init__(self, config: WorldModelConfig) -> None:
        cnn = vision_config(config)
        super().__init__(cnn)
        self.embed_dim = cnn.embed_dim
        xavier(self)

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        if "embed" in obs:
            return obs["embed"]
        proprio = obs["state"][..., :PROPRIO_DIM]
        frames = [obs[camera].flatten(0, -4) for camera in self.cameras]
        piece = len(frames[0]) if torch.is_grad_enabled() else PIECE
        images = [
            self.pictures([picture_input(f[i : i + piece].to(proprio.device)) for f in frames])
            for i in range(0, len(frames[0]), piece)
        ]
        return torch.cat([torch.cat(images).unflatten(0, proprio.shape[:-1]), proprio], -1)


class PixelDecoder(VisionDecoder):
    """Features `[..., F]` -> pictures `[..., 3, size, size]` and, for `hybrid`, the state vector.

    Args:
        config: sizes.
        feature_dim: F.
        state_dim: O, columns of the state vector.
    """

    def __init__(self, config: WorldModelConfig, feature_dim: int, state_dim: int) -> None:
        super().__init__(vision_config(config), feature_dim)
        xavier(self)
        self.stride = config.image_stride
        self._turns: dict[tuple[int, int, torch.device], tuple[Tensor, float]] = {}
        self.scene: StateDecoder | None = None
        if config.observation == "hybrid":
            self.scene = StateDecoder(feature_dim, config.mlp_dim, state_dim)

    def state(self, feature: Tensor) -> Tensor:
        """Standardised state `[..., O]`; the CNN is not run.

        Raises:
            ValueError: the model predicts pictures only.
        """
        if self.scene is None:
            raise ValueError(
                "a vision world model predicts no scene state; train one with --observation hybrid"
            )
        return self.scene.state(feature)

    def losses(self, feature: Tensor, obs: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """Means over T and B of half the squared errors: `pictures` and, if predicted, `state`.

        Args:
            feature: `[T, B, F]`.
            obs: as for `PixelEncoder`, `state [T, B, O]`.
            weight: `[O]` of the columns of the state.
        """
        rows, count = self._reconstructed(feature.shape[0], feature.shape[1], feature.device)
        guess = super().forward(feature.flatten(0, 1)[rows])
        pictures = feature.new_zeros(())
        for camera, picture in guess.items():
            real = picture_input(obs[camera].flatten(0, 1)[rows])
            pictures = pictures + 0.5 * (picture - real).square().sum() / count
        losses = {"pictures": pictures}
        if self.scene is not None:
            losses["state"] = self.scene.loss(feature, obs, weight).mean()
        return losses

    def _reconstructed(
        self, frames: int, streams: int, device: torch.device
    ) -> tuple[Tensor, float]:
        """Rows of `[T * B]` whose pictures are reconstructed, B streams of this process, and their
        mean number over the processes, so that the mean of all losses is that of one process.

        Kept, because a captured step can neither count them nor copy them to the device.
        """
        key = (frames, streams, device)
        if key not in self._turns:
            everyone = streams * parallel.world_size()
            # Neighbouring frames look alike. Streams take turns, so that every frame has its epoch.
            turn = torch.arange(frames)[:, None] + torch.arange(everyone)
            chosen = turn % self.stride == 0
            rows = chosen[:, parallel.share(everyone)].flatten().nonzero()[:, 0]
            self._turns[key] = rows.to(device), int(chosen.sum()) / parallel.world_size()
        return self._turns[key]

    @torch.no_grad()
    def frames(self, feature: Tensor) -> dict[str, Tensor]:
        """Features `[..., F]` -> uint8 frames `[..., size, size, 3]` of each camera."""
        pieces = [super(PixelDecoder, self).forward(f) for f in feature.flatten(0, -2).split(PIECE)]
        out = {}
        for camera in self.cameras:
            picture = torch.cat([p[camera] for p in pieces]).movedim(-3, -1)
            scaled = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            out[camera] = scaled.unflatten(0, feature.shape[:-1])
        return out

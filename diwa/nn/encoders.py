"""Observations in and out of the world model: state codec, MLP encoder and decoder.

An encoder maps a dict of observation tensors `[..., *]` to an embedding `[..., E]`; a decoder maps
features `[..., F]` back. The state pair below is the first of that interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

ROBOT_DIM, SCENE_DIM = 15, 24
PROPRIO_DIM = 18
"""Leading columns of a `StateCodec` vector, the robot's own."""

FIXTURES = ("slider", "drawer", "button", "switch", "lightbulb", "led")
_BLOCKS = ("red_block", "blue_block", "pink_block")


def rot6d(euler: Tensor) -> Tensor:
    """Euler XYZ `[..., 3]` (rad) -> first two rows of R_x R_y R_z, `[..., 6]` (section 1.1)."""
    a, b, c = euler.unbind(-1)
    ca, sa, cb, sb, cc, sc = a.cos(), a.sin(), b.cos(), b.sin(), c.cos(), c.sin()
    rows = (cb * cc, -cb * sc, sb, ca * sc + sa * sb * cc, ca * cc - sa * sb * sc, -sa * cb)
    return torch.stack(rows, dim=-1)


def euler_from_rot6d(r: Tensor) -> Tensor:
    """Inverse of `rot6d` after Gram-Schmidt; `[..., 6]` -> Euler XYZ `[..., 3]` (rad)."""
    x = nn.functional.normalize(r[..., :3], dim=-1)
    y = nn.functional.normalize(r[..., 3:] - (x * r[..., 3:]).sum(-1, keepdim=True) * x, dim=-1)
    z = torch.linalg.cross(x, y, dim=-1)
    b = torch.asin(x[..., 2].clamp(-1, 1))
    a, c = torch.atan2(-y[..., 2], z[..., 2]), torch.atan2(-x[..., 1], x[..., 0])
    return torch.stack([a, b, c], dim=-1)


class StateCodec(nn.Module):
    """Robot and scene observations <-> one standardised vector `[..., O]`.

    Layout: tcp position 3, rotation 6 (rot6d), gripper width 1, arm joints 7, gripper command 1,
    fixtures 6 (slider, drawer, button, switch, bulb, LED), then optionally three blocks of 3 + 6.
    The standardisation is stored in buffers, so a checkpoint carries it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, observe_blocks: bool = False) -> None:
        super().__init__()
        self.observe_blocks = observe_blocks
        self.size = 24 + 27 * observe_blocks
        self.register_buffer("mean", torch.zeros(self.size))
        self.register_buffer("std", torch.ones(self.size))

    @staticmethod
    def _robot(robot_obs: Tensor) -> list[Tensor]:
        return [robot_obs[..., 0:3], rot6d(robot_obs[..., 3:6]), robot_obs[..., 6:15]]

    def _raw(self, robot_obs: Tensor, scene_obs: Tensor) -> Tensor:
        parts = [*self._robot(robot_obs), scene_obs[..., 0:6]]
        if self.observe_blocks:
            for first in (6, 12, 18):
                parts += [
                    scene_obs[..., first : first + 3],
                    rot6d(scene_obs[..., first + 3 : first + 6]),
                ]
        return torch.cat(parts, dim=-1)

    def fit(self, robot_obs: Tensor, scene_obs: Tensor) -> None:
        """Set mean and deviation from data `[n, 15]`, `[n, 24]`; deviations have floors."""
        raw = self._raw(robot_obs.double(), scene_obs.double())
        floor = [0.05] * 3 + [0.1] * 6 + [0.02] + [0.1] * 7 + [0.5]
        floor += [0.05, 0.05, 0.004, 0.02, 0.25, 0.25] + ([0.05] * 3 + [0.2] * 6) * (
            3 * self.observe_blocks
        )
        self.mean.copy_(raw.mean(0))
        self.std.copy_(torch.maximum(raw.std(0), torch.tensor(floor, dtype=raw.dtype)))

    def forward(self, robot_obs: Tensor, scene_obs: Tensor) -> Tensor:
        """`[..., 15]`, `[..., 24]` (metres, radians) -> standardised `[..., O]`."""
        return (self._raw(robot_obs, scene_obs) - self.mean) / self.std

    def proprio(self, robot_obs: Tensor) -> Tensor:
        """`[..., 15]` -> the leading columns alone, standardised `[..., PROPRIO_DIM]`."""
        raw = torch.cat(self._robot(robot_obs), dim=-1)
        return (raw - self.mean[:PROPRIO_DIM]) / self.std[:PROPRIO_DIM]

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised `[..., O]` -> `robot_obs [..., 15]`, `scene_obs [..., 24]` (m, rad).

        Lights come back as numbers near 0 and 1; unobserved blocks come back as zeros.
        """
        raw = x * self.std + self.mean
        robot = torch.cat([raw[..., 0:3], euler_from_rot6d(raw[..., 3:9]), raw[..., 9:18]], dim=-1)
        scene = raw.new_zeros(*raw.shape[:-1], SCENE_DIM)
        scene[..., 0:6] = raw[..., 18:24]
        if self.observe_blocks:
            for i, first in enumerate((6, 12, 18)):
                block = raw[..., 24 + 9 * i : 33 + 9 * i]
                scene[..., first : first + 3] = block[..., :3]
                scene[..., first + 3 : first + 6] = euler_from_rot6d(block[..., 3:])
        return robot, scene

    def column_names(self) -> list[str]:
        """Name of every column of the vector."""
        names = [f"tcp_{axis}" for axis in "xyz"] + [f"rotation_{i}" for i in range(6)]
        names += ["gripper_width", *(f"arm_joint_{i}" for i in range(7)), "gripper_command"]
        names += list(FIXTURES)
        if self.observe_blocks:
            for block in _BLOCKS:
                names += [f"{block}_{axis}" for axis in "xyz"]
                names += [f"{block}_rotation_{i}" for i in range(6)]
        return names

    def column_weights(self, detail: float) -> Tensor:
        """Weights `[O]` of the reconstruction: `detail` for tool position and fixtures, else 1."""
        weights = torch.ones(self.size)
        weights[0:3] = detail
        weights[18:24] = detail
        return weights

    def quantities(self) -> dict[str, tuple[slice, str]]:
        """Reported quantities: name -> (columns of the vector, unit)."""
        out = {
            "tcp_position": (slice(0, 3), "m"),
            "gripper_width": (slice(9, 10), "m"),
            "arm_joints": (slice(10, 17), "rad"),
        }
        for i, name in enumerate(FIXTURES):
            out[name] = (slice(18 + i, 19 + i), "m" if i < 4 else "state")
        if self.observe_blocks:
            for i, name in enumerate(_BLOCKS):
                out[name] = (slice(24 + 9 * i, 27 + 9 * i), "m")
        return out


def mlp(sizes: Sequence[int], *, norm: bool = True) -> nn.Sequential:
    """Linear (- LayerNorm) - ELU blocks between consecutive sizes; the last Linear is bare."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers.append(nn.Linear(a, b))
        if i < len(sizes) - 2:
            layers += [nn.LayerNorm(b, eps=1e-3), nn.ELU()] if norm else [nn.ELU()]
    return nn.Sequential(*layers)


class StateEncoder(nn.Module):
    """Observation dict with `state [..., O]` -> embedding `[..., E]`."""

    def __init__(self, state_dim: int, width: int, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.net = mlp([state_dim, width, embed_dim])

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        return nn.functional.elu(self.net(obs["state"]))


class StateDecoder(nn.Module):
    """Features `[..., F]` -> reconstruction dict with `state [..., O]` (standardised)."""

    def __init__(self, feature_dim: int, width: int, state_dim: int) -> None:
        super().__init__()
        self.net = mlp([feature_dim, width, width, state_dim])

    def forward(self, feature: Tensor) -> dict[str, Tensor]:
        return {"state": self.net(feature)}

    def state(self, feature: Tensor) -> Tensor:
        """Standardised state `[..., O]` alone."""
        return self.net(feature)

    def losses(self, feature: Tensor, obs: dict[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
        """Mean over T and B of `loss`, under the name `state`."""
        return {"state": self.loss(feature, obs, weight).mean()}

    def loss(self, feature: Tensor, obs: dict[str, Tensor], weight: Tensor) -> Tensor:
        """Half the squared error, weighted by `weight [O]` and summed over O, `[...]`.

        A Gaussian of variance 1 / weight per column (section 1.6).
        """
        return 0.5 * ((self(feature)["state"] - obs["state"]).square() * weight).sum(-1)


def observed(
    obs: Mapping[str, Any], names: Sequence[str], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Tensors of the named observations: float32, pictures uint8 (copied).

    Raises:
        ValueError: there is no such observation.
    """
    out = {}
    for name in names:
        if name not in obs:
            raise ValueError(f"the world model sees {name}, which is not observed here")
        array = np.asarray(obs[name])
        picture = array.dtype == np.uint8
        out[name] = (
            torch.from_numpy(array.copy()).to(device) if picture else to_tensor(array, device)
        )
    return out


def to_tensor(array: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """float32 tensor of an array (copied; memory-mapped arrays are read-only)."""
    return torch.from_numpy(np.array(array, dtype=np.float32)).to(device)

"""The imagined environment: N dreams of a frozen world model, stepped in action chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from diwa.data.store import NEUTRAL_ACTION
from diwa.envs.tasks import RULES, check_task
from diwa.nn.heads import RewardClassifier
from diwa.nn.rssm import RSSMState
from diwa.nn.world_model import WorldModel
from diwa.ops import onehot_st, registry
from diwa.ops.reference_rssm import rssm_features


class SuccessFunction(Protocol):
    """Judges latents: features `[..., F]`, start scenes `[..., 24]` -> bool `[...]`."""

    def __call__(self, feature: Tensor, scene_start: Tensor) -> Tensor: ...


class ClassifierSuccess:
    """Success classifier on the latent (method section 4.5)."""

    def __init__(self, model: RewardClassifier, threshold: float) -> None:
        self.model, self.threshold = model, threshold

    def __call__(self, feature: Tensor, scene_start: Tensor) -> Tensor:
        """See `SuccessFunction`; the start scene is not used."""
        return self.model.success_probability(feature) > self.threshold


class DecoderSuccess:
    """The task's own rule on the decoded scene state (the hybrid variant, section 4.5)."""

    def __init__(self, world_model: WorldModel, task: str) -> None:
        self.world_model, self.rule = world_model, RULES[check_task(task)]

    def __call__(self, feature: Tensor, scene_start: Tensor) -> Tensor:
        """See `SuccessFunction`."""
        index, sign, change = self.rule
        _, scene = self.world_model.decode(feature)
        return sign * (scene[..., index] - scene_start[..., index]) > change


class Dream:
    """N parallel imagined episodes; mirrors a vector environment but keeps everything in tensors.

    Starts are observations encoded once, from the zero state; a reset only draws one of them and
    samples its posterior.

    Args:
        world_model: frozen.
        success: judges latents.
        robot_obs: `[P, 15]` start observations.
        scene_obs: `[P, 24]`.
        n: dreams N.
        max_episode_steps: low-level steps after which an episode is truncated.
        per_step_reward: judge every latent of a chunk instead of only the last.
        dtype: float32 or bfloat16, of the packed weights that imagine (`RSSM.freeze`).
        frames: uint8 `[P, h, w, 3]` of each camera of the world model; they are encoded here and
            no picture is made later.

    Attributes:
        state: latents of the N dreams. z_idx: int64 `[N, S]`, their classes.
        scene_start: `[N, 24]`, scene that each episode began in.
        elapsed: `[N]`, low-level steps since then.
    """

    def __init__(
        self,
        world_model: WorldModel,
        success: SuccessFunction,
        robot_obs: Tensor,
        scene_obs: Tensor,
        n: int,
        max_episode_steps: int,
        per_step_reward: bool = True,
        dtype: torch.dtype = torch.float32,
        frames: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.world_model, self.success, self.n = world_model, success, n
        self.max_episode_steps, self.per_step_reward = max_episode_steps, per_step_reward
        self.pool_scene = scene_obs
        self._encode_starts(world_model.observation(robot_obs, scene_obs, **(frames or {})))
        self.frozen = world_model.rssm.freeze(dtype)
        self.clear()

    @torch.no_grad()
    def _encode_starts(self, obs: dict[str, Tensor]) -> None:
        rssm = self.world_model.rssm
        embed = self.world_model.encoder(obs)
        count = len(embed)
        neutral = embed.new_tensor(NEUTRAL_ACTION).expand(1, count, 7)
        post = rssm.observe(
            embed[None],
            neutral,
            embed.new_ones(1, count),
            rssm.initial(count),
            embed.new_zeros(1, count, rssm.stoch_groups),
        )
        self.pool_h, self.pool_logits = post.h[0], post.logits[0]

    @torch.no_grad()
    def clear(self) -> None:
        """Put every dream at the first start, in its likeliest classes.

        Nothing of what was dreamed before is left, which a captured rollout must not read.
        """
        h = self.pool_h[:1].repeat(self.n, 1)
        self.z_idx = self.pool_logits[:1].argmax(-1).repeat(self.n, 1)
        self.state = self._split(rssm_features(h, self.z_idx, self.world_model.rssm.stoch_classes))
        self.scene_start = self.pool_scene[:1].repeat(self.n, 1)
        self.elapsed = self.pool_scene.new_zeros(self.n)

    @torch.no_grad()
    def reset(self, mask: Tensor, draw: Tensor, uniform: Tensor) -> None:
        """Start new episodes where `mask [N]` is set.

        Args:
            mask: bool.
            draw: `[N]` uniforms in [0, 1) that choose the start.
            uniform: `[N, S]` of the posterior sample.
        """
        index = (draw * len(self.pool_h)).long()
        rssm = self.world_model.rssm
        z = onehot_st(self.pool_logits[index], uniform, unimix=rssm.unimix)
        keep = mask[:, None]
        self.state = RSSMState(
            torch.where(keep, self.pool_h[index], self.state.h),
            torch.where(keep, z, self.state.z),
        )
        self.z_idx = torch.where(keep, self._classes(z), self.z_idx)
        self.scene_start = torch.where(keep, self.pool_scene[index], self.scene_start)
        self.elapsed = torch.where(mask, torch.zeros_like(self.elapsed), self.elapsed)

    @torch.no_grad()
    def step(self, action: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Imagine one chunk.

        Args:
            action: `[N, L, A]` as the simulator would take them.
            uniform: `[L, N, S]`.

        Returns:
            feature `[N, F]` after the chunk (before any reset), terminated (success) and truncated,
            both bool `[N]`.
        """
        terminated = torch.zeros(self.n, dtype=torch.bool, device=action.device)
        states = self._imagine(action.transpose(0, 1), uniform)
        for feature in states if self.per_step_reward else states[-1:]:
            terminated |= self.success(feature, self.scene_start)
        self.elapsed = self.elapsed + action.shape[1]
        truncated = (self.elapsed >= self.max_episode_steps) & ~terminated
        return states[-1], terminated, truncated

    def _imagine(self, action: Tensor, uniform: Tensor) -> Tensor:
        """Features `[L, N, F]` of prior steps under actions `[L, N, A]`; sets the state."""
        if self._packed():
            _, z_idx, features = self.frozen.imagine(
                self.state.h, self.z_idx, action, uniform, return_features=True
            )
            assert features is not None
            self.state, self.z_idx = self._split(features[-1]), z_idx[-1]
            return features
        steps = []
        for a, u in zip(action, uniform, strict=True):
            self.state = self.world_model.rssm.imagine(self.state, a, u)
            steps.append(self.state.feature)
        self.z_idx = self._classes(self.state.z)
        return torch.stack(steps)

    def _split(self, feature: Tensor) -> RSSMState:
        rssm = self.world_model.rssm
        return RSSMState(*feature.split([rssm.deter_dim, rssm.stoch_dim], -1))

    def _classes(self, z: Tensor) -> Tensor:
        """Class indices `[N, S]` of one-hot z `[N, Z]`; -1 for NaN, as the operator has it."""
        rssm = self.world_model.rssm
        z = z.unflatten(-1, (rssm.stoch_groups, rssm.stoch_classes))
        return z.argmax(-1).masked_fill(z.isnan().any(-1), -1)

    def _packed(self) -> bool:
        """Whether an operator does these steps better than the eager ones: the native one on a CPU,
        the kernels of `rssm_imagine_gpu` on a GPU."""
        h = self.state.h
        preferred = {"cpu": "cpu", "cuda": "triton"}.get(h.device.type)
        return h.dtype == torch.float32 and registry.choose("rssm_imagine", h) == preferred

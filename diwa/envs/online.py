"""The simulator behind the interface of a dream: what online fine-tuning acts in."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diwa.data.store import NEUTRAL_ACTION
from diwa.nn.encoders import observed
from diwa.nn.rssm import RSSMState
from diwa.nn.world_model import WorldModel


class OnlineEnv:
    """N simulator episodes seen through the world model's filter; the counterpart of `Dream`.

    Args:
        world_model: frozen, used as a filter only.
        task: skill whose success ends an episode.
        starts: `robot_obs [P, 15]`, `scene_obs [P, 24]`; episodes begin from them in random order.
        n: episodes side by side N, one process each.
        max_episode_steps: steps after which an episode is truncated.
        seed: of the order of the starts.
        simulator: its name.

    Attributes:
        state: filter states of the N episodes.
        steps: simulator steps taken so far, all episodes together.
    """

    def __init__(
        self,
        world_model: WorldModel,
        task: str,
        starts: dict[str, NDArray],
        n: int,
        max_episode_steps: int,
        seed: int,
        simulator: str = "playtable",
    ) -> None:
        from gymnasium.vector import AutoresetMode

        from diwa.envs.queue import queued_envs

        self.world_model, self.n, self.max_episode_steps = world_model, n, max_episode_steps
        rng = np.random.default_rng(seed)
        orders = [rng.integers(len(starts["robot_obs"]), size=10_000).tolist() for _ in range(n)]
        size = world_model.config.picture_size
        self.envs = queued_envs(
            task, starts, orders, max_episode_steps, AutoresetMode.DISABLED, simulator, size
        )
        self.device = world_model.codec.mean.device
        self.state = world_model.rssm.initial(n)
        self.steps = 0

    def close(self) -> None:
        """End the simulator processes."""
        self.envs.close()

    def _observe(
        self, obs: dict[str, NDArray], action: Tensor, reset: Tensor, live: Tensor, uniform: Tensor
    ) -> None:
        """Filter one frame where `live [N]`; the other states stay."""
        model = self.world_model
        seen = model.observation(**observed(obs, model.inputs, self.device))
        new = model.filter(self.state, seen, action, reset, uniform)
        keep = live[:, None]
        self.state = RSSMState(
            torch.where(keep, new.h, self.state.h), torch.where(keep, new.z, self.state.z)
        )

    @torch.no_grad()
    def reset(self, mask: Tensor, draw: Tensor, uniform: Tensor) -> None:
        """Start new episodes where `mask [N]` is set; `uniform [N, S]` samples the posterior.

        `draw` belongs to the interface of `Dream` and is not used: starts come from a queue.
        """
        if not mask.any():
            return
        obs, _ = self.envs.reset(options={"reset_mask": mask.cpu().numpy()})
        neutral = uniform.new_tensor(NEUTRAL_ACTION).expand(self.n, 7)
        self._observe(obs, neutral, torch.ones(self.n, device=self.device), mask, uniform)

    @torch.no_grad()
    def step(self, action: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Execute one chunk. An episode that ends inside it is over: what its simulator still does
        until the chunk's end is neither seen nor counted.

        Args:
            action: `[N, L, A]` as the simulator takes them.
            uniform: `[L, N, S]` of the filter.

        Returns:
            feature `[N, F]` after the chunk, terminated (success) and truncated, both bool `[N]`.
        """
        solved = torch.zeros(self.n, dtype=torch.bool, device=self.device)
        ended = torch.zeros_like(solved)
        none = torch.zeros(self.n, device=self.device)
        for i in range(action.shape[1]):
            live = ~ended
            obs, reward, terminated, truncated, _ = self.envs.step(action[:, i].cpu().numpy())
            self.steps += int(live.sum())
            self._observe(obs, action[:, i], none, live, uniform[i])
            won = torch.from_numpy(np.asarray(reward) > 0).to(self.device)
            solved |= won & live
            ended |= torch.from_numpy(np.asarray(terminated | truncated)).to(self.device)
        return self.state.feature, solved, ended & ~solved

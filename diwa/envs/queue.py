"""A simulator that resets to given starts, one after another."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray

from diwa.envs import SimulatorSpec


class StartQueue(gymnasium.Wrapper):
    """Every reset begins at the next start of a list; the last one repeats.

    Args:
        env: a simulator, or another environment with its reset options.
        starts: `robot_obs [n, 15]`, `scene_obs [n, 24]`.
        order: indices of the starts, in the order in which they are used.
    """

    def __init__(self, env: gymnasium.Env, starts: dict[str, NDArray], order: list[int]) -> None:
        super().__init__(env)
        self.starts, self.order, self.used = starts, order, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset to the next start; `options` are those of the environment."""
        index = self.order[min(self.used, len(self.order) - 1)]
        self.used += 1
        start = {key: self.starts[key][index] for key in ("robot_obs", "scene_obs")}
        obs, info = self.env.reset(seed=seed, options={**(options or {}), **start})
        return obs, {**info, "start_index": index}


def _make(
    spec: SimulatorSpec, task: str, starts: dict[str, NDArray], order: list[int], max_steps: int
) -> StartQueue:
    env = spec.make(task=task, max_episode_steps=max_steps)
    return StartQueue(env, starts, order)


def queued_envs(
    task: str,
    starts: dict[str, NDArray],
    orders: Sequence[list[int]],
    max_steps: int,
    autoreset: AutoresetMode,
    simulator: str = "playtable",
    image_size: int = 0,
) -> AsyncVectorEnv:
    """One simulator process per order of `starts`, see `StartQueue`.

    Args:
        task: skill whose success ends an episode.
        starts: `robot_obs [n, 15]`, `scene_obs [n, 24]`.
        orders: indices of the starts of every process.
        max_steps: steps after which an episode is truncated.
        autoreset: when a process resets by itself.
        simulator: its name.
        image_size: edge of the pictures of both cameras in pixels; 0 renders none.
    """
    # The fork server imports torch and the simulator once, not once per environment.
    modules = ["diwa.envs.queue", "diwa.envs.playtable"]
    if simulator == "calvin":
        modules.append("diwa.envs.calvin_preload")
    multiprocessing.set_forkserver_preload(modules)
    spec = SimulatorSpec(simulator, image_size)
    makers = [partial(_make, spec, task, starts, order, max_steps) for order in orders]
    return AsyncVectorEnv(makers, autoreset_mode=autoreset, context="forkserver")

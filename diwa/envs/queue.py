"""A simulator that resets to given starts, one after another."""

from __future__ import annotations

from typing import Any

import gymnasium
from numpy.typing import NDArray


class StartQueue(gymnasium.Wrapper):
    """Every reset begins at the next start of a list; the last one repeats.

    Args:
        env: a PlayTable or another environment with its reset options.
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

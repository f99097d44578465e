"""Windows of play in which a skill is solved, and in which it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diwa.data.sampler import previous_actions
from diwa.data.store import Episode
from diwa.envs.tasks import RULES, task_success
from diwa.errors import StoreError
from diwa.nn.encoders import to_tensor


class Windows(NamedTuple):
    """Equally long cuts from episodes, time first.

    Attributes:
        robot, scene, action: `[T, n, ...]`; action led to the frame.
        label: `[T, n]` bool, the task is solved relative to the first frame.
        frames: camera -> uint8 `[T, n, h, w, 3]`, of the cameras that were asked for.
    """

    robot: Tensor
    scene: Tensor
    action: Tensor
    label: Tensor
    frames: dict[str, Tensor]


def candidate_windows(
    episodes: list[Episode], task: str, start_value: tuple[float, float], length: int
) -> list[tuple[int, int, bool]]:
    """Places (episode, frame, solved within the window) where the task could begin.

    A frame qualifies if its fixture stands in the range `start_value` of the task's own starts.
    """
    index = RULES[task].index
    places = []
    for i, episode in enumerate(episodes):
        value = episode.scene_obs[:, index]
        fits = (value >= start_value[0] - 1e-3) & (value <= start_value[1] + 1e-3)
        for t in range(0, len(episode) + 2 - length, 4):
            if fits[t]:
                scenes = episode.scene_obs[t : t + length]
                places.append((i, t, bool(task_success(task, scenes[0], scenes).any())))
    return places


def draw_windows(
    episodes: list[Episode],
    task: str,
    start_value: tuple[float, float],
    length: int,
    count: int,
    rng: np.random.Generator,
    *,
    need_both: bool = True,
    cameras: Sequence[str] = (),
) -> Windows:
    """Up to `count` windows, half of them solved; the rest are misses and other behaviour.

    Raises:
        StoreError: the play never solves, or never fails, the task (with `need_both` off: it has
            no window at all).
    """
    places = candidate_windows(episodes, task, start_value, length)
    chosen: list[tuple[int, int]] = []
    for solved in (True, False):
        group = [(i, t) for i, t, s in places if s == solved]
        if not group and (need_both or not places):
            raise StoreError(
                f"the play holds no {'solved' if solved else 'failed'} window of {task}; "
                "collect more play (--collect.play-transitions)"
            )
        take = rng.permutation(len(group))[: count // 2]
        chosen += [group[k] for k in take]
    cut = [(episodes[i], slice(t, t + length)) for i, t in chosen]
    label = np.stack([task_success(task, e.scene_obs[s][0], e.scene_obs[s]) for e, s in cut], 1)
    return Windows(
        torch.stack([to_tensor(e.robot_obs[s]) for e, s in cut], 1),
        torch.stack([to_tensor(e.scene_obs[s]) for e, s in cut], 1),
        torch.stack([to_tensor(previous_actions(e.action)[s]) for e, s in cut], 1),
        torch.from_numpy(label),
        {
            name: torch.from_numpy(np.stack([e.frames[name][s] for e, s in cut], 1))
            for name in cameras
        },
    )


def halves(windows: Windows) -> tuple[Windows, Windows]:
    """Every other window, and the rest; of a single window, that one twice."""
    robot, scene, action, label, frames = windows

    def half(first: int) -> Windows:
        part = slice(first if label.shape[1] > 1 else 0, None, 2)
        rows = {name: v[:, part] for name, v in frames.items()}
        return Windows(robot[:, part], scene[:, part], action[:, part], label[:, part], rows)

    return half(0), half(1)

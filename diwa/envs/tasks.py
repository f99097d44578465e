"""The eight CALVIN scene-D skills and their success rules, written on `scene_obs` alone.

CALVIN's task oracle compares the scene at the start of an episode with the scene now. For these
eight skills it looks at four numbers of `scene_obs` only, so neither a simulator nor contact
information is needed to judge an episode.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

SLIDER, DRAWER, BUTTON, SWITCH, BULB, LED = range(6)
"""Positions in `scene_obs` (24): four joints, two lamps (0/1), then three blocks of six."""


class Rule(NamedTuple):
    """`sign * (scene[index] - scene_start[index]) > change` counts as success."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    sign: int
    change: float


# A lamp is 0 or 1, so any change above one half is the flip 0 -> 1 (or 1 -> 0 with sign -1).
RULES: dict[str, Rule] = {
    "open_drawer": Rule(DRAWER, +1, 0.12),
    "close_drawer": Rule(DRAWER, -1, 0.12),
    "move_slider_left": Rule(SLIDER, +1, 0.15),
    "move_slider_right": Rule(SLIDER, -1, 0.15),
    "turn_on_lightbulb": Rule(BULB, +1, 0.5),
    "turn_off_lightbulb": Rule(BULB, -1, 0.5),
    "turn_on_led": Rule(LED, +1, 0.5),
    "turn_off_led": Rule(LED, -1, 0.5),
}
TASKS: tuple[str, ...] = tuple(RULES)


def check_task(task: str) -> str:
    """Returns `task`; raises `ValueError` naming the eight known ones if it is another."""
    if task not in RULES:
        raise ValueError(f"unknown task {task!r}; known tasks: {', '.join(TASKS)}")
    return task


def fixture_tasks(task: str) -> tuple[str, ...]:
    """The tasks, ``task`` among them, that are judged by the same entry of ``scene_obs``."""
    index = RULES[check_task(task)].index
    return tuple(name for name, rule in RULES.items() if rule.index == index)


def task_success(task: str, scene_start: ArrayLike, scene: ArrayLike) -> NDArray[np.bool_]:
    """Whether `task` is solved in `scene` for an episode that began in `scene_start`.

    Args:
        task: one of `TASKS`.
        scene_start: scene_obs `[..., 24]` at the start (metres, lamps 0/1).
        scene: scene_obs `[..., 24]` now; leading dimensions broadcast against `scene_start`.

    Returns:
        bool array of the broadcast leading shape (zero-dimensional for two single scenes).

    Raises:
        ValueError: unknown task, or a last dimension other than 24.
    """
    rule = RULES[check_task(task)]
    start, now = np.asarray(scene_start), np.asarray(scene)
    if start.shape[-1:] != (24,) or now.shape[-1:] != (24,):
        raise ValueError(f"scene_obs must end in 24 numbers, got {start.shape} and {now.shape}")
    return rule.sign * (now[..., rule.index] - start[..., rule.index]) > rule.change

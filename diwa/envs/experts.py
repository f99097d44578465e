"""Scripted experts for the eight skills: waypoints at the handles, followed by relative actions.

The same follower makes demonstrations and play: aim errors, tilts, shortened strokes, pauses and
noise turn an expert into somebody who misses, slips and gives up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diwa.envs.panda import ACTION_SCALE, ORN_SCALE, POS_SCALE, wrap_angle
from diwa.envs.table_model import UP_SLOPE
from diwa.envs.tasks import check_task

if TYPE_CHECKING:
    from diwa.envs.simulator import Simulator

DOWN = np.array([np.pi, 0.0, np.pi / 2])
"""Euler angles of a tool that points straight down, fingers opening along world x."""
SAFE_Z = 0.60
MAX_STEPS_PER_WAYPOINT = 60
LEAN_ON, LEAN_OFF = 0.3, 0.5  # rad towards the table: a straight tool cannot reach the switch's top


class Waypoint(NamedTuple):
    """A tool pose to reach: position (m), Euler angles (rad), tolerance of the tool's place (m)."""

    pos: NDArray[np.float64]
    euler: NDArray[np.float64]
    tol: float = 0.008
    settle: int = 3


def _lean(angle: float) -> NDArray[np.float64]:
    return DOWN + [0.0, -angle, 0.0]


def _button(env: Simulator, travel: float) -> tuple[list, list]:
    top = env.link_position("button_base") + [0.0, 0.0, 0.02]
    above, press = top + [0, 0, 0.09], top + [0, 0, 0.07 - 0.052 * travel]
    return [(above, DOWN)], [(press, DOWN), (above, DOWN)]


def _drawer(env: Simulator, travel: float, opening: bool) -> tuple[list, list]:
    joint = env.fixtures()[1]
    # The bar spans 24 to 26 cm before the link: dip at 21.5 cm (behind it) or 31.5 cm.
    dip = env.link_position("drawer") + [0.0, -0.215 if opening else -0.315, 0.045]
    stroke = -(0.23 - joint) if opening else joint + 0.04
    end = dip + [0.0, stroke * travel, 0.0]
    back = end + [0.0, 0.02 if opening else -0.02, 0.19]
    return [(dip + [0, 0, 0.19], DOWN)], [(dip, DOWN), (end, DOWN), (back, DOWN)]


def _slider(env: Simulator, travel: float, left: bool) -> tuple[list, list]:
    side = 1.0 if left else -1.0
    joint = env.fixtures()[0]
    beside = env.link_position("slide") + [0.14 + 0.065 * side, -0.088, -0.005]
    distance = 0.285 - joint if left else joint + 0.005
    end = beside + [-side * (distance + 0.025) * travel, 0.0, 0.0]
    away = np.array([0.02 * side, -0.07, 0.09])
    return [(beside + [0, -0.07, 0.09], DOWN)], [(beside, DOWN), (end, DOWN), (end + away, DOWN)]


def _switch_on(env: Simulator, travel: float) -> tuple[list, list]:
    up, joint = np.array(UP_SLOPE), env.fixtures()[3]
    lean = _lean(LEAN_ON)
    front = env.link_position("switch") + [0.0, -0.085, 0.022]
    under = front + [0.0, 0.035, 0.0]
    push = [(under + up * (0.115 - joint) * travel * k / 3, lean) for k in (1, 2, 3)]
    away = (push[-1][0] + [0.0, -0.10, 0.03], lean)
    return [(front + [0, -0.06, 0.08], lean)], [(front, lean), (under, lean), *push, away]


def _switch_off(env: Simulator, travel: float) -> tuple[list, list]:
    up, joint = np.array(UP_SLOPE), env.fixtures()[3]
    lean = _lean(LEAN_OFF)
    tool = np.array([0.0, np.sin(LEAN_OFF), -np.cos(LEAN_OFF)])
    top = np.array([0.30, 0.03, 0.545]) + up * (joint + 0.02) - 0.02 * tool
    push = [(top - up * (joint + 0.042) * travel * k / 4, lean) for k in (1, 2, 3, 4)]
    away = (push[-1][0] + [0.0, -0.10, 0.05], lean)
    return [(top + [0, -0.05, 0.03], lean)], [(top, lean), *push, away]


def plan(env: Simulator, task: str, travel: float = 1.0) -> tuple[list, list]:
    """Approach and contact poses `(pos [3] m, euler [3] rad)` for a skill from the state now.

    `travel` scales the stroke: below 1 it stops half way, above 1 it overshoots.
    """
    check_task(task)
    if task.endswith("_led"):
        return _button(env, travel)
    if task.endswith("_drawer"):
        return _drawer(env, travel, opening=task.startswith("open"))
    if task.startswith("move_slider"):
        return _slider(env, travel, left=task.endswith("left"))
    return (_switch_on if task.startswith("turn_on") else _switch_off)(env, travel)


class Expert:
    """Follows a skill's waypoints, one action at a time, from the present state of `env`.

    Use `for action in expert: env.step(action)`; the pose is read again before every action.

    Args:
        env: a reset simulator (only read here).
        task: one of `TASKS`.
        rng: source of noise and pauses.
        noise: standard deviation added to the six motion numbers (action units).
        aim_error: offset `[3]` (m) of every contact waypoint.
        tilt: offset `[3]` (rad) of the tool's Euler angles.
        travel: share of the full stroke; below 1 stops half way, above 1 overshoots.
        pause_prob: chance per step to hold still for 2 to 8 steps.
        speed: largest commanded motion, in action units (0, 1].
        direct: leave out the rise to a safe height and go straight to the first contact pose.
        gripper: +1 keeps the fingers open, -1 closed.
    """

    def __init__(
        self,
        env: Simulator,
        task: str,
        rng: np.random.Generator,
        noise: float = 0.1,
        aim_error: ArrayLike = (0.0, 0.0, 0.0),
        tilt: ArrayLike = (0.0, 0.0, 0.0),
        travel: float = 1.0,
        pause_prob: float = 0.0,
        speed: float = 1.0,
        direct: bool = False,
        gripper: float = -1.0,
    ) -> None:
        self.env, self.task, self.rng = env, check_task(task), rng
        self.noise, self.pause_prob, self.speed, self.gripper = noise, pause_prob, speed, gripper
        approach, contact = plan(env, task, travel)
        offset, turn = np.asarray(aim_error, float), np.asarray(tilt, float)
        way = [] if direct else _safe_approach(env.robot.tcp(), approach[0])
        way += [Waypoint(p + offset, e + turn, 0.02, 0) for p, e in approach]
        way += [Waypoint(p + offset, e + turn) for p, e in contact[:-1]]
        way += [Waypoint(p + offset, e + turn, 0.03, 0) for p, e in contact[-1:]]
        self.waypoints: list[Waypoint] = way[1:] if direct else way
        self._index = self._tries = self._near = self._pause = 0

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        while (action := self.action()) is not None:
            yield action

    def action(self) -> NDArray[np.float32] | None:
        """The next action `[7]` in [-1, 1], or `None` when every waypoint is done."""
        while self._index < len(self.waypoints) and self._reached():
            self._index, self._tries, self._near = self._index + 1, 0, 0
        if self._index >= len(self.waypoints):
            return None
        self._tries += 1
        return follow(
            self.env, self.waypoints[self._index], self._speed_now(), self.noise, self.rng,
            self.gripper,
        )  # fmt: skip

    def _speed_now(self) -> float:
        if self._pause == 0 and self.pause_prob > 0 and self.rng.random() < self.pause_prob:
            self._pause = int(self.rng.integers(2, 9))
        if self._pause > 0:
            self._pause -= 1
            return 0.0
        return self.speed

    def _reached(self) -> bool:
        goal, robot = self.waypoints[self._index], self.env.robot
        if self._tries >= MAX_STEPS_PER_WAYPOINT:
            return True
        slack = 3 * self.noise
        near = np.linalg.norm(goal.pos - robot.target_pos) < max(
            goal.tol - 0.005, 3e-3 + slack * POS_SCALE
        )
        turned = np.abs(wrap_angle(goal.euler - robot.target_euler)).max() < (
            0.06 + slack * ORN_SCALE
        )
        if not (near and turned):
            return False
        self._near += 1
        arrived = np.linalg.norm(goal.pos - robot.tcp()) < goal.tol
        return bool(arrived or self._near > goal.settle)


def _safe_approach(tcp: NDArray[np.float64], first: tuple) -> list[Waypoint]:
    """Rise when low, then travel above the first pose: do not sweep across the handles."""
    pos, euler = first
    z = max(SAFE_Z, pos[2])
    way = []
    if tcp[2] < z - 0.10:
        way.append(Waypoint(np.array([tcp[0], min(tcp[1], -0.06), z - 0.03]), DOWN, 0.03, 0))
    way.append(Waypoint(np.array([pos[0], pos[1], z]), euler, 0.03, 0))
    return way


def follow(
    env: Simulator,
    goal: Waypoint,
    speed: float = 1.0,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
    gripper: float = -1.0,
) -> NDArray[np.float32]:
    """One action `[7]` in [-1, 1] that moves the running target towards `goal`."""
    robot = env.robot
    gap = np.concatenate([goal.pos - robot.target_pos, wrap_angle(goal.euler - robot.target_euler)])
    motion = np.clip(gap / ACTION_SCALE, -speed, speed)
    if noise > 0 and rng is not None:
        motion = np.clip(motion + rng.normal(0.0, noise, 6), -1.0, 1.0)
    return np.append(motion, 1.0 if gripper >= 0 else -1.0).astype(np.float32)

"""What the simulators have in common: observations, actions, rewards and the count of steps."""

from __future__ import annotations

import abc
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diwa.envs.tasks import TASKS, check_task, task_success


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sends both output streams, C code included, to nowhere: PyBullet announces its build date."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(fd) for fd in (1, 2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd in (1, 2):
            os.dup2(sink, fd)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in zip((1, 2), saved, strict=True):
            os.dup2(old, fd)
            os.close(old)
        os.close(sink)


try:
    with quiet():
        import gymnasium as gym
        import pybullet as bullet
except ImportError as error:
    raise ImportError(f'the simulators need {error.name}: pip install "diwa[sim]"') from error

_steps_taken = 0


def env_steps_taken() -> int:
    """Control steps taken by every simulator of this process so far, whichever it is.

    Training in imagination must leave this number where it was.
    """
    return _steps_taken


class Arm(Protocol):
    """What experts and start states need of a robot; lengths in m, angles in rad, world frame.

    Attributes:
        target_pos: `[3]` running target of the tool point.
        target_euler: `[3]` its Euler angles xyz, added up componentwise, never wrapped.
    """

    @property
    def target_pos(self) -> NDArray[np.float64]: ...

    @property
    def target_euler(self) -> NDArray[np.float64]: ...

    def tcp(self) -> NDArray[np.float64]:
        """Measured position of the tool point `[3]`."""

    def reset(self, joints: ArrayLike, width: float, gripper_action: float) -> None:
        """Puts the arm at `joints` `[7]`, fingers `width` apart, target re-read."""

    def solve_ik(self, pos: ArrayLike, euler: ArrayLike) -> NDArray[np.float64]:
        """Joints `[7]` that bring the tool near a pose, from the present ones."""

    def observe(self) -> NDArray[np.float64]:
        """robot_obs `[15]`."""


class Simulator(gym.Env, abc.ABC):
    """One table, one arm, three blocks, one skill to solve: CALVIN's scene D.

    Args:
        task: one of `TASKS`; `None` gives no reward until `reset(options={"task": ...})`.
        cameras: add `rgb_static` and `rgb_gripper` to the observation.
        image_size: edge of both pictures in pixels.
        max_episode_steps: steps until `truncated`.
        render_mode: `None` or `"rgb_array"`.

    Observation: `robot_obs` float32 `[15]` and `scene_obs` float32 `[24]` (metres, radians,
    lamps 0/1), with cameras also two uint8 `[size, size, 3]`. Action: float32 `[7]` in [-1, 1]:
    motion in units of 2 cm and 0.05 rad added to the running target, gripper open (>= 0) or closed.
    Reward 1 and `terminated` on success, `info["success"]` says the same.

    Raises:
        ValueError: unknown task, or a state or action of the wrong shape or not finite.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    robot: Arm

    def __init__(
        self,
        task: str | None = None,
        cameras: bool = False,
        image_size: int = 64,
        max_episode_steps: int = 72,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f'render_mode must be None or "rgb_array", got {render_mode!r}')
        self.task = None if task is None else check_task(task)
        self.cameras, self.image_size = cameras, image_size
        self.max_episode_steps, self.render_mode = max_episode_steps, render_mode
        box = gym.spaces.Box
        spaces: dict[str, gym.Space] = {
            "robot_obs": box(-np.inf, np.inf, (15,), np.float32),
            "scene_obs": box(-np.inf, np.inf, (24,), np.float32),
        }
        if cameras:
            shape = (image_size, image_size, 3)
            spaces["rgb_static"] = box(0, 255, shape, np.uint8)
            spaces["rgb_gripper"] = box(0, 255, shape, np.uint8)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = box(-1.0, 1.0, (7,), np.float32)
        self._steps = 0
        self._scene_start = np.zeros(24, np.float32)

    # ------------------------------------------------------------------ of each simulator

    @abc.abstractmethod
    def _advance(self, action: NDArray[np.float64]) -> None:
        """One control step under `action` `[7]`, clipped to [-1, 1]."""

    @abc.abstractmethod
    def _set_state(self, robot: NDArray[np.float64], scene: NDArray[np.float64]) -> None:
        """`set_state` with checked arrays `[15]`, `[24]`."""

    @abc.abstractmethod
    def _scene_obs(self) -> NDArray:
        """scene_obs `[24]`."""

    @abc.abstractmethod
    def _picture(self, camera: str, size: int) -> NDArray[np.uint8]:
        """Picture `[size, size, 3]` of the camera `static` or `gripper`."""

    @abc.abstractmethod
    def fixtures(self) -> NDArray[np.float64]:
        """Joints `[4]` after the last step: slide, drawer, button, switch (m)."""

    @abc.abstractmethod
    def link_position(self, name: str) -> NDArray[np.float64]:
        """World position `[3]` (m) of a table link: slide, drawer, switch or button_base."""

    # ------------------------------------------------------------------ gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray], dict[str, Any]]:
        """Starts an episode.

        `options` may hold `task`, `robot_obs` `[15]` (joints, width and gripper action
        count, the tool pose follows from them), `scene_obs` `[24]`; the rest is sampled.
        """
        super().reset(seed=seed)
        options = options or {}
        if options.get("task") is not None:
            self.task = check_task(options["task"])
        robot, scene = options.get("robot_obs"), options.get("scene_obs")
        if robot is None or scene is None:
            from diwa.envs.starts import sample_start

            start = sample_start(self, self.task or TASKS[0], self.np_random)
            robot = start["robot_obs"] if robot is None else robot
            scene = start["scene_obs"] if scene is None else scene
        self.set_state(robot, scene)
        self._steps = 0
        observation = self._observation()
        self._scene_start = observation["scene_obs"]
        return observation, {"success": False, "env_steps": 0, "task": self.task}

    def step(self, action: NDArray) -> tuple[dict[str, NDArray], float, bool, bool, dict[str, Any]]:
        """One control step (1/30 s). Motions are clipped to [-1, 1]."""
        global _steps_taken
        action = np.array(action, np.float64)
        if action.shape != (7,):
            raise ValueError(f"action must have shape (7,), got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"action must be finite, got {action}")
        self._advance(np.clip(action, -1.0, 1.0))
        self._steps += 1
        _steps_taken += 1
        observation = self._observation()
        success = self.task is not None and bool(
            task_success(self.task, self._scene_start, observation["scene_obs"])
        )
        truncated = self._steps >= self.max_episode_steps
        info = {"success": success, "env_steps": self._steps, "task": self.task}
        return observation, float(success), success, truncated and not success, info

    def render(self, size: int = 256) -> NDArray[np.uint8]:
        """Static camera, uint8 `[size, size, 3]`."""
        return self._picture("static", size)

    def set_state(self, robot_obs: NDArray, scene_obs: NDArray) -> None:
        """Puts robot and scene into a recorded state at rest, then takes one physics step.

        Like CALVIN's reset: velocities are zero and the tool pose follows from the joints.
        """
        robot, scene = np.array(robot_obs, np.float64), np.array(scene_obs, np.float64)
        if robot.shape != (15,) or scene.shape != (24,):
            raise ValueError(
                f"robot_obs must be (15,) and scene_obs (24,), got {robot.shape}, {scene.shape}"
            )
        self._set_state(robot, scene)

    def _observation(self) -> dict[str, NDArray]:
        observation: dict[str, NDArray] = {
            "robot_obs": self.robot.observe().astype(np.float32),
            "scene_obs": self._scene_obs().astype(np.float32),
        }
        if self.cameras:
            for camera in ("static", "gripper"):
                observation[f"rgb_{camera}"] = self._picture(camera, self.image_size)
        return observation


__all__ = ["Arm", "Simulator", "bullet", "env_steps_taken", "gym", "quiet"]

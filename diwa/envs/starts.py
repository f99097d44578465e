"""Random start states: where the tool is, how the fixtures stand, where the blocks lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diwa.envs import SimulatorSpec
from diwa.envs.panda import MAX_WIDTH, REST_JOINTS
from diwa.envs.table_model import JOINT_UPPER
from diwa.envs.tasks import BULB, DRAWER, LED, SLIDER, SWITCH, check_task

if TYPE_CHECKING:
    from diwa.envs.simulator import Simulator

TCP_LOW, TCP_HIGH = (-0.15, -0.30, 0.52), (0.25, -0.12, 0.66)
TILT_SD = 0.05
REACHED = 0.003
BLOCK_SLOTS = ((0.05, -0.12, 0.46), (0.23, -0.12, 0.46), (0.0703, 0.0924, 0.461))
"""Where the red, blue and pink block stand (m); the pink one behind the door."""


def sample_scene(task: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """A random scene_obs `[24]` in which `task` is still to be done."""
    check_task(task)
    scene = np.zeros(24)
    slider, drawer = JOINT_UPPER["slide"], JOINT_UPPER["drawer"]
    scene[SLIDER] = rng.choice([0.0, slider, rng.uniform(0.0, slider)], p=[0.5, 0.3, 0.2])
    scene[DRAWER] = rng.choice([0.0, drawer, rng.uniform(0.0, drawer)], p=[0.6, 0.25, 0.15])
    scene[BULB], scene[LED] = rng.integers(0, 2, 2)
    if task == "open_drawer":
        scene[DRAWER] = rng.choice([0.0, rng.uniform(0.0, 0.02)])
    elif task == "close_drawer":
        scene[DRAWER] = rng.uniform(0.19, drawer)
    elif task == "move_slider_left":
        scene[SLIDER] = rng.choice([0.0, rng.uniform(0.0, 0.03)])
    elif task == "move_slider_right":
        scene[SLIDER] = rng.uniform(0.25, slider)
    elif task.endswith("lightbulb"):
        scene[BULB] = float(task == "turn_off_lightbulb")
    else:
        scene[LED] = float(task == "turn_off_led")
    scene[SWITCH] = JOINT_UPPER["switch"] if scene[BULB] else 0.0
    for k, slot in enumerate(BLOCK_SLOTS):
        low, high = (-0.01, 0.01) if k < 2 else (0.0, 0.005)  # the shelf is narrow
        scene[6 + 6 * k : 9 + 6 * k] = slot
        scene[6 + 6 * k : 8 + 6 * k] += rng.uniform(low, high, 2)
        scene[11 + 6 * k] = np.pi / 2 + rng.uniform(-np.pi / 8, np.pi / 8)
    return scene.astype(np.float32)


def reach_pose(env: Simulator, pos: NDArray, euler: NDArray) -> NDArray[np.float64] | None:
    """Joints `[7]` (rad) that put the tool at a pose, or `None` if it is missed by over 3 mm.

    Moves the arm of `env` while searching; set a state afterwards.
    """
    joints = np.array(REST_JOINTS)
    for _ in range(12):
        env.robot.reset(joints, 0.0, -1.0)
        if np.linalg.norm(env.robot.target_pos - pos) < REACHED / 3:
            break
        joints = env.robot.solve_ik(pos, euler)
    env.robot.reset(joints, 0.0, -1.0)
    return joints if np.linalg.norm(env.robot.target_pos - pos) < REACHED else None


def sample_robot(env: Simulator, rng: np.random.Generator) -> NDArray[np.float32]:
    """A random robot_obs `[15]`: tool over the table pointing down, fingers open or closed.

    Raises:
        RuntimeError: when no sampled pose could be reached (the arm was changed).
    """
    for _ in range(50):
        pos = rng.uniform(TCP_LOW, TCP_HIGH)
        euler = np.array([np.pi, 0.0, np.pi / 2]) + rng.normal(0.0, TILT_SD, 3)
        if reach_pose(env, pos, euler) is not None:
            break
    else:
        raise RuntimeError("no reachable start pose found in 50 tries")
    robot = env.robot.observe()
    is_open = rng.random() < 0.5
    robot[6], robot[14] = (MAX_WIDTH, 1.0) if is_open else (0.0, -1.0)
    return robot.astype(np.float32)


def sample_start(env: Simulator, task: str, rng: np.random.Generator) -> dict[str, NDArray]:
    """A start for `task`, for `reset`: `robot_obs` `[15]`, `scene_obs` `[24]` float32.

    Leaves `env` in an undefined state: reset it with what is returned.
    """
    scene = sample_scene(task, rng)
    return {"robot_obs": sample_robot(env, rng), "scene_obs": scene}


def sample_starts(env: Simulator, task: str, n: int, seed: int) -> dict[str, NDArray]:
    """`n` starts, the same for a seed: `robot_obs` `[n, 15]`, `scene_obs` `[n, 24]`.

    Leaves `env` in an undefined state: reset it with one of what is returned.
    """
    found = [sample_start(env, task, np.random.default_rng((seed, k))) for k in range(n)]
    return {key: np.stack([start[key] for start in found]) for key in ("robot_obs", "scene_obs")}


def make_starts(
    task: str, n: int, seed: int, simulator: str = "playtable", image_size: int = 0
) -> dict[str, NDArray]:
    """`sample_starts` in a simulator of its own, given by name.

    With an `image_size` also what its cameras see there: `rgb_static` and `rgb_gripper`
    `[n, size, size, 3]` uint8.
    """
    env = SimulatorSpec(simulator, image_size).make()
    try:
        starts = sample_starts(env, task, n, seed)
        if image_size:
            seen = [
                env.reset(options={key: value[k] for key, value in starts.items()})[0]
                for k in range(n)
            ]
            for camera in ("rgb_static", "rgb_gripper"):
                starts[camera] = np.stack([pictures[camera] for pictures in seen])
        return starts
    finally:
        env.close()

"""CALVIN's scene D behind the same interface as `PlayTable`, from the user's own clone.

`calvin_env` (MIT) is not on PyPI: `tools/get_calvin_env.sh` fetches it, `CALVIN_ENV_ROOT` names the
clone. Nothing is changed in it; what would otherwise go wrong is put right from here, in memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diwa.envs.panda import MAX_WIDTH
from diwa.envs.simulator import Simulator, bullet, quiet
from diwa.errors import SimulatorError

HELP = (
    "1. Fetch it with its dependencies: tools/get_calvin_env.sh FOLDER\n"
    "2. Say where it is: export CALVIN_ENV_ROOT=FOLDER\n"
    "3. Or do without it: --env playtable, the simulator that comes with diwa"
)
# What CALVIN's own EGL branch does, in a process that may end by it.
_EGL_PROBE = """
import pkgutil, pybullet as p
client = p.connect(p.DIRECT, options="--width=64 --height=64")
egl = pkgutil.get_loader("eglRenderer")
plugin = p.loadPlugin(egl.get_filename(), "_eglRendererPlugin") if egl else -1
frame = p.getCameraImage(64, 64, physicsClientId=client)
raise SystemExit(0 if plugin >= 0 and len(frame) == 5 else 1)
"""
_SOCKET_DEPTH = 0.02  # m between the button's frame, at rest, and that of its socket
_LINKS = {"slide": "slide_link", "drawer": "drawer_link", "switch": "switch_link"}


def calvin_root() -> Path:
    """Folder of the clone: `CALVIN_ENV_ROOT` (or a `calvin` clone around it), or an installed one.

    Raises:
        SimulatorError: there is none, or it is not complete.
    """
    named = os.environ.get("CALVIN_ENV_ROOT")
    if named:
        candidates = [Path(named).expanduser(), Path(named).expanduser() / "calvin_env"]
        problem = f"CALVIN_ENV_ROOT={named} is not a clone of calvin_env"
    else:
        found = importlib.util.find_spec("calvin_env")
        places = found.submodule_search_locations if found is not None else None
        candidates = [Path(place).parent for place in places or []]
        problem = "--env calvin needs calvin_env, which is not installed"
    for root in candidates:
        # An installation of the package alone lacks the meshes and the settings.
        if (root / "calvin_env" / "envs").is_dir() and (root / "conf").is_dir():
            if not (root / "data").is_dir():
                raise SimulatorError(f"{root} has no data folder with CALVIN's meshes.\n{HELP}")
            return root.resolve()
    raise SimulatorError(f"{problem}.\n{HELP}")


def import_calvin() -> Path:
    """Imports the clone's `calvin_env.envs.play_table_env` and returns the clone's folder.

    Raises:
        SimulatorError: there is no clone, a dependency is missing, or another clone is loaded.
    """
    root = calvin_root()
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # a missing git program is no error here
    sys.path.insert(0, str(root))
    try:
        with quiet():  # gym says that it is old, hydra that its defaults will change
            module = importlib.import_module("calvin_env.envs.play_table_env")
    except ImportError as error:
        raise SimulatorError(
            f'calvin_env needs the module {error.name}: pip install "diwa[calvin]"'
        ) from error
    finally:
        # Its empty folder `tacto` must not hide a package of that name.
        sys.path.remove(str(root))
    assert module.__file__ is not None
    if root not in Path(module.__file__).resolve().parents:
        raise SimulatorError(f"calvin_env was loaded from {module.__file__}, not from {root}")
    # It asks git for its commit, which fails in an archive and in a folder of another user.
    module.get_git_commit_hash = lambda path: "unknown"  # type: ignore[attr-defined]
    return root


def _settings(root: Path) -> Any:
    """Its configuration of scene D, without Hydra's search for one."""
    from omegaconf import OmegaConf

    def load(name: str) -> Any:
        return OmegaConf.load(root / "conf" / name)

    robot = OmegaConf.merge(load("robot/panda.yaml"), load("robot/panda_longer_finger.yaml"))
    robot.pop("defaults", None)
    return OmegaConf.create(
        {
            "use_vr": False,
            "data_path": str(root / "data"),
            "env": load("env/play_table_env.yaml"),
            "robot": robot,
            "scene": load("scene/calvin_scene_D_eval.yaml"),
            "cameras": {c: load(f"cameras/cameras/{c}.yaml") for c in ("static", "gripper")},
        }
    )


@functools.cache
def egl_works() -> bool:
    """Whether the GPU renderer starts; tried in another process, which it may take with it."""
    command = [sys.executable, "-c", _EGL_PROBE]
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class CalvinArm:
    """CALVIN's robot as an `Arm`."""

    def __init__(self, robot: Any) -> None:
        self._robot = robot

    @property
    def target_pos(self) -> NDArray[np.float64]:
        """Running target of the tool point `[3]` (m)."""
        return np.array(self._robot.target_pos)

    @property
    def target_euler(self) -> NDArray[np.float64]:
        """Its Euler angles `[3]` (rad)."""
        return np.array(self._robot.target_orn)

    def tcp(self) -> NDArray[np.float64]:
        """Measured position of the tool point `[3]` (m, world)."""
        link = bullet.getLinkState(
            self._robot.robot_uid, self._robot.tcp_link_id, physicsClientId=self._robot.cid
        )
        return np.array(link[0])

    def reset(self, joints: ArrayLike, width: float, gripper_action: float) -> None:
        """Puts the arm at `joints` `[7]` (rad), fingers `width` apart (m), target re-read."""
        state = np.zeros(15)
        state[6], state[7:14] = np.clip(width, 0.0, MAX_WIDTH), joints
        self._robot.reset(state)
        self._robot.gripper_action = 1 if gripper_action >= 0 else -1

    def solve_ik(self, pos: ArrayLike, euler: ArrayLike) -> NDArray[np.float64]:
        """Joints `[7]` (rad) that bring the tool near a pose, from the present ones."""
        quat = bullet.getQuaternionFromEuler(np.asarray(euler, float).tolist())
        found = self._robot.mixed_ik.get_ik(np.asarray(pos, float).tolist(), quat)
        return np.asarray(found, np.float64)

    def observe(self) -> NDArray[np.float64]:
        """robot_obs `[15]`: tcp xyz, its Euler xyz, finger width, joints, gripper action."""
        return np.asarray(self._robot.get_observation()[0], np.float64)


class CalvinEnv(Simulator):
    """CALVIN's scene D; arguments, observations, actions and errors are `Simulator`'s.

    One per process: parts of calvin_env speak to the first PyBullet client whatever their own.

    Args:
        renderer: `cpu` (PyBullet's own, everywhere the same picture) or `egl` (another picture:
            train and evaluate with the same one).

    Raises:
        SimulatorError: no clone or one that is not complete, a missing dependency, a second
            simulator in this process, or a GPU renderer that does not start.
    """

    def __init__(
        self,
        task: str | None = None,
        cameras: bool = False,
        image_size: int = 64,
        max_episode_steps: int = 72,
        render_mode: str | None = None,
        renderer: Literal["cpu", "egl"] = "cpu",
    ) -> None:
        self._env: Any = None
        super().__init__(task, cameras, image_size, max_episode_steps, render_mode)
        self._config = _settings(import_calvin())
        if renderer == "egl" and not egl_works():
            raise SimulatorError("the EGL renderer does not start here; use renderer='cpu'")
        if bullet.isConnected(0):
            raise SimulatorError(
                "CALVIN must be the first simulator of a process and the only one of its kind: "
                "close() the other one before, or use one process for each"
            )
        with quiet():
            self._env = self._build(egl=renderer == "egl")
        self._client = self._env.cid
        self.robot = CalvinArm(self._env.robot)
        self._fixed = self._env.scene.fixed_objects[0]
        scene = self._env.scene
        moving = (*scene.doors, *scene.buttons, *scene.switches)  # the order of scene_obs
        self._fixture_joints = [part.joint_index for part in moving]
        self._made_cameras: dict[tuple[str, int], Any] = {}
        # Blocks wait where they touch nothing: from there, no reset inherits their contacts.
        for k, block in enumerate(scene.movable_objects):
            bullet.resetBasePositionAndOrientation(
                block.uid, (2.0 + k, 0.0, 1.0), (0, 0, 0, 1), physicsClientId=self._client
            )
        self._fresh = bullet.saveState(physicsClientId=self._client)

    def _build(self, egl: bool) -> Any:
        import hydra

        config = self._config.copy()
        if not egl:  # with it, the renderer's size is that of the largest camera
            config.cameras = {}
        for camera in config.cameras.values():
            camera.width = camera.height = max(self.image_size, 256)
        env = hydra.utils.instantiate(
            config.env, use_egl=egl, show_gui=False, use_vr=False, use_scene_info=False
        )
        robot = env.robot  # reading a number from OmegaConf's lists costs more than using it
        robot.arm_joint_ids = list(robot.arm_joint_ids)
        robot.gripper_joint_ids = list(robot.gripper_joint_ids)
        env.cameras = []  # it would draw all of them at every step; pictures are made when needed
        # Its destructor prints and disconnects a client that may by then be somebody else's.
        env.close = lambda: None
        return env

    # ------------------------------------------------------------------ state

    def _advance(self, action: NDArray[np.float64]) -> None:
        # Anything but exactly one of these is an AssertionError there.
        action[6] = 1.0 if action[6] >= 0 else -1.0
        env = self._env
        env.robot.apply_action(action)
        for _ in range(env.action_repeat):
            env.p.stepSimulation(physicsClientId=env.cid)
        env.scene.step()  # all of env.step but the observation, which it makes twice over

    def _set_state(self, robot: NDArray[np.float64], scene: NDArray[np.float64]) -> None:
        env, client = self._env, self._client
        # What the last episode left in the solver would otherwise change this one.
        bullet.restoreState(self._fresh, physicsClientId=client)
        bullet.performCollisionDetection(physicsClientId=client)
        scene[4:6] = scene[4:6] > 0.5  # a lamp that is neither 0 nor 1 is an error there
        # Its reset keeps the last step's gripper action, which is a part of robot_obs.
        env.robot.gripper_action = 1 if robot[14] >= 0 else -1
        robot[6] = np.clip(robot[6], 0.0, MAX_WIDTH)
        env.reset(robot_obs=robot, scene_obs=scene)
        for button in env.scene.buttons:  # a button that is down already has not just been pressed
            button.prev_is_pressed = button._is_pressed

    def fixtures(self) -> NDArray[np.float64]:
        """Joints `[4]` after the last step: slide, drawer, button, switch (m)."""
        states = bullet.getJointStates(
            self._fixed.uid, self._fixture_joints, physicsClientId=self._client
        )
        return np.array([state[0] for state in states])

    def link_position(self, name: str) -> NDArray[np.float64]:
        """World position `[3]` (m) of a table link: slide, drawer, switch or button_base."""
        link = self._fixed.info_dict["links"][_LINKS.get(name, "button_link")]
        state = bullet.getLinkState(self._fixed.uid, link, physicsClientId=self._client)
        position = np.array(state[4])
        if name == "button_base":  # the button itself sinks when it is pressed
            position[2] += self.fixtures()[2] - _SOCKET_DEPTH
        return position

    def _scene_obs(self) -> NDArray[np.float64]:
        return np.asarray(self._env.scene.get_obs())

    def _picture(self, camera: str, size: int) -> NDArray[np.uint8]:
        if (camera, size) not in self._made_cameras:
            import hydra

            self._made_cameras[camera, size] = hydra.utils.instantiate(
                self._config.cameras[camera], width=size, height=size, cid=self._client,
                robot_id=self._env.robot.robot_uid, objects=None,
            )  # fmt: skip
        rgb = self._made_cameras[camera, size].render()[0]
        return np.ascontiguousarray(rgb, np.uint8)  # a view of RGBA rows there

    def close(self) -> None:
        """Disconnects from the physics server; harmless when repeated."""
        env, self._env = self._env, None
        if env is None:
            return
        with contextlib.suppress(bullet.error), quiet():
            env.p.disconnect(physicsClientId=env.cid)

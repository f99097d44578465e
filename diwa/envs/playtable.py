"""PlayTable: an embedded PyBullet stand-in for CALVIN's scene D, as a Gymnasium environment.

Same numbers in and out as CALVIN: 15-d `robot_obs`, 24-d `scene_obs`, 7-d relative actions at
30 Hz (eight physics steps of 1/240 s each), the same eight skills. No asset files: the table is
made of boxes, the arm comes with PyBullet. Needs `pip install "diwa[sim]"`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pybullet_data
from numpy.typing import NDArray

from diwa.envs import table_model as model
from diwa.envs.panda import Panda, panda_urdf
from diwa.envs.simulator import Simulator, bullet, env_steps_taken
from diwa.envs.tasks import BUTTON

SUBSTEPS = 8
TIME_STEP = 1.0 / 240.0
JOINTS = ("slide", "drawer", "button", "switch")  # order of scene_obs[0:4]
BUTTON_PRESSED = 0.01
SWITCH_ON = 0.044
FIXTURE_FORCE = 4.0
# CALVIN runs 50 solver rounds to 1e-7; this is a third faster, and recorded actions move tool and
# fixtures to the same places within a millimetre.
SOLVER_ROUNDS, SOLVER_RESIDUAL = 30, 1e-5
_STATIC_EYE = (2.871459, -2.166602, 2.555160)
_STATIC_TARGET = (-0.026242, -0.030233, 0.392000)
_STATIC_UP = (0.404140, 0.226298, 0.886262)


def _write_once(name: str, content: str | bytes) -> str:
    """Writes `content` (atomically, once) under a name with its hash and returns the path."""
    data = content.encode() if isinstance(content, str) else content
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"diwa-playtable-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    stem, suffix = os.path.splitext(name)
    path = folder / f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    if not path.exists() or path.read_bytes() != data:
        part = path.with_suffix(f".{os.getpid()}.tmp")
        part.write_bytes(data)
        os.replace(part, path)
    return str(path)


class PlayTable(Simulator):
    """The embedded simulator; arguments, observations, actions and errors are `Simulator`'s."""

    robot: Panda

    def __init__(
        self,
        task: str | None = None,
        cameras: bool = False,
        image_size: int = 64,
        max_episode_steps: int = 72,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(task, cameras, image_size, max_episode_steps, render_mode)
        self._client = bullet.connect(bullet.DIRECT)
        self._build()

    # ------------------------------------------------------------------ building

    def _build(self) -> None:
        p, client = bullet, self._client
        p.setPhysicsEngineParameter(
            deterministicOverlappingPairs=1, numSolverIterations=SOLVER_ROUNDS,
            solverResidualThreshold=SOLVER_RESIDUAL,
            physicsClientId=client,
        )  # fmt: skip
        p.setTimeStep(TIME_STEP, physicsClientId=client)
        p.setGravity(0.0, 0.0, -9.8, physicsClientId=client)
        folder = os.path.join(pybullet_data.getDataPath(), "franka_panda")
        self.robot = Panda(p, client, _write_once("panda.urdf", panda_urdf(folder)))
        self._furniture, self._table = (
            p.loadURDF(_write_once(name, text), useFixedBase=True, physicsClientId=client)
            for name, text in (
                ("furniture.urdf", model.furniture_urdf()),
                ("fixtures.urdf", model.fixtures_urdf()),
            )
        )
        count = p.getNumJoints(self._table, physicsClientId=client)
        infos = [p.getJointInfo(self._table, i, physicsClientId=client) for i in range(count)]
        self._link = {info[12].decode(): info[0] for info in infos}
        for index in self._link.values():  # handles run through slots that the boxes do not have
            p.setCollisionFilterPair(self._furniture, self._table, -1, index, 0, client)
        self._joint_ids = [self._link[name] for name in JOINTS]
        for name, index in self._link.items():
            if name == "button":
                p.setJointMotorControl2(
                    self._table, index, p.POSITION_CONTROL, 0.0, force=FIXTURE_FORCE,
                    physicsClientId=client,
                )  # fmt: skip
            elif name in JOINTS:
                p.setJointMotorControl2(
                    self._table, index, p.VELOCITY_CONTROL, force=FIXTURE_FORCE,
                    physicsClientId=client,
                )  # fmt: skip
        # Blocks wait where they touch nothing until the first reset puts them down.
        self._blocks = [
            self._add_block(*block, place=(2.0 + k, 0.0, 1.0))
            for k, block in enumerate(model.BLOCKS.values())
        ]
        self._floor = self._add_floor()
        self._painted = False
        self._lamps = [0.0, 0.0]
        self._lamps_shown: list[float] | None = None
        self._pressed = False
        self._static_view = p.computeViewMatrix(_STATIC_EYE, _STATIC_TARGET, _STATIC_UP)
        self._static_projection = p.computeProjectionMatrixFOV(10.0, 1.0, 0.01, 10.0)
        self._wrist_projection = p.computeProjectionMatrixFOV(75.0, 1.0, 0.01, 2.0)
        self._fresh = p.saveState(physicsClientId=client)

    def _add_block(self, size: tuple, color: tuple, place: tuple) -> int:
        p, half = bullet, [edge / 2 for edge in size]
        shape = p.createCollisionShape(p.GEOM_BOX, halfExtents=half, physicsClientId=self._client)
        look = p.createVisualShape(
            p.GEOM_BOX, halfExtents=half, rgbaColor=color, physicsClientId=self._client
        )
        return p.createMultiBody(model.BLOCK_MASS, shape, look, place, physicsClientId=self._client)

    def _add_floor(self) -> int:
        p, client = bullet, self._client
        half = [model.FLOOR_HALF, model.FLOOR_HALF, 0.01]
        shape = p.createCollisionShape(p.GEOM_BOX, halfExtents=half, physicsClientId=client)
        look = p.createVisualShape(
            p.GEOM_BOX, halfExtents=half, rgbaColor=(1, 1, 1, 1), physicsClientId=client
        )
        return p.createMultiBody(0, shape, look, (0, 0, -0.01), physicsClientId=client)

    def _paint(self) -> None:
        """Textures, put on with the first picture: state-only environments do without."""
        p, client = bullet, self._client
        self._painted = True
        wood, tiles = (
            p.loadTexture(_write_once(name, model.tga_bytes(image)), physicsClientId=client)
            for name, image in (
                ("wood.tga", model.wood_texture()),
                ("floor.tga", model.floor_texture()),
            )
        )
        for body, link, texture in (
            (self._furniture, -1, wood),
            (self._table, self._link["drawer"], wood),
            (self._table, self._link["slide"], wood),
            (self._floor, -1, tiles),
        ):
            p.changeVisualShape(body, link, textureUniqueId=texture, physicsClientId=client)

    # ------------------------------------------------------------------ state

    def _advance(self, action: NDArray[np.float64]) -> None:
        self.robot.apply(action)
        for _ in range(SUBSTEPS):
            bullet.stepSimulation(physicsClientId=self._client)
        self._update_lamps()

    def close(self) -> None:
        """Disconnects from the physics server; harmless when repeated."""
        if self._client >= 0 and bullet.isConnected(self._client):
            bullet.disconnect(self._client)
        self._client = -1

    def _set_state(self, robot: NDArray[np.float64], scene: NDArray[np.float64]) -> None:
        p, client = bullet, self._client
        p.restoreState(self._fresh, physicsClientId=client)
        # Contacts of the last episode would otherwise live on between bodies that touch again.
        p.performCollisionDetection(physicsClientId=client)
        for index, value in zip(self._joint_ids, scene[:4], strict=True):
            p.resetJointState(self._table, index, value, 0.0, physicsClientId=client)
        for body, pose in zip(self._blocks, scene[6:].reshape(3, 6), strict=True):
            quat = p.getQuaternionFromEuler(pose[3:].tolist())
            p.resetBasePositionAndOrientation(body, pose[:3], quat, physicsClientId=client)
            p.resetBaseVelocity(body, (0, 0, 0), (0, 0, 0), physicsClientId=client)
        self._lamps = [float(scene[4] > 0.5), float(scene[5] > 0.5)]
        self._pressed = bool(scene[BUTTON] > BUTTON_PRESSED)
        self.robot.reset(robot[7:14], robot[6], robot[14])
        p.stepSimulation(physicsClientId=client)
        self._read_fixtures()

    def _update_lamps(self) -> None:
        """Bulb follows the switch; each new press of the button flips the LED. Once per step."""
        _, _, button, switch = self._read_fixtures()
        self._lamps[0] = float(switch > SWITCH_ON)
        pressed = button > BUTTON_PRESSED
        if pressed and not self._pressed:
            self._lamps[1] = 1.0 - self._lamps[1]
        self._pressed = pressed

    def _read_fixtures(self) -> list[float]:
        states = bullet.getJointStates(self._table, self._joint_ids, physicsClientId=self._client)
        self._fixtures = [s[0] for s in states]
        return self._fixtures

    def fixtures(self) -> NDArray[np.float64]:
        """Joints `[4]` after the last step: slide, drawer, button, switch (m)."""
        return np.array(self._fixtures)

    def link_position(self, name: str) -> NDArray[np.float64]:
        """World position `[3]` (m) of a table link's frame, e.g. `"drawer"`."""
        state = bullet.getLinkState(self._table, self._link[name], physicsClientId=self._client)
        return np.array(state[4])

    def _scene_obs(self) -> NDArray[np.float32]:
        values = [*self._fixtures, *self._lamps]
        for body in self._blocks:
            pos, quat = bullet.getBasePositionAndOrientation(body, physicsClientId=self._client)
            values += pos
            values += bullet.getEulerFromQuaternion(quat)
        return np.array(values, np.float32)

    def _picture(self, camera: str, size: int) -> NDArray[np.uint8]:
        if camera == "static":
            view, projection = self._static_view, self._static_projection
        else:
            view, projection = self.robot.wrist_view(), self._wrist_projection
        if not self._painted:
            self._paint()
        self._show_lamps()
        frame = bullet.getCameraImage(
            size, size, view, projection, renderer=bullet.ER_TINY_RENDERER,
            physicsClientId=self._client,
        )[2]  # fmt: skip
        return np.ascontiguousarray(np.asarray(frame, np.uint8).reshape(size, size, 4)[..., :3])

    def _show_lamps(self) -> None:
        if self._lamps == self._lamps_shown:
            return
        for name, state, colors in (
            ("light", self._lamps[0], model.BULB_COLORS),
            ("led", self._lamps[1], model.LED_COLORS),
        ):
            bullet.changeVisualShape(
                self._table, self._link[name], rgbaColor=colors[int(state > 0.5)],
                physicsClientId=self._client,
            )  # fmt: skip
        self._lamps_shown = list(self._lamps)


__all__ = ["PlayTable", "env_steps_taken"]

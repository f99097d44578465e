"""A Franka Panda with long fingers, driven like CALVIN's: motions add up to a running target.

The arm is the one that ships with `pybullet_data` (Apache-2.0); its description is rewritten
when first needed: the light collision meshes double as visuals, the fingers become boxes that end
15.5 cm below the hand, and a tool point (`tcp`, 14 cm below the hand) is added.
"""

from __future__ import annotations

import math
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

BASE_POSITION = (-0.34, -0.46, 0.24)
ARM = tuple(range(7))
FINGERS = (9, 10)
TCP = 11
JOINT_LOW = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)
JOINT_HIGH = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)
REST_JOINTS = (
    -1.21779124,
    1.03987629,
    2.11978254,
    -2.34205014,
    -0.87015899,
    1.64119093,
    0.55344928,
)
MAX_WIDTH = 0.08
POS_SCALE, ORN_SCALE = 0.02, 0.05
ACTION_SCALE = np.array([POS_SCALE] * 3 + [ORN_SCALE] * 3)
"""One unit of each motion number: metres, then radians."""
# View matrix of the wrist camera in the tcp frame (OpenGL axes: x right, y up, z back).
WRIST_VIEW = np.array(
    [
        [-0.0008, 1.0, 0.0, -0.0001],
        [0.9636, 0.0008, -0.2675, 0.0589],
        [-0.2675, -0.0002, -0.9636, -0.1616],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
# Boxes in the finger's frame (5.84 cm below the hand): edges and centre, y from the pad outward.
# What touches is one block per finger, as wide as CALVIN's fingers where they meet the handles;
# what is seen tapers towards the tip.
_FINGER_COLLISION = (
    ((0.020, 0.022, 0.045), (0.0, 0.0135, 0.0225)),
    ((0.029, 0.0175, 0.0616), (0.0, 0.00925, 0.0658)),
)
_FINGER_VISUAL = (
    ((0.022, 0.020, 0.036), (0.0, 0.0130, 0.018)),
    ((0.020, 0.013, 0.034), (0.0, 0.0085, 0.050)),
    ((0.018, 0.007, 0.034), (0.0, 0.0045, 0.082)),
)


def _box_elements(tag: str, side: int) -> list[ET.Element]:
    found = []
    for size, (x, y, z) in _FINGER_VISUAL if tag == "visual" else _FINGER_COLLISION:
        element = ET.Element(tag)
        ET.SubElement(element, "origin", xyz=f"{x} {side * y} {z}", rpy="0 0 0")
        geometry = ET.SubElement(element, "geometry")
        ET.SubElement(geometry, "box", size=" ".join(map(str, size)))
        found.append(element)
    return found


def _pedestal() -> ET.Element:
    element = ET.Element("visual")
    ET.SubElement(element, "origin", xyz=f"0 0 {-BASE_POSITION[2] / 2}", rpy="0 0 0")
    geometry = ET.SubElement(element, "geometry")
    ET.SubElement(geometry, "cylinder", radius="0.13", length=str(BASE_POSITION[2]))
    return element


def panda_urdf(franka_folder: str | os.PathLike[str]) -> str:
    """The robot as a URDF text with absolute mesh paths.

    Args:
        franka_folder: `pybullet_data`'s `franka_panda` folder (`panda.urdf` and `meshes`).
    """
    folder = Path(franka_folder).resolve()
    text = (folder / "panda.urdf").read_text()
    text = text.replace("meshes/visual/", "meshes/collision/")
    text = text.replace("package://meshes", (folder / "meshes").as_posix())
    root = ET.fromstring(text)
    for name, side in (("panda_leftfinger", 1), ("panda_rightfinger", -1)):
        link = root.find(f"link[@name='{name}']")
        assert link is not None
        for tag in ("visual", "collision"):
            for old in link.findall(tag):
                link.remove(old)
            link.extend(_box_elements(tag, side))
    base = root.find("link[@name='panda_link0']")
    assert base is not None
    base.append(_pedestal())
    tcp = root.find("joint[@name='panda_grasptarget_hand']/origin")
    assert tcp is not None
    tcp.set("xyz", "0 0 0.14")
    return ET.tostring(root, encoding="unicode")


class Panda:
    """The robot in one PyBullet client.

    Attributes:
        target_pos: `[3]` running target of the tool point (m, world).
        target_euler: `[3]` its Euler angles xyz (rad), added up componentwise, never wrapped.
    """

    def __init__(self, bullet: Any, client: int, urdf: str) -> None:
        self._p, self._client = bullet, client
        self.body = bullet.loadURDF(urdf, BASE_POSITION, useFixedBase=True, physicsClientId=client)
        gear = bullet.createConstraint(
            self.body, FINGERS[0], self.body, FINGERS[1], bullet.JOINT_GEAR,
            [0, 1, 0], [0, 0, 0], [0, 0, 0], physicsClientId=client,
        )  # fmt: skip
        bullet.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50, physicsClientId=client)
        self._ik_limits = {
            "lowerLimits": [-7.0] * 9,
            "upperLimits": [7.0] * 9,
            "jointRanges": [7.0] * 9,
            "restPoses": [*REST_JOINTS, 0.0, 0.0],
        }
        self.gripper_action = 1.0
        self.target_pos = np.zeros(3)
        self.target_euler = np.zeros(3)

    def reset(self, joints: ArrayLike, width: float, gripper_action: float) -> None:
        """Puts the arm at `joints` `[7]` (rad), fingers `width` apart (m), target re-read."""
        half = float(np.clip(width, 0.0, MAX_WIDTH)) / 2
        goal = (*np.asarray(joints, float), half, half)
        for index, value in zip((*ARM, *FINGERS), goal, strict=True):
            self._p.resetJointState(self.body, index, value, 0.0, physicsClientId=self._client)
        self.gripper_action = 1.0 if gripper_action >= 0 else -1.0
        self._command(np.asarray(joints, float), (half, half), 200.0)
        pos, quat = self._tcp_state()
        self.target_pos = np.array(pos)
        self.target_euler = np.array(self._p.getEulerFromQuaternion(quat))

    def _command(
        self, joints: NDArray[np.float64], fingers: tuple[float, float], force: float
    ) -> None:
        p = self._p
        for index, value in zip(ARM, joints, strict=True):  # the array call lacks maxVelocity
            p.setJointMotorControl2(
                self.body, index, p.POSITION_CONTROL, value, force=200.0, maxVelocity=2.0,
                physicsClientId=self._client,
            )  # fmt: skip
        for index, value in zip(FINGERS, fingers, strict=True):
            p.setJointMotorControl2(
                self.body, index, p.POSITION_CONTROL, value, force=force, maxVelocity=1.0,
                physicsClientId=self._client,
            )  # fmt: skip

    def _tcp_state(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        state = self._p.getLinkState(self.body, TCP, physicsClientId=self._client)
        return state[0], state[1]

    def solve_ik(self, pos: ArrayLike, euler: ArrayLike) -> NDArray[np.float64]:
        """Joints `[7]` (rad, within the Franka's limits) that bring the tool near a pose.

        One null-space solve from the present joints; far targets need several moves.
        """
        quat = self._p.getQuaternionFromEuler(np.asarray(euler, float).tolist())
        found = self._p.calculateInverseKinematics(
            self.body, TCP, np.asarray(pos, float).tolist(), quat,
            physicsClientId=self._client, **self._ik_limits,
        )  # fmt: skip
        return np.clip(found[:7], JOINT_LOW, JOINT_HIGH)

    def apply(self, action: NDArray[np.floating]) -> None:
        """Adds `action[:6]` (units of 2 cm and 0.05 rad) to the target and commands the motors.

        `action[6]` opens (>= 0) or closes the fingers; motors keep their goal for the whole step.
        """
        self.target_pos = self.target_pos + action[:3] * POS_SCALE
        self.target_euler = self.target_euler + action[3:6] * ORN_SCALE
        self.gripper_action = 1.0 if action[6] >= 0 else -1.0
        opening = self.gripper_action > 0
        half = MAX_WIDTH / 2 if opening else 0.0
        joints = self.solve_ik(self.target_pos, self.target_euler)
        self._command(joints, (half, half), 2.0 if opening else 200.0)

    def observe(self) -> NDArray[np.float64]:
        """robot_obs `[15]`: tcp xyz, its Euler xyz, finger width, joints, gripper action."""
        pos, quat = self._tcp_state()
        states = self._p.getJointStates(self.body, (*ARM, *FINGERS), physicsClientId=self._client)
        q = [s[0] for s in states]
        euler = self._p.getEulerFromQuaternion(quat)
        return np.array([*pos, *euler, q[7] + q[8], *q[:7], self.gripper_action])

    def tcp(self) -> NDArray[np.float64]:
        """Measured position of the tool point `[3]` (m, world)."""
        return np.array(self._tcp_state()[0])

    def wrist_view(self) -> list[float]:
        """View matrix of the wrist camera, 16 numbers in column order."""
        pos, quat = self._tcp_state()
        rotation = np.array(self._p.getMatrixFromQuaternion(quat)).reshape(3, 3)
        inverse = np.eye(4)
        inverse[:3, :3] = rotation.T
        inverse[:3, 3] = -rotation.T @ np.array(pos)
        return (WRIST_VIEW @ inverse).T.ravel().tolist()


def wrap_angle(angle: ArrayLike) -> NDArray[np.float64]:
    """Angles (rad) moved into [-pi, pi)."""
    return (np.asarray(angle, float) + math.pi) % (2 * math.pi) - math.pi

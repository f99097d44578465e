"""Geometry of the play table, written as numbers: boxes and cylinders turned into URDF texts.

The measures are those of CALVIN's scene D (its table at scale 0.8, placed at the origin): the x
axis runs along the table, y away from the robot, z up, all in metres. The upper unit leans back by
30 degrees, and the switch and the door's handle follow that slope. Handles and finger tips were
fitted until actions recorded in CALVIN move the fixtures here as they did there (within 1 to 5 mm).
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAN = math.pi / 6  # slope of the upper unit's front against the vertical
UP_SLOPE = (0.0, math.sin(LEAN), math.cos(LEAN))
TILT = (-LEAN, 0.0, 0.0)  # rpy that turns a box's z axis along UP_SLOPE
FRONT = (0.0, 0.075, 0.535)  # a point of the leaning front
DARK, WOOD = "dark", "wood"
COLORS: dict[str, tuple[float, float, float, float]] = {
    DARK: (0.38, 0.38, 0.38, 1.0),
    WOOD: (0.72, 0.53, 0.35, 1.0),
    "groove": (0.50, 0.36, 0.22, 1.0),
    "black": (0.02, 0.02, 0.02, 1.0),
    "white": (1.0, 1.0, 1.0, 1.0),
}
LED_COLORS = ((1.0, 1.0, 1.0, 1.0), (0.0, 1.0, 0.0, 1.0))  # off, on
BULB_COLORS = ((1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 0.0, 1.0))
FLOOR_HALF, FLOOR_TILE = 4.0, 0.5


class Part(NamedTuple):
    """One solid in its link's frame; `size` is box edges, (radius, length) or (radius,)."""

    shape: str
    size: tuple[float, ...]
    xyz: tuple[float, float, float]
    color: str
    rpy: tuple[float, float, float] = (0.0, 0.0, 0.0)
    collide: bool = True
    visible: bool = True


class Link(NamedTuple):
    """A link whose frame stands at `origin` (world, joint 0) and moves along `axis`."""

    name: str
    origin: tuple[float, float, float]
    parts: tuple[Part, ...]
    axis: tuple[float, float, float] | None = None
    upper: float = 0.0
    mass: float = 0.1


def _box(lo: tuple, hi: tuple, color: str, origin: tuple = (0.0, 0.0, 0.0), **kw) -> Part:
    """An upright box between two world corners, for a link at `origin`."""
    size = tuple(b - a for a, b in zip(lo, hi, strict=True))
    mid = tuple((a + b) / 2 - o for a, b, o in zip(lo, hi, origin, strict=True))
    return Part("box", size, mid, color, **kw)


def _slope_box(x: tuple, s: tuple, n: tuple, color: str, at: tuple = (0.0, 0.0, 0.0), **kw) -> Part:
    """A box leaning with the front: x range, s along the slope, n outward, all from `at`."""
    ms, mn = (s[0] + s[1]) / 2, (n[0] + n[1]) / 2
    y = at[1] + ms * math.sin(LEAN) - mn * math.cos(LEAN)
    z = at[2] + ms * math.cos(LEAN) + mn * math.sin(LEAN)
    size = (x[1] - x[0], n[1] - n[0], s[1] - s[0])
    return Part("box", size, ((x[0] + x[1]) / 2, y, z), color, TILT, **kw)


BASE = Link(
    "base",
    (0.0, 0.0, 0.0),
    (
        _box((-0.44, -0.18, 0.42), (0.44, 0.18, 0.44), WOOD),  # table top
        _box((-0.38, 0.05, 0.44), (0.18, 0.165, 0.441), WOOD),  # shelf behind the door
        _box((-0.44, -0.18, 0.325), (-0.012, -0.165, 0.42), WOOD),  # front beside the drawer
        _box((0.372, -0.18, 0.325), (0.44, -0.165, 0.42), WOOD),
        _box((-0.44, -0.165, 0.325), (-0.42, 0.18, 0.42), WOOD),  # sides and back
        _box((0.42, -0.165, 0.325), (0.44, 0.18, 0.42), WOOD),
        _box((-0.42, 0.165, 0.325), (0.42, 0.18, 0.42), WOOD),
        *(
            _box((x - 0.02, y - 0.02, 0.0), (x + 0.02, y + 0.02, 0.33), WOOD)  # legs
            for x in (-0.41, 0.41)
            for y in (-0.15, 0.15)
        ),
        _box((-0.44, 0.165, 0.44), (0.44, 0.18, 0.62), WOOD),  # upper unit: back, top, sides
        _box((-0.44, 0.125, 0.62), (0.44, 0.18, 0.645), WOOD),
        _slope_box((-0.44, -0.39), (-0.11, 0.10), (-0.07, 0.005), WOOD, FRONT),
        _box((-0.44, 0.07, 0.44), (-0.39, 0.165, 0.53), WOOD),
        _box((-0.44, 0.12, 0.53), (-0.39, 0.165, 0.62), WOOD),
        _slope_box((0.18, 0.44), (-0.11, 0.103), (-0.02, 0.0), WOOD, FRONT),  # switch panel
        *(
            _slope_box((x, x + 0.012), (-0.02, 0.08), (0.0, 0.001), "groove", FRONT, collide=False)
            for x in (0.262, 0.326)  # slots of the switch
        ),
    ),
)
ROOT = Link("root", (0.0, 0.0, 0.0), ())
DRAWER = (0.18, 0.0, 0.32)
LINKS: tuple[Link, ...] = (
    Link(
        "button",
        (-0.12, -0.12, 0.46),
        (Part("cylinder", (0.033, 0.025), (0.0, 0.0, 0.0125), "black"),),
        (0.0, 0.0, -1.0),
        0.02,
    ),
    Link(
        "switch",
        (0.30, 0.061, 0.495),
        (
            # What the fingers feel is thinner than what the eye sees: fitted to recorded pushes.
            _box((-0.06, -0.051, 0.020), (0.06, -0.037, 0.044), DARK, visible=False),
            _box((-0.06, -0.037, 0.020), (-0.04, 0.02, 0.044), DARK, visible=False),
            _box((0.04, -0.037, 0.020), (0.06, 0.02, 0.044), DARK, visible=False),
            _slope_box((-0.06, 0.06), (-0.008, 0.026), (0.036, 0.054), DARK, collide=False),
            _slope_box((-0.06, -0.04), (-0.008, 0.026), (0.0, 0.036), DARK, collide=False),
            _slope_box((0.04, 0.06), (-0.008, 0.026), (0.0, 0.036), DARK, collide=False),
        ),
        UP_SLOPE,
        0.088,
    ),
    Link(
        "slide",
        (-0.10, 0.075, 0.535),
        (
            _slope_box((0.0, 0.28), (-0.105, 0.103), (0.001, 0.006), WOOD),  # the door
            _slope_box((0.122, 0.162), (-0.076, 0.076), (0.05, 0.07), DARK),  # bar and posts
            _slope_box((0.122, 0.162), (-0.076, -0.056), (0.0, 0.05), DARK),
            _slope_box((0.122, 0.162), (0.056, 0.076), (0.0, 0.05), DARK),
        ),
        (-1.0, 0.0, 0.0),
        0.28,
        2.0,  # heavy enough to glide on for 2 cm when the tool leaves, as recorded
    ),
    Link(
        "drawer",
        DRAWER,
        (
            _box((-0.01, -0.18, 0.305), (0.37, -0.165, 0.415), WOOD, DRAWER),
            _box((-0.01, -0.165, 0.305), (0.37, 0.12, 0.315), WOOD, DRAWER),
            _box((-0.01, -0.165, 0.315), (0.01, 0.12, 0.40), WOOD, DRAWER),
            _box((0.35, -0.165, 0.315), (0.37, 0.12, 0.40), WOOD, DRAWER),
            _box((0.01, 0.105, 0.315), (0.35, 0.12, 0.40), WOOD, DRAWER),
            _box((0.06, -0.26, 0.34), (0.30, -0.24, 0.38), DARK, DRAWER),  # bar and posts
            _box((0.06, -0.24, 0.34), (0.08, -0.18, 0.38), DARK, DRAWER),
            _box((0.28, -0.24, 0.34), (0.30, -0.18, 0.38), DARK, DRAWER),
        ),
        (0.0, -1.0, 0.0),
        0.22,
        1.0,
    ),
    Link(
        "led",
        (-0.12, 0.16, 0.648),
        (Part("box", (0.16, 0.045, 0.016), (0.0, -0.005, 0.005), "white"),),
    ),
    Link("light", (0.30, 0.132, 0.648), (Part("sphere", (0.028,), (0.0, 0.03, 0.025), "white"),)),
    Link(
        "button_base",
        (-0.12, -0.12, 0.44),
        (Part("cylinder", (0.038, 0.03), (0.0, 0.0, 0.015), WOOD, collide=False),),
    ),
)
JOINT_UPPER = {link.name: link.upper for link in LINKS if link.axis is not None}

BLOCKS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float, float]]] = {
    "red": ((0.056, 0.04, 0.04), (1.0, 0.0, 0.0, 1.0)),
    "blue": ((0.04, 0.04, 0.04), (0.0, 0.0, 1.0, 1.0)),
    "pink": ((0.08, 0.04, 0.04), (1.0, 0.0, 1.0, 1.0)),
}
BLOCK_MASS = 1.0


def _numbers(values) -> str:
    return " ".join(f"{float(v):.6g}" for v in np.atleast_1d(values))


def _geometry(part: Part) -> str:
    if part.shape == "box":
        inner = f'<box size="{_numbers(part.size)}"/>'
    elif part.shape == "cylinder":
        inner = f'<cylinder radius="{part.size[0]:.6g}" length="{part.size[1]:.6g}"/>'
    else:
        inner = f'<sphere radius="{part.size[0]:.6g}"/>'
    place = f'<origin xyz="{_numbers(part.xyz)}" rpy="{_numbers(part.rpy)}"/>'
    return f"{place}<geometry>{inner}</geometry>"


def _link_xml(link: Link) -> str:
    rows = [
        f'<link name="{link.name}"><inertial><origin xyz="0 0 0"/><mass value="{link.mass}"/>'
        '<inertia ixx="0.01" ixy="0" ixz="0" iyy="0.01" iyz="0" izz="0.01"/></inertial>'
    ]
    for part in link.parts:
        if part.visible:
            rgba = _numbers(COLORS[part.color])
            rows.append(
                f"<visual>{_geometry(part)}"
                f'<material name="{part.color}"><color rgba="{rgba}"/></material></visual>'
            )
        if part.collide:
            rows.append(f"<collision>{_geometry(part)}</collision>")
    return "".join(rows) + "</link>"


def furniture_urdf() -> str:
    """Everything that never moves, as a URDF text with one link.

    A body of its own: contacts of the blocks then do not involve the joints of the fixtures.
    """
    return f'<?xml version="1.0"?>\n<robot name="furniture">{_link_xml(BASE)}</robot>\n'


def fixtures_urdf() -> str:
    """Everything that moves or lights up, as a URDF text.

    Joints carry their link's name: prismatic `button`, `switch`, `slide` and `drawer`
    (ranges in `JOINT_UPPER`), fixed `led`, `light` and `button_base`.
    """
    rows = ['<?xml version="1.0"?>', '<robot name="fixtures">', _link_xml(ROOT)]
    for link in LINKS:
        rows.append(_link_xml(link))
        kind = "fixed" if link.axis is None else "prismatic"
        motion = ""
        if link.axis is not None:
            motion = (
                f'<axis xyz="{_numbers(link.axis)}"/>'
                f'<limit lower="0" upper="{link.upper}" effort="100" velocity="10"/>'
            )
        rows.append(
            f'<joint name="{link.name}" type="{kind}"><parent link="root"/>'
            f'<child link="{link.name}"/><origin xyz="{_numbers(link.origin)}"/>{motion}</joint>'
        )
    return "\n".join([*rows, "</robot>", ""])


def wood_texture(size: int = 96) -> NDArray[np.uint8]:
    """A grain along x in shades of grey, uint8 `[size, size, 3]`; multiplies the part's color."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0 : 1 : 1j * size, 0 : 1 : 1j * size]
    grain = np.zeros((size, size))
    for k in range(1, 6):
        bend = 0.3 * np.sin(2 * np.pi * (x * rng.integers(1, 3) + rng.random()))
        waves = rng.integers(2, 6) * k * y + bend + rng.random()
        grain += 0.8**k * np.sin(2 * np.pi * waves)
    grain = (grain - grain.min()) / np.ptp(grain)
    return (255 * (0.72 + 0.28 * grain))[..., None].repeat(3, 2).astype(np.uint8)


def floor_texture() -> NDArray[np.uint8]:
    """Tiles of `FLOOR_TILE` metres, one pixel each, uint8 `[n, n, 3]`."""
    n = round(2 * FLOOR_HALF / FLOOR_TILE)
    odd = np.indices((n, n)).sum(0) % 2
    return np.where(odd[..., None] == 1, 255, 222).repeat(3, 2).astype(np.uint8)


def tga_bytes(image: NDArray[np.uint8]) -> bytes:
    """An uncompressed TGA file, which PyBullet reads. `image`: uint8 `[h, w, 3]`."""
    height, width = image.shape[:2]
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, 24, 0x20)
    return header + image[..., ::-1].tobytes()

"""Geometry of the play table, written as numbers: boxes and cylinders turned into a URDF text.

The measures are those of CALVIN's scene D (its table at scale 0.8, placed at the origin): the x
axis runs along the table, y away from the robot, z up, all in metres. The upper unit leans back by
30 degrees, and both the switch and the handles follow that slope.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LEAN = math.pi / 6  # slope of the upper unit's front against the vertical
UP_SLOPE = (0.0, math.sin(LEAN), math.cos(LEAN))
TILT = (-LEAN, 0.0, 0.0)  # rpy that turns a box's z axis along UP_SLOPE
DARK, WOOD, PANEL, SHELF = "dark", "wood", "panel", "shelf"
COLORS: dict[str, tuple[float, float, float, float]] = {
    DARK: (0.27, 0.27, 0.27, 1.0),
    WOOD: (0.66, 0.48, 0.30, 1.0),
    PANEL: (0.47, 0.34, 0.20, 1.0),
    SHELF: (0.58, 0.42, 0.26, 1.0),
    "black": (0.02, 0.02, 0.02, 1.0),
    "white": (1.0, 1.0, 1.0, 1.0),
}
LED_COLORS = ((1.0, 1.0, 1.0, 1.0), (0.0, 1.0, 0.0, 1.0))  # off, on
BULB_COLORS = ((1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 0.0, 1.0))


class Part(NamedTuple):
    """One solid, placed in its link's frame. ``size``: box edges, or (radius, length), or (radius,)."""

    shape: str
    size: tuple[float, ...]
    xyz: tuple[float, float, float]
    color: str
    rpy: tuple[float, float, float] = (0.0, 0.0, 0.0)
    collide: bool = True


class Link(NamedTuple):
    """A link whose frame stands at ``origin`` (world, joint 0) and moves along ``axis`` to ``upper``."""

    name: str
    origin: tuple[float, float, float]
    parts: tuple[Part, ...]
    axis: tuple[float, float, float] | None = None
    upper: float = 0.0
    mass: float = 0.1


def _box(lo: tuple, hi: tuple, color: str, origin: tuple = (0.0, 0.0, 0.0), **kw) -> Part:
    """An upright box between two world corners, for a link at ``origin``."""
    size = tuple(b - a for a, b in zip(lo, hi, strict=True))
    mid = tuple((a + b) / 2 - o for a, b, o in zip(lo, hi, origin, strict=True))
    return Part("box", size, mid, color, **kw)


def _slope_box(x: tuple, s: tuple, n: tuple, color: str, **kw) -> Part:
    """A box leaning with the front: x range, s along the slope, n outward from it (link frame)."""
    ms, mn = (s[0] + s[1]) / 2, (n[0] + n[1]) / 2
    y = ms * math.sin(LEAN) - mn * math.cos(LEAN)
    z = ms * math.cos(LEAN) + mn * math.sin(LEAN)
    size = (x[1] - x[0], n[1] - n[0], s[1] - s[0])
    return Part("box", size, ((x[0] + x[1]) / 2, y, z), color, TILT, **kw)


def _handle_slope(x: tuple, s: tuple, n: tuple, post: float, along_x: bool) -> tuple[Part, ...]:
    """A U-shaped handle on the slope: a bar (x, s, n ranges) and two posts back to n = 0."""
    if along_x:
        posts = [((x[0], x[0] + post), s), ((x[1] - post, x[1]), s)]
    else:
        posts = [(x, (s[0], s[0] + post)), (x, (s[1] - post, s[1]))]
    return (
        _slope_box(x, s, n, DARK),
        *(_slope_box(px, ps, (0.0, n[0]), DARK) for px, ps in posts),
    )


DRAWER0 = (0.18, 0.0, 0.32)
BASE = Link(
    "base",
    (0.0, 0.0, 0.0),
    (
        _box((-0.44, -0.18, 0.42), (0.44, 0.18, 0.44), WOOD),  # table top
        _box((-0.38, 0.05, 0.44), (0.18, 0.165, 0.441), WOOD),  # shelf behind the door
        _box((-0.44, -0.18, 0.34), (-0.02, -0.165, 0.42), PANEL),  # front, left of the drawer
        _box((0.38, -0.18, 0.34), (0.44, -0.165, 0.42), PANEL),
        _box((-0.44, -0.165, 0.34), (-0.42, 0.18, 0.42), PANEL),  # sides and back
        _box((0.42, -0.165, 0.34), (0.44, 0.18, 0.42), PANEL),
        _box((-0.42, 0.165, 0.34), (0.42, 0.18, 0.42), PANEL),
        *(
            Part("box", (0.04, 0.04, 0.38), (x, y, 0.17), PANEL, rpy)
            for x, y, rpy in (
                (-0.40, -0.14, (0.0, 0.0, 0.0)),
                (0.40, -0.14, (0.0, 0.0, 0.0)),
                (-0.40, 0.14, (0.0, 0.0, 0.0)),
                (0.40, 0.14, (0.0, 0.0, 0.0)),
            )
        ),
        _box((-0.44, 0.165, 0.44), (0.44, 0.18, 0.62), SHELF),  # back of the upper unit
        _box((-0.44, 0.13, 0.62), (0.44, 0.18, 0.64), WOOD),  # its top
        *(_slope_box((x, x + 0.06), (-0.11, 0.103), (-0.03, 0.0), PANEL) for x in (-0.44,)),
        _box((-0.44, 0.10, 0.44), (-0.38, 0.165, 0.62), PANEL),
        _slope_box((0.18, 0.44), (-0.11, 0.103), (-0.02, 0.0), PANEL),  # panel of the switch
    ),
)
# The slope's parts above are written against a point on the front: (y, z) = (0.075, 0.535).
FRONT = (0.0, 0.075, 0.535)


def _shift(part: Part, by: tuple[float, float, float]) -> Part:
    return part._replace(xyz=tuple(a + b for a, b in zip(part.xyz, by, strict=True)))


BASE = BASE._replace(parts=tuple(_shift(q, FRONT) if q.rpy == TILT else q for q in BASE.parts))
ROOT = Link("root", (0.0, 0.0, 0.0), ())
LINKS: tuple[Link, ...] = (
    Link(
        "button",
        (-0.12, -0.12, 0.46),
        (Part("cylinder", (0.036, 0.025), (0.0, 0.0, 0.0125), "black"),),
        (0.0, 0.0, -1.0),
        0.02,
    ),
    Link(
        "switch",
        (0.30, 0.061, 0.495),
        (
            _box((-0.06, -0.051, 0.020), (0.06, -0.037, 0.044), DARK),
            _box((-0.06, -0.037, 0.020), (-0.04, 0.02, 0.044), DARK),
            _box((0.04, -0.037, 0.020), (0.06, 0.02, 0.044), DARK),
        ),
        UP_SLOPE,
        0.088,
    ),
    Link(
        "slide",
        (-0.10, 0.075, 0.535),
        (
            _slope_box((0.0, 0.28), (-0.105, 0.103), (0.001, 0.006), PANEL),
            *_handle_slope((0.122, 0.162), (-0.076, 0.076), (0.05, 0.07), 0.02, along_x=False),
        ),
        (-1.0, 0.0, 0.0),
        0.28,
        2.0,
    ),
    Link(
        "drawer",
        DRAWER0,
        (
            _box((-0.01, -0.18, 0.28), (0.37, -0.165, 0.41), PANEL, DRAWER0),
            _box((-0.01, -0.165, 0.28), (0.37, 0.12, 0.29), WOOD, DRAWER0),
            _box((-0.01, -0.165, 0.29), (0.01, 0.12, 0.38), PANEL, DRAWER0),
            _box((0.35, -0.165, 0.29), (0.37, 0.12, 0.38), PANEL, DRAWER0),
            _box((0.01, 0.105, 0.29), (0.35, 0.12, 0.38), PANEL, DRAWER0),
            _box((0.06, -0.26, 0.34), (0.30, -0.24, 0.38), DARK, DRAWER0),
            _box((0.06, -0.24, 0.34), (0.08, -0.18, 0.38), DARK, DRAWER0),
            _box((0.28, -0.24, 0.34), (0.30, -0.18, 0.38), DARK, DRAWER0),
        ),
        (0.0, -1.0, 0.0),
        0.22,
        1.0,
    ),
    Link(
        "led",
        (-0.12, 0.16, 0.648),
        (Part("box", (0.14, 0.05, 0.016), (0.0, 0.0, 0.0), "white"),),
    ),
    Link(
        "light",
        (0.30, 0.132, 0.648),
        (Part("sphere", (0.028,), (0.0, 0.03, 0.03), "white"),),
    ),
    Link(
        "button_base",
        (-0.12, -0.12, 0.44),
        (Part("cylinder", (0.042, 0.02), (0.0, 0.0, 0.01), PANEL),),
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

    Joints carry their link's name: prismatic ``button``, ``switch``, ``slide`` and ``drawer``
    (ranges in ``JOINT_UPPER``), fixed ``led``, ``light`` and ``button_base``.
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

"""Names of the eight skills and how many demonstrations their base policies get."""

from __future__ import annotations

import types
from typing import Literal

TaskName = Literal[
    "open_drawer",
    "close_drawer",
    "move_slider_left",
    "move_slider_right",
    "turn_on_lightbulb",
    "turn_off_lightbulb",
    "turn_on_led",
    "turn_off_led",
]


SKILL_DEMOS = types.MappingProxyType(
    {
        "open_drawer": 1,
        "close_drawer": 1,
        "move_slider_left": 5,
        "move_slider_right": 2,
        "turn_on_lightbulb": 2,
        "turn_off_lightbulb": 2,
        "turn_on_led": 1,
        "turn_off_led": 5,
    }
)
"""Demonstrations of each skill where `collect.demos` is 0."""

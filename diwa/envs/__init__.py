"""Environments: the embedded play table, the adapter over CALVIN, and imagined ones.

Importing this package needs neither PyBullet nor Gymnasium; simulators are loaded when asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from diwa.envs.tasks import TASKS, task_success

if TYPE_CHECKING:
    from diwa.envs.calvin import CalvinEnv
    from diwa.envs.playtable import PlayTable, env_steps_taken
    from diwa.envs.simulator import Simulator

__all__ = [
    "TASKS",
    "CalvinEnv",
    "PlayTable",
    "SimulatorSpec",
    "env_steps_taken",
    "make_env",
    "task_success",
]

SIMULATORS = {"playtable": "PlayTable", "calvin": "CalvinEnv"}
"""Name, as in `--env`, of each simulator -> its class in the module of that name."""


def make_env(name: str, **options: Any) -> Simulator:
    """A simulator by name, with the options of `diwa.envs.simulator.Simulator`.

    Raises:
        ValueError: unknown name.
        SimulatorError: CALVIN is asked for and cannot be had.
    """
    import importlib

    if name not in SIMULATORS:
        raise ValueError(f"unknown simulator {name!r}; known: {', '.join(SIMULATORS)}")
    module = importlib.import_module(f"diwa.envs.{name}")
    return getattr(module, SIMULATORS[name])(**options)


class SimulatorSpec(NamedTuple):
    """Which simulator, and what it lets see.

    Attributes:
        name: as in `--env`.
        image_size: edge of the pictures of both cameras in pixels; 0 renders none.
    """

    name: str = "playtable"
    image_size: int = 0

    def make(self, **options: Any) -> Simulator:
        """`make_env` of it, with further options."""
        pictures = {"cameras": True, "image_size": self.image_size} if self.image_size else {}
        return make_env(self.name, **pictures, **options)


def __getattr__(name: str) -> Any:
    if name in ("PlayTable", "env_steps_taken"):
        from diwa.envs import playtable

        return getattr(playtable, name)
    if name == "CalvinEnv":
        from diwa.envs.calvin import CalvinEnv

        return CalvinEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

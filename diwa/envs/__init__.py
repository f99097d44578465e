"""Environments: the embedded play table, the adapter over CALVIN, and imagined ones.

Importing this package needs neither PyBullet nor Gymnasium; simulators are loaded when asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diwa.envs.tasks import TASKS, task_success

if TYPE_CHECKING:
    from diwa.envs.calvin import CalvinEnv
    from diwa.envs.playtable import PlayTable, env_steps_taken
    from diwa.envs.simulator import Simulator

__all__ = ["TASKS", "CalvinEnv", "PlayTable", "env_steps_taken", "make_env", "task_success"]

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


def __getattr__(name: str) -> Any:
    if name in ("PlayTable", "env_steps_taken"):
        from diwa.envs import playtable

        return getattr(playtable, name)
    if name == "CalvinEnv":
        from diwa.envs.calvin import CalvinEnv

        return CalvinEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

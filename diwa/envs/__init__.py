"""Environments: the embedded play table, the adapter over CALVIN, and imagined ones.

Importing this package needs neither PyBullet nor Gymnasium; `PlayTable` is loaded when asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diwa.envs.tasks import TASKS, task_success

if TYPE_CHECKING:
    from diwa.envs.playtable import PlayTable, env_steps_taken

__all__ = ["TASKS", "PlayTable", "env_steps_taken", "task_success"]


def __getattr__(name: str) -> Any:
    if name in ("PlayTable", "env_steps_taken"):
        from diwa.envs import playtable

        return getattr(playtable, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Episodes on disk: flat memory-mapped arrays beside one JSON index.

Layout of a store folder::

    index.json            lengths, tasks, column sizes, number of frames
    robot_obs.npy         [n, 15] float32
    scene_obs.npy         [n, 24] float32
    action.npy            [n, 7]  float32, action taken after that frame (neutral at the last one)
    success.npy           [n]     bool

Frames of all episodes stand one after another; an episode of T actions has T + 1 frames.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diwa.errors import StoreError

NEUTRAL_ACTION = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)
"""No motion, gripper open (method section 1.1)."""

_COLUMNS = {"robot_obs": (15,), "scene_obs": (24,), "action": (7,), "success": ()}


@dataclass
class Episode:
    """One recorded episode of T actions.

    Attributes:
        robot_obs: `[T + 1, 15]` float32, metres and radians (CALVIN layout).
        scene_obs: `[T + 1, 24]` float32.
        action: `[T, 7]` float32 in [-1, 1]; `action[t]` is taken after frame t.
        success: `[T + 1]` bool, the task's oracle at each frame; None where there is no task.
        task: name of the skill, empty for play.
    """

    robot_obs: NDArray[np.float32]
    scene_obs: NDArray[np.float32]
    action: NDArray[np.float32]
    success: NDArray[np.bool_] | None = None
    task: str = ""

    def __len__(self) -> int:
        return len(self.action)

    def validate(self, name: str = "episode") -> None:
        """Raise StoreError if shapes disagree or a value is not finite."""
        frames = len(self.action) + 1
        for key, trailing in _COLUMNS.items():
            value = getattr(self, key)
            if key == "success" and value is None:
                continue
            expected = (frames - (key == "action"), *trailing)
            if np.shape(value) != expected:
                raise StoreError(f"{name}: {key} has shape {np.shape(value)}, expected {expected}")
            if not np.isfinite(value).all():
                raise StoreError(f"{name}: {key} holds NaN or infinity")


class EpisodeStore:
    """Read access to a store folder; arrays are memory-mapped.

    Args:
        path: the folder.

    Raises:
        StoreError: the folder is missing, truncated or of another layout; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index_file = self.path / "index.json"
        if not index_file.exists():
            raise StoreError(f"no episode store at {self.path}: run `diwa collect` first")
        try:
            index = json.loads(index_file.read_text())
            self.lengths = np.asarray(index["lengths"], dtype=np.int64)
            self.tasks: list[str] = index["tasks"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{index_file} is damaged ({error}); collect the data again") from None
        if (
            self.lengths.ndim != 1
            or (self.lengths < 0).any()
            or len(self.tasks) != len(self.lengths)
        ):
            raise StoreError(f"{index_file} contradicts itself; collect the data again")
        self.frames = int((self.lengths + 1).sum())
        self.starts = np.concatenate([[0], np.cumsum(self.lengths + 1)])[:-1]
        self.robot_obs = self._open("robot_obs")
        self.scene_obs = self._open("scene_obs")
        self.action = self._open("action")
        self.success = self._open("success")

    def _open(self, name: str) -> NDArray:
        file = self.path / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
            raise StoreError(
                f"{file} is missing or truncated ({error}); collect the data again"
            ) from None
        expected = (self.frames, *_COLUMNS[name])
        if array.shape != expected:
            raise StoreError(
                f"{file} has shape {array.shape}, index.json says {expected}; collect again"
            )
        return array

    @property
    def transitions(self) -> int:
        """Number of recorded actions."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Episode:
        if not -len(self) <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)}")
        first, length = int(self.starts[i]), int(self.lengths[i])
        frames = slice(first, first + length + 1)
        return Episode(
            robot_obs=np.asarray(self.robot_obs[frames]),
            scene_obs=np.asarray(self.scene_obs[frames]),
            action=np.asarray(self.action[first : first + length]),
            success=np.asarray(self.success[frames]),
            task=self.tasks[i],
        )

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))


def write_store(path: str | Path, episodes: Sequence[Episode]) -> EpisodeStore:
    """Write episodes as a new store folder, atomically (a folder beside it, then a rename).

    Raises:
        StoreError: no episodes, wrong shapes or values that are not finite.
    """
    path = Path(path)
    if not episodes:
        raise StoreError(f"nothing to write to {path}: no episodes")
    for i, episode in enumerate(episodes):
        episode.validate(f"episode {i} for {path}")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number
    partial.mkdir(parents=True)
    try:
        for name in ("robot_obs", "scene_obs"):
            stacked = np.concatenate([getattr(e, name) for e in episodes])
            np.save(partial / f"{name}.npy", stacked.astype(np.float32))
        actions = [np.concatenate([e.action, NEUTRAL_ACTION[None]]) for e in episodes]
        np.save(partial / "action.npy", np.concatenate(actions).astype(np.float32))
        success = [np.zeros(len(e) + 1, bool) if e.success is None else e.success for e in episodes]
        np.save(partial / "success.npy", np.concatenate(success).astype(bool))
        index = {"lengths": [len(e) for e in episodes], "tasks": [e.task for e in episodes]}
        (partial / "index.json").write_text(json.dumps(index))
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return EpisodeStore(path)

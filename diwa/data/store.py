"""Episodes on disk: flat memory-mapped arrays beside one JSON index.

Layout of a store folder::

    index.json            lengths, tasks, column sizes, number of frames
    robot_obs.npy         [n, 15] float32
    scene_obs.npy         [n, 24] float32
    action.npy            [n, 7]  float32, action taken after that frame (neutral at the last one)
    success.npy           [n]     bool
    NAME.npy              [n, ..] optional columns that index.json lists: pictures such as
                                  rgb_static and rgb_gripper [n, h, w, 3] uint8

Frames of all episodes stand one after another; an episode of T actions has T + 1 frames. Optional
columns are read on demand (`Column`), so a store may be larger than memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diwa.data.columns import Column
from diwa.errors import StoreError

NEUTRAL_ACTION = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)
"""No motion, gripper open (method section 1.1)."""

COLUMNS = {"robot_obs": (15,), "scene_obs": (24,), "action": (7,), "success": ()}


@dataclass
class Episode:
    """One recorded episode of T actions.

    Attributes:
        robot_obs: `[T + 1, 15]` float32, metres and radians (CALVIN layout).
        scene_obs: `[T + 1, 24]` float32.
        action: `[T, 7]` float32 in [-1, 1]; `action[t]` is taken after frame t.
        success: `[T + 1]` bool, the task's oracle at each frame; None where there is no task.
        task: name of the skill, empty for play.
        frames: camera -> `[T + 1, h, w, 3]` uint8 RGB; empty where there are no pictures.
    """

    robot_obs: NDArray[np.float32]
    scene_obs: NDArray[np.float32]
    action: NDArray[np.float32]
    success: NDArray[np.bool_] | None = None
    task: str = ""
    frames: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.action)

    def validate(self, name: str = "episode") -> None:
        """Raise StoreError if shapes disagree or a value is not finite."""
        frames = len(self.action) + 1
        for key, trailing in COLUMNS.items():
            value = getattr(self, key)
            if key == "success" and value is None:
                continue
            expected = (frames - (key == "action"), *trailing)
            if np.shape(value) != expected:
                raise StoreError(f"{name}: {key} has shape {np.shape(value)}, expected {expected}")
            if not np.isfinite(value).all():
                raise StoreError(f"{name}: {key} holds NaN or infinity")
        for camera, pictures in self.frames.items():
            check_column_name(camera)
            shape = np.shape(pictures)
            if pictures.dtype != np.uint8 or len(shape) != 4 or (shape[0], shape[3]) != (frames, 3):
                raise StoreError(
                    f"{name}: {camera} is {pictures.dtype} {shape}, expected uint8 "
                    f"({frames}, height, width, 3)"
                )


def check_column_name(name: str) -> str:
    """Returns `name` of an optional column; StoreError if it cannot be one."""
    if name in COLUMNS or not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise StoreError(f"{name!r} cannot be the name of a store column")
    return name


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
            self.source: dict[str, Any] = index.get("source", {})
            optional = [check_column_name(name) for name in index.get("columns", {})]
            shapes = {name: tuple(index["columns"][name]["shape"]) for name in optional}
            dtypes = {name: np.dtype(index["columns"][name]["dtype"]) for name in optional}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        self.columns = {name: self._column(name, shapes[name], dtypes[name]) for name in optional}

    @property
    def cameras(self) -> list[str]:
        """Names of the columns that hold pictures `[n, h, w, 3]` uint8."""
        return [
            name
            for name, column in self.columns.items()
            if column.dtype == np.uint8 and len(column.shape) == 4 and column.shape[3] == 3
        ]

    def _column(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Column:
        file = self.path / f"{name}.npy"
        try:
            column = Column(file)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(
                f"{file} is missing or truncated ({error}); make the store again"
            ) from None
        if (column.shape, column.dtype) != ((self.frames, *shape), dtype):
            raise StoreError(
                f"{file} is {column.dtype} {column.shape}, index.json says "
                f"{dtype} {(self.frames, *shape)}; make the store again"
            )
        return column

    def _open(self, name: str) -> NDArray:
        file = self.path / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
            raise StoreError(
                f"{file} is missing or truncated ({error}); collect the data again"
            ) from None
        expected = (self.frames, *COLUMNS[name])
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
            frames={camera: self.columns[camera].array[frames] for camera in self.cameras},
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
        index: dict[str, Any] = {
            "lengths": [len(e) for e in episodes],
            "tasks": [e.task for e in episodes],
        }
        if cameras := _common_cameras(episodes, path):
            index["columns"] = {}
            for camera, shape in cameras.items():
                pictures = np.concatenate([e.frames[camera] for e in episodes])
                np.save(partial / f"{camera}.npy", pictures)
                index["columns"][camera] = {"dtype": "uint8", "shape": list(shape)}
        (partial / "index.json").write_text(json.dumps(index))
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return EpisodeStore(path)


def _common_cameras(episodes: Sequence[Episode], path: Path) -> dict[str, tuple[int, ...]]:
    """Cameras of all episodes -> shape of a picture; StoreError where episodes disagree."""
    shapes = [{name: np.shape(f)[1:] for name, f in e.frames.items()} for e in episodes]
    for i, other in enumerate(shapes):
        if other != shapes[0]:
            raise StoreError(
                f"episode {i} for {path} has pictures {other}, episode 0 has {shapes[0]}"
            )
    return shapes[0]

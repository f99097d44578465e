"""LeRobot dataset (version 3) -> episode store, for data of one's own robot.

The store's columns are CALVIN's; a robot's own are put into them like this:

    action          action[t] leads from frame t to t + 1, so the last one of an episode is dropped;
                    7 numbers in [-1, 1]: motion of the tool and its rotation, gripper (open = +1)
    robot_obs       the first 15 numbers of the state, then zeros
    scene_obs       24 numbers of a feature where one is named, else zeros
    success         a feature where one is named; `next.success` is that of the frame after
    state [D]       all numbers of the state (an optional column)
    NAME [h, w, 3]  one optional column per camera
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diwa.data.calvin_convert import resize_area
from diwa.data.calvin_format import ProgressFn
from diwa.data.lerobot_format import PICTURES, LeRobotDataset, LeRobotEpisode
from diwa.data.store import COLUMNS, NEUTRAL_ACTION, EpisodeStore, check_column_name
from diwa.data.video_reader import VideoReader
from diwa.data.writer import Layout, StoreWriter
from diwa.envs.tasks import check_task
from diwa.errors import StoreError

COMMIT_FRAMES = 1024
STATE_COLUMN = "state"


@dataclass(frozen=True)
class LeRobotKeys:
    """Which features go where.

    Attributes:
        cameras: feature -> column of the store.
        action: feature of the actions.
        action_dims: which of its numbers, in the order of the store; all if empty.
        action_scale, action_offset: actions are multiplied, then shifted; one number or seven.
        state: feature of the robot's state; none if empty.
        scene: feature of the scene state (24 numbers); none if empty.
        success: feature that is true where the task is solved; none if empty.
    """

    cameras: Mapping[str, str]
    action: str = "action"
    action_dims: Sequence[int] = ()
    action_scale: Sequence[float] = (1.0,)
    action_offset: Sequence[float] = (0.0,)
    state: str = ""
    scene: str = ""
    success: str = ""


def parse_cameras(pairs: Sequence[str]) -> dict[str, str]:
    """`KEY=NAME` -> {feature: column}; without `=NAME` the column is the key's last part.

    Raises:
        StoreError: a name that cannot be one, or two cameras of one name.
    """
    cameras: dict[str, str] = {}
    for pair in pairs:
        key, _, name = pair.partition("=")
        name = check_column_name(name or re.sub(r"\W", "_", key.rpartition(".")[2]))
        if name in cameras.values() or name == STATE_COLUMN:
            raise StoreError(f"--camera {pair}: there is a column {name} already; name another")
        cameras[key] = name
    return cameras


def lerobot_to_store(
    dataset_path: str | Path,
    store_path: str | Path,
    keys: LeRobotKeys,
    *,
    task: str = "",
    sentence: str = "",
    size: int = 64,
    overwrite: bool = False,
    progress: ProgressFn | None = None,
) -> EpisodeStore:
    """Convert a dataset, one picture of each camera in memory at a time.

    The store appears when it is complete; a conversion that was killed goes on where it was. The
    rate and the sentences are kept in the store's `source`.

    Args:
        dataset_path: folder that holds `meta/`.
        store_path: store to make.
        keys: which features go where.
        task: skill that the episodes show, one of `diwa.envs.tasks.TASKS`; empty for play.
        sentence: only episodes that have this task in words; all if empty.
        size: pictures are shrunk to squares of this many pixels; 0 keeps their size.
        overwrite: replace an existing store.
        progress: called with (frames done, frames).

    Raises:
        ImportError: the extra `lerobot` is not installed.
        StoreError: something is missing, damaged or does not fit; the message names file and key.
    """
    if task:
        check_task(task)
    dataset = LeRobotDataset(dataset_path)
    _check_keys(dataset, keys)
    episodes = _chosen(dataset, sentence)
    readers = {key: VideoReader() for key in keys.cameras}
    try:
        layout = _layout(dataset, episodes, keys, readers, task, size)
        writer = StoreWriter(store_path, layout, overwrite)
        try:
            _copy(dataset, episodes, keys, readers, writer, size, progress)
            return writer.finish()
        finally:
            writer.close()
    finally:
        for reader in readers.values():
            reader.close()


def _check_keys(dataset: LeRobotDataset, keys: LeRobotKeys) -> None:
    """All features exist, before any time is spent."""
    for key in keys.cameras:
        dataset.feature(key, PICTURES)
    for key in (keys.action, keys.state, keys.scene, keys.success):
        if key:
            dataset.feature(key)
    width = COLUMNS["action"][0]
    for name, values in (("scale", keys.action_scale), ("offset", keys.action_offset)):
        if len(values) not in (1, width) or not np.isfinite(values).all():
            raise StoreError(f"--action-{name} takes 1 or {width} numbers, got {list(values)}")


def _chosen(dataset: LeRobotDataset, sentence: str) -> list[LeRobotEpisode]:
    chosen = [e for e in dataset.episodes if not sentence or sentence in e.sentences]
    if not chosen:
        there = sorted({s for e in dataset.episodes for s in e.sentences})
        raise StoreError(
            f"{dataset.path} has no episode of '{sentence}'; it has: {'; '.join(there) or 'none'}"
        )
    return chosen


def _layout(
    dataset: LeRobotDataset,
    episodes: Sequence[LeRobotEpisode],
    keys: LeRobotKeys,
    readers: Mapping[str, VideoReader],
    task: str,
    size: int,
) -> Layout:
    columns: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key, name in keys.cameras.items():
        shape: tuple[int, ...] = (size, size, 3)
        if not size:
            shape = next(dataset.pictures(episodes[0], key, readers[key])).shape
        columns[name] = "uint8", shape
    if keys.state:
        columns[STATE_COLUMN] = "float32", dataset.numbers(episodes[0], keys.state).shape[1:]
    source: dict[str, Any] = {
        "format": "lerobot",
        "dataset": dataset.path.name,
        "fps": dataset.fps,
        "episodes": [e.number for e in episodes],
        "sentences": [list(e.sentences) for e in episodes],
        "keys": {
            "cameras": dict(keys.cameras),
            "action": keys.action,
            "action_dims": list(keys.action_dims),
            "action_scale": list(keys.action_scale),
            "action_offset": list(keys.action_offset),
            "state": keys.state,
            "scene": keys.scene,
            "success": keys.success,
        },
    }
    return Layout([e.length - 1 for e in episodes], [task] * len(episodes), columns, source)


def _copy(
    dataset: LeRobotDataset,
    episodes: Sequence[LeRobotEpisode],
    keys: LeRobotKeys,
    readers: Mapping[str, VideoReader],
    writer: StoreWriter,
    size: int,
    progress: ProgressFn | None,
) -> None:
    row, first, total = writer.done, 0, writer.layout.frames
    try:
        for episode in episodes:
            if row >= first + episode.length:
                first += episode.length
                continue
            writer.write(first, _numbers(dataset, episode, keys, writer.layout))
            begin = row - first
            streams = {
                name: dataset.pictures(episode, key, readers[key], begin)
                for key, name in keys.cameras.items()
            }
            for t in range(begin, episode.length):
                for name, stream in streams.items():
                    shape = writer.layout.columns[name][1]
                    picture = _fit(next(stream), size, shape, episode, name, t)
                    writer.write(first + t, {name: picture[None]})
                row += 1
                if row % COMMIT_FRAMES == 0:
                    writer.commit(row)
                if progress is not None:
                    progress(row, total)
            first += episode.length
    finally:  # also when interrupted or at a damaged file: what is done is kept
        writer.commit(row)


def _fit(
    picture: NDArray[np.uint8],
    size: int,
    shape: tuple[int, ...],
    episode: LeRobotEpisode,
    name: str,
    t: int,
) -> NDArray[np.uint8]:
    """A picture in the store's size."""
    if picture.shape == shape:
        return picture
    where = f"{name} of episode {episode.number}, frame {t}"
    if not size:
        raise StoreError(f"{where} is {picture.shape}, the first one {shape}; give a --size")
    try:
        return resize_area(picture, size)
    except ValueError as error:
        raise StoreError(f"{where}: {error}; give a smaller --size") from None


def _numbers(
    dataset: LeRobotDataset, episode: LeRobotEpisode, keys: LeRobotKeys, layout: Layout
) -> dict[str, NDArray]:
    """The numeric columns `[length, D]` of an episode."""
    out: dict[str, NDArray] = {"action": _actions(dataset, episode, keys)}
    if keys.state:
        state = dataset.numbers(episode, keys.state)
        robot = np.zeros((episode.length, COLUMNS["robot_obs"][0]))
        width = min(robot.shape[1], state.shape[1])
        robot[:, :width] = state[:, :width]
        out |= {STATE_COLUMN: state, "robot_obs": robot}
    if keys.scene:
        out["scene_obs"] = dataset.numbers(episode, keys.scene)
    if keys.success:
        success = dataset.numbers(episode, keys.success)[:, 0] > 0
        if keys.success.startswith("next."):
            success = np.concatenate([[False], success[:-1]])
        out["success"] = success
    for name, key in ((STATE_COLUMN, keys.state), ("scene_obs", keys.scene)):
        shape = COLUMNS[name] if name in COLUMNS else layout.columns.get(name, ("", ()))[1]
        if name in out and out[name].shape[1:] != shape:
            raise StoreError(
                f"{episode.table}: {key} of episode {episode.number} has {out[name].shape[1]} "
                f"numbers, the store's {name} {shape[0]}"
            )
    return out


def _actions(
    dataset: LeRobotDataset, episode: LeRobotEpisode, keys: LeRobotKeys
) -> NDArray[np.float64]:
    """Actions `[length, 7]`, the last one neutral.

    Raises:
        StoreError: another number of them, or outside [-1, 1].
    """
    action, width = dataset.numbers(episode, keys.action), COLUMNS["action"][0]
    where = f"{episode.table}: {keys.action}"
    if keys.action_dims:
        if max(keys.action_dims) >= action.shape[1] or min(keys.action_dims) < 0:
            raise StoreError(
                f"{where} has {action.shape[1]} numbers, --action-dims are {[*keys.action_dims]}"
            )
        action = action[:, list(keys.action_dims)]
    if action.shape[1] != width:
        raise StoreError(
            f"{where} has {action.shape[1]} numbers, the store's action {width} (motion and "
            "rotation of the tool, gripper); choose and order them with --action-dims"
        )
    action = action * np.asarray(keys.action_scale) + np.asarray(keys.action_offset)
    used = action[:-1]
    if (np.abs(used) > 1).any():
        t, dim = (int(i) for i in np.argwhere(np.abs(used) > 1)[0])
        largest = ", ".join(f"{v:.3g}" for v in np.abs(used).max(0))
        raise StoreError(
            f"{where}[{dim}] is {used[t, dim]:g} in episode {episode.number}, frame {t}, outside "
            f"[-1, 1];\nthe largest of this episode are {largest}: bring them into range with "
            "--action-scale (and --action-offset)"
        )
    return np.concatenate([used, NEUTRAL_ACTION[None]])

"""CALVIN split -> episode store, once, and store -> CALVIN split.

Two kinds of store. The usual one holds what training needs: float32 states and actions, frames of
one small size. An *exact* one keeps every array as it was recorded (float64, full frames, depth),
so that the split can be written again bit for bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diwa.data.calvin_format import CAMERAS, SHAPES, SIDE_FILES, CalvinSplit, ProgressFn
from diwa.data.store import NEUTRAL_ACTION, Episode, EpisodeStore, write_store
from diwa.data.writer import Layout, StoreWriter
from diwa.errors import StoreError

SIDE_FOLDER = "calvin"
"""Where a store keeps the tables of the split it came from."""
_PREFIX = "source_"
_COMMIT_BYTES = 256 << 20
_MAX_COMMIT = 4096


def area_weights(source: int, target: int) -> NDArray[np.float32]:
    """Weights `[target, source]` of area interpolation: the share of each source pixel."""
    edges = np.linspace(0, source, target + 1)
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = overlap.clip(0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def resize_area(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Shrink a picture `[h, w, 3]` to `[size, size, 3]` by area interpolation (section 1.1)."""
    height, width, _ = picture.shape
    if (height, width) == (size, size):
        return picture
    if size > min(height, width):
        raise ValueError(f"a {height} x {width} picture cannot be shrunk to {size} x {size}")
    rows = area_weights(height, size) @ picture.reshape(height, -1).astype(np.float32)
    small = area_weights(width, size) @ rows.reshape(size, width, 3)
    return np.rint(small).clip(0, 255).astype(np.uint8)


def calvin_to_store(
    split_path: str | Path,
    store_path: str | Path,
    *,
    size: int = 64,
    exact: bool = False,
    overwrite: bool = False,
    progress: ProgressFn | None = None,
) -> EpisodeStore:
    """Convert a split, one frame in memory at a time.

    Frames are verified to be complete first. The store appears when it is complete; a conversion
    that was killed goes on where it was.

    Args:
        split_path: folder of the split.
        store_path: store to make.
        size: frames are shrunk to this many pixels by area interpolation; 0 keeps their size.
        exact: keep every array as recorded; `size` is then ignored.
        overwrite: replace an existing store.
        progress: called with (frames done, frames).

    Raises:
        StoreError: frames are missing, or one cannot be used; the message names file and key.
    """
    split = CalvinSplit(split_path)
    split.verify()
    first = split.frame(int(split.episodes[0, 0]))
    cameras = [name for name in CAMERAS if name in first]
    keys = list(first) if exact else [*SHAPES, *cameras]
    missing = [key for key in SHAPES if key not in first]
    if missing:
        raise StoreError(f"{split.frame_path(int(split.episodes[0, 0]))} has no {missing[0]}")
    if exact:
        size = 0
    columns = {name: ("uint8", (size, size, 3) if size else first[name].shape) for name in cameras}
    if exact:
        columns |= {
            _PREFIX + key: (first[key].dtype.str, first[key].shape)
            for key in keys
            if key not in cameras
        }
    layout = Layout(
        lengths=[int(n) - 1 for n in split.lengths],
        tasks=[""] * len(split.episodes),
        columns=columns,
        source={
            "format": "calvin",
            "split": split.path.name,
            "first_frames": [int(n) for n in split.episodes[:, 0]],
            "keys": keys,
            "exact": exact,
        },
    )
    writer = StoreWriter(store_path, layout, overwrite)
    try:
        _copy_frames(split, writer, keys, cameras, size, exact, progress)
        tables = {f"{SIDE_FOLDER}/{n}": split.path / n for n in SIDE_FILES}
        return writer.finish({n: f for n, f in tables.items() if f.exists()})
    finally:
        writer.close()


def _copy_frames(
    split: CalvinSplit,
    writer: StoreWriter,
    keys: Sequence[str],
    cameras: Sequence[str],
    size: int,
    exact: bool,
    progress: ProgressFn | None,
) -> None:
    numbers = split.numbers()
    last = np.isin(numbers, split.episodes[:, 1])
    row_bytes = sum(
        int(np.prod(s)) * np.dtype(d).itemsize for d, s in writer.layout.columns.values()
    )
    commit_every = max(1, min(_MAX_COMMIT, _COMMIT_BYTES // (row_bytes + 1)))
    row = writer.done
    try:
        while row < len(numbers):
            values = split.frame(int(numbers[row]), keys)
            writer.write(row, _row(split, int(numbers[row]), values, cameras, size, exact, writer))
            if last[row]:
                writer.write(row, {"action": NEUTRAL_ACTION[None]})
            row += 1
            if row % commit_every == 0:
                writer.commit(row)
            if progress is not None:
                progress(row, len(numbers))
    finally:  # also when interrupted or at a damaged frame: what is done is kept
        writer.commit(row)


def _row(
    split: CalvinSplit,
    number: int,
    values: Mapping[str, NDArray],
    cameras: Sequence[str],
    size: int,
    exact: bool,
    writer: StoreWriter,
) -> dict[str, NDArray]:
    """One frame as rows `[1, ...]` of the store."""
    out = {
        "robot_obs": values["robot_obs"],
        "scene_obs": values["scene_obs"],
        "action": values["rel_actions"],
    }
    for name in cameras:
        try:
            out[name] = resize_area(values[name], size) if size else values[name]
        except ValueError as error:
            raise StoreError(f"{split.frame_path(number)}: {name}: {error}") from None
    if exact:
        out |= {_PREFIX + key: value for key, value in values.items() if key not in cameras}
    for name, value in out.items():
        if name in writer.layout.columns:
            dtype, shape = writer.layout.columns[name]
            if value.dtype != np.dtype(dtype) or value.shape != shape:
                raise StoreError(
                    f"{split.frame_path(number)}: {name.removeprefix(_PREFIX)} is {value.dtype} "
                    f"{value.shape}, the first frame's is {np.dtype(dtype)} {shape}"
                )
    return {name: value[None] for name, value in out.items()}


def demonstrations_to_store(
    split_path: str | Path,
    store_path: str | Path,
    task: str,
    *,
    n: int = 50,
    seed: int = 42,
    size: int = 64,
    overwrite: bool = False,
) -> EpisodeStore:
    """Store of N annotated segments of one skill with success labels by the oracle.

    Args:
        split_path, store_path: as for `calvin_to_store`.
        task: one of `diwa.envs.tasks.TASKS`.
        n: segments, drawn with `seed` without replacement; 0 takes all.
        size: pixels of the frames; 0 leaves the pictures out.

    Raises:
        StoreError: too few segments, or a frame that cannot be used.
    """
    store_path = Path(store_path)
    if store_path.exists() and not overwrite:
        raise StoreError(f"{store_path} exists already; delete it or add --overwrite")
    split = CalvinSplit(split_path)
    cameras = CAMERAS if size else ()
    episodes = split.demonstrations(task, n, seed, cameras)
    for episode in episodes:
        episode.frames = {
            name: np.stack([resize_area(picture, size) for picture in pictures])
            for name, pictures in episode.frames.items()
        }
    return write_store(store_path, episodes)


def store_to_calvin(
    store_path: str | Path,
    split_path: str | Path,
    *,
    first_frame: int = 0,
    progress: ProgressFn | None = None,
) -> Path:
    """Write a split from a store; from an exact store bit for bit the one it came from.

    From other stores, numbers are written as float64 and the absolute `actions` are the tool pose
    of the next frame. One that came from a split gets that split's tables and numbers; otherwise
    each episode with a task becomes an annotated segment (sentence: the task's name; sentence
    vectors of zeros, for there is no language model here), and statistics are computed.

    Args:
        store_path: an episode store.
        split_path: folder to make; it appears when it is complete.
        first_frame: number of the first frame, where the store does not know it.
        progress: called with (frames done, frames).

    Raises:
        StoreError: the store is damaged, or the folder exists.
    """
    store, split_path = EpisodeStore(store_path), Path(split_path)
    if split_path.exists():
        raise StoreError(f"{split_path} exists already; delete it first")
    known = store.source.get("format") == "calvin"
    starts = (
        np.asarray(store.source["first_frames"], np.int64)
        if known
        else first_frame + store.starts.astype(np.int64)
    )
    partial = split_path.with_name(f".{split_path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for done, (number, values) in enumerate(_calvin_frames(store, starts), 1):
            np.savez_compressed(partial / f"episode_{number:07d}.npz", **values)  # type: ignore[arg-type]
            if progress is not None:
                progress(done, store.frames)
        if known:
            tables = store.path / SIDE_FOLDER
            shutil.copytree(tables, partial, dirs_exist_ok=True, copy_function=shutil.copyfile)
        else:
            _write_tables(partial, store, starts)
        os.replace(partial, split_path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return split_path


def _calvin_frames(
    store: EpisodeStore, starts: NDArray[np.int64]
) -> Iterator[tuple[int, dict[str, NDArray]]]:
    """Frame numbers and their arrays."""
    exact = bool(store.source.get("exact"))
    for i, start in enumerate(starts):
        rows = {} if exact else _frame_rows(store, i)
        for t in range(int(store.lengths[i]) + 1):
            if exact:
                values = _exact_frame(store, int(store.starts[i]) + t)
            else:
                values = {key: column[t] for key, column in rows.items()}
            yield int(start) + t, values


def _exact_frame(store: EpisodeStore, row: int) -> dict[str, NDArray]:
    """Arrays of a frame as they were recorded, in their order."""
    return {
        key: store.columns[key if key in store.columns else _PREFIX + key].array[row]
        for key in store.source["keys"]
    }


def _frame_rows(store: EpisodeStore, i: int) -> dict[str, NDArray]:
    """CALVIN's columns `[T + 1, ...]` of one episode."""
    episode: Episode = store[i]
    robot = episode.robot_obs.astype(np.float64)
    action = episode.action.astype(np.float64)
    still = np.zeros((1, 7))
    still[0, 6] = action[-1, 6] if len(action) else NEUTRAL_ACTION[6]
    relative = np.concatenate([action, still])
    reached = np.concatenate([robot[1:, :6], robot[-1:, :6]])  # the last frame stays where it is
    return {
        "actions": np.concatenate([reached, relative[:, 6:]], axis=1),
        "rel_actions": relative,
        "robot_obs": robot,
        "scene_obs": episode.scene_obs.astype(np.float64),
        **episode.frames,
    }


def _write_tables(folder: Path, store: EpisodeStore, starts: NDArray[np.int64]) -> None:
    ids = np.stack([starts, starts + store.lengths], axis=1)
    np.save(folder / "ep_start_end_ids.npy", ids)
    np.save(folder / "ep_lens.npy", ids[:, 1] - ids[:, 0] + 1)
    scene = {"calvin_scene_D": [int(ids.min()), int(ids.max())]}
    np.save(folder / "scene_info.npy", scene, allow_pickle=True)  # type: ignore[arg-type]
    (folder / "statistics.yaml").write_text(_statistics(store))
    tasks = [(i, task) for i, task in enumerate(store.tasks) if task]
    if tasks:
        (folder / "lang_annotations").mkdir()
        table: dict[str, Any] = {
            "language": {
                "ann": [task.replace("_", " ") for _, task in tasks],
                "task": [task for _, task in tasks],
                "emb": np.zeros((len(tasks), 1, 384), np.float32),
            },
            "info": {
                "episodes": [],
                "indx": [(int(ids[i, 0]), int(ids[i, 1])) for i, _ in tasks],
            },
        }
        np.save(folder / "lang_annotations" / "auto_lang_ann.npy", table, allow_pickle=True)  # type: ignore[arg-type]


def _statistics(store: EpisodeStore) -> str:
    """`statistics.yaml`; sums run over one episode at a time."""

    def numbers(values: NDArray) -> str:
        return "[" + ", ".join(f"{v:.6f}" for v in values) + "]"

    lines = []
    for name in ("robot_obs", "scene_obs"):
        column = np.asarray(getattr(store, name), np.float64)
        lines += [
            f"{name}:",
            "  - _target_: calvin_agent.utils.transforms.NormalizeVector",
            f"    mean: {numbers(column.mean(0))}",
            f"    std: {numbers(column.std(0))}",
        ]
    poses = [_frame_rows(store, i)["actions"] for i in range(len(store))]
    lines += [
        f"act_min_bound: {numbers(np.min([p.min(0) for p in poses], axis=0))}",
        f"act_max_bound: {numbers(np.max([p.max(0) for p in poses], axis=0))}",
    ]
    return "\n".join(lines) + "\n"

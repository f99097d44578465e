"""Reading a CALVIN split as published: one npz file per frame, tables beside them.

A split is a folder such as `task_D_D/training`::

    episode_0000035.npz ...             one file per frame, numbered over all splits together
    ep_start_end_ids.npy                int64 [episodes, 2], first and last frame, both included
    scene_info.npy                      scene -> first and last frame (optional)
    statistics.yaml                     means and deviations (optional)
    lang_annotations/auto_lang_ann.npy  segments with task and sentence (optional)

Nothing is read before it is asked for, and never more than one frame at a time. `rel_actions` of
frame t lead from frame t to t + 1, so an episode of n frames has n - 1 actions.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diwa.data.safe_npy import load_npy
from diwa.data.store import Episode
from diwa.envs.tasks import check_task, task_success
from diwa.errors import StoreError

ProgressFn = Callable[[int, int], None]

SHAPES = {"robot_obs": (15,), "scene_obs": (24,), "rel_actions": (7,)}
"""What every frame must hold."""
CAMERAS = ("rgb_static", "rgb_gripper")
ANNOTATIONS = Path("lang_annotations") / "auto_lang_ann.npy"
SIDE_FILES = (
    "ep_start_end_ids.npy",
    "ep_lens.npy",
    "scene_info.npy",
    "statistics.yaml",
    ".hydra",
    "lang_annotations",
)
"""Files and folders beside the frames."""

_FRAME = re.compile(r"episode_(\d+)\.npz")
_DECODE_ERRORS = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, KeyError)
_SHOWN = 6


@dataclass(frozen=True)
class Segment:
    """One language annotation.

    Attributes:
        task: one of CALVIN's 34 task names.
        sentence: the instruction.
        start, end: first and last frame number, both included.
    """

    task: str
    sentence: str
    start: int
    end: int


class CalvinSplit:
    """Read access to one split of a CALVIN dataset.

    Args:
        path: the folder with the frames.

    Raises:
        StoreError: it is no split, or `ep_start_end_ids.npy` is missing or senseless.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise StoreError(f"{self.path} is not a folder")
        names = [n for n in os.listdir(self.path) if _FRAME.fullmatch(n)]
        if not names:
            splits = [n for n in ("training", "validation") if (self.path / n).is_dir()]
            hint = (
                f"give one of its splits, such as {self.path / splits[0]}"
                if splits
                else "a CALVIN split has files named episode_0000000.npz"
            )
            raise StoreError(f"{self.path} holds no frames; {hint}")
        self._digits = len(_FRAME.fullmatch(names[0]).group(1))  # type: ignore[union-attr]
        self._present = {int(n[8:-4]) for n in names}
        self.episodes = self._limits()
        """First and last frame number of each episode, int64 `[episodes, 2]`."""

    def _limits(self) -> NDArray[np.int64]:
        file = self.path / "ep_start_end_ids.npy"
        if not file.exists():
            raise StoreError(
                f"{file} is missing; it says where episodes begin and end, and comes with the data"
            )
        ids = load_npy(file)
        if not (
            isinstance(ids, np.ndarray)
            and ids.dtype.kind in "iu"
            and ids.ndim == 2
            and ids.shape[1] == 2
            and len(ids)
        ):
            raise StoreError(f"{file} must hold integers [episodes, 2], not {_describe(ids)}")
        ids = ids.astype(np.int64)
        if (ids[:, 0] > ids[:, 1]).any() or (ids < 0).any():
            bad = ids[(ids[:, 0] > ids[:, 1]) | (ids < 0).any(1)][0]
            raise StoreError(f"{file}: an episode cannot run from frame {bad[0]} to {bad[1]}")
        ordered = ids[np.argsort(ids[:, 0])]
        if (ordered[1:, 0] <= ordered[:-1, 1]).any():
            raise StoreError(f"{file}: episodes overlap")
        return ids

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each episode (`ep_lens.npy` is in another order and not used)."""
        return self.episodes[:, 1] - self.episodes[:, 0] + 1

    @property
    def frames(self) -> int:
        """Frames of all episodes."""
        return int(self.lengths.sum())

    def numbers(self) -> NDArray[np.int64]:
        """Frame numbers of all episodes in order, `[frames]`."""
        return np.concatenate([np.arange(a, b + 1) for a, b in self.episodes])

    def frame_path(self, number: int) -> Path:
        """File of a frame."""
        return self.path / f"episode_{number:0{self._digits}d}.npz"

    def verify(self) -> None:
        """Check that every frame that `ep_start_end_ids.npy` names has a file.

        Raises:
            StoreError: frames are missing, named with their number; or all are, which means that
                frames and table are of different splits.
        """
        wanted = self.numbers()
        missing = [int(n) for n in wanted if int(n) not in self._present]
        if not missing:
            return
        where = f"{self.path}: {len(missing)} of {len(wanted)} frames are missing"
        if len(missing) == len(wanted):
            raise StoreError(
                f"{where}; ep_start_end_ids.npy (frames {wanted.min()} to {wanted.max()}) belongs "
                f"to another split than the files ({min(self._present)} to {max(self._present)})"
            )
        shown = ", ".join(self.frame_path(n).name for n in missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise StoreError(f"{where}: {shown}{more}")

    def damaged(
        self, keys: Sequence[str] | None = None, progress: ProgressFn | None = None
    ) -> list[str]:
        """Decode every frame and say what is wrong with those that cannot be used.

        Args:
            keys: arrays to decode; all by default.
            progress: called with (frames done, frames).
        """
        problems = []
        for i, number in enumerate(self.numbers()):
            try:
                self.frame(int(number), keys)
            except StoreError as error:
                problems.append(str(error))
            if progress is not None:
                progress(i + 1, self.frames)
        return problems

    def frame(self, number: int, keys: Sequence[str] | None = None) -> dict[str, NDArray]:
        """Arrays of one frame; all of them if `keys` is None. Shapes and ranges are checked.

        Raises:
            StoreError: names the file and the key that is missing, truncated or out of range.
        """
        path = self.frame_path(number)
        try:
            archive = np.load(path, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("no npz archive")
        except FileNotFoundError:
            raise StoreError(f"{path} is missing") from None
        except _DECODE_ERRORS as error:
            raise StoreError(f"{path} is truncated or no frame ({error})") from None
        values = {}
        with archive:
            for key in archive.files if keys is None else keys:
                if key not in archive.files:
                    raise StoreError(f"{path} has no {key}; it has {', '.join(archive.files)}")
                try:
                    values[key] = archive[key]
                except _DECODE_ERRORS as error:
                    raise StoreError(f"{path}: {key} cannot be decoded ({error})") from None
                _check(path, key, values[key])
        return values

    def iterate(
        self, first: int, last: int, keys: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, NDArray]]]:
        """Frame numbers and arrays of frames `first` to `last`, both included, one at a time."""
        return ((n, self.frame(n, keys)) for n in range(first, last + 1))

    @cached_property
    def scene_info(self) -> dict[str, Any]:
        """Scene -> [first, last] frame; empty where there is no such file."""
        file = self.path / "scene_info.npy"
        return _as_dict(load_npy(file), file) if file.exists() else {}

    @cached_property
    def statistics(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Normalisation of `statistics.yaml`: `{"robot_obs": {"mean": [15], "std": [15]}, ...}`."""
        file = self.path / "statistics.yaml"
        return read_statistics(file) if file.exists() else {}

    @cached_property
    def segments(self) -> list[Segment]:
        """Language annotations.

        Raises:
            StoreError: there are none, or they lie outside the episodes (another split's).
        """
        segments = read_segments(self.path / ANNOTATIONS)
        for segment in segments:
            inside = (self.episodes[:, 0] <= segment.start) & (segment.end <= self.episodes[:, 1])
            if not inside.any():
                raise StoreError(
                    f"{self.path / ANNOTATIONS}: {segment.task}, frames {segment.start} to "
                    f"{segment.end}, lies in no episode of this split"
                )
        return segments

    def demonstrations(
        self, task: str, n: int = 0, seed: int = 42, cameras: Sequence[str] = ()
    ) -> list[Episode]:
        """Expert episodes of one skill, cut out by the language annotations (method section 2.1).

        Args:
            task: one of `diwa.envs.tasks.TASKS`.
            n: number of segments, drawn at random without replacement; 0 takes all.
            seed: of the draw.
            cameras: frames to read as well.

        Returns:
            Episodes with the oracle's verdict at each frame, relative to the segment's first.

        Raises:
            StoreError: there are fewer than `n` segments of this task.
        """
        chosen = select_segments(self.segments, task, n, seed, self.path / ANNOTATIONS)
        return [self._episode(segment, cameras) for segment in chosen]

    def _episode(self, segment: Segment, cameras: Sequence[str]) -> Episode:
        keys = [*SHAPES, *cameras]
        rows = [values for _, values in self.iterate(segment.start, segment.end, keys)]
        column = {key: np.stack([row[key] for row in rows]) for key in keys}
        scene = column["scene_obs"].astype(np.float32)
        return Episode(
            robot_obs=column["robot_obs"].astype(np.float32),
            scene_obs=scene,
            action=column["rel_actions"][:-1].astype(np.float32),
            success=task_success(segment.task, scene[0], scene),
            task=segment.task,
            frames={camera: column[camera] for camera in cameras},
        )


def select_segments(
    segments: Sequence[Segment], task: str, n: int, seed: int, source: Path
) -> list[Segment]:
    """`n` segments of `task` drawn without replacement, in their order; all of them for n = 0.

    Raises:
        StoreError: fewer than `n`, or none.
    """
    fitting = [s for s in segments if s.task == check_task(task)]
    if not fitting or len(fitting) < n:
        raise StoreError(f"{source} has {len(fitting)} segments of {task}, {n or 'some'} wanted")
    if n == 0:
        return fitting
    drawn = np.random.default_rng(seed).choice(len(fitting), n, replace=False)
    return [fitting[i] for i in sorted(drawn)]


def read_segments(file: Path) -> list[Segment]:
    """Segments of an `auto_lang_ann.npy`.

    Raises:
        StoreError: missing, damaged, or its lists are of different lengths.
    """
    table = _as_dict(load_npy(file), file)
    try:
        sentences, tasks = table["language"]["ann"], table["language"]["task"]
        spans = [(int(start), int(end)) for start, end in table["info"]["indx"]]
        if not len(sentences) == len(tasks) == len(spans):
            raise ValueError(f"{len(sentences)} sentences, {len(tasks)} tasks, {len(spans)} spans")
        return [
            Segment(str(task), str(sentence), *span)
            for task, sentence, span in zip(tasks, sentences, spans, strict=True)
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StoreError(f"{file} holds no language annotations ({reason})") from None


def read_statistics(file: Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Means, deviations and action bounds of a `statistics.yaml`.

    Only lists of numbers are read. The file also names classes to instantiate, which is ignored.

    Raises:
        StoreError: it cannot be read, or a list holds something else.
    """
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    try:
        text = file.read_text(encoding="utf-8")
        section = ""
        for match in re.finditer(r"^(\w+):|(\w+):\s*\[([^\]]*)\]", text, re.MULTILINE):
            top, key, numbers = match.groups()
            if top is not None:
                section = top
                tail = re.match(r"\s*\[([^\]]*)\]", text[match.end() :])
                if tail is None:
                    continue
                key, numbers = "value", tail.group(1)
            values = np.array([float(n) for n in numbers.split(",") if n.strip()])
            found.setdefault(section, {})[key] = values
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} is damaged ({error})") from None
    return found


def _check(path: Path, key: str, value: NDArray) -> None:
    """Shapes of what is used, finite numbers, actions within [-1, 1], pictures that are RGB."""
    if key in SHAPES and value.shape != SHAPES[key]:
        raise StoreError(f"{path}: {key} has shape {value.shape}, expected {SHAPES[key]}")
    if key in CAMERAS and (value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3):
        raise StoreError(f"{path}: {key} is {value.dtype} {value.shape}, expected uint8 (h, w, 3)")
    if key in SHAPES and not np.isfinite(value).all():
        raise StoreError(f"{path}: {key} holds NaN or infinity")
    if key == "rel_actions" and (np.abs(value) > 1).any():
        worst = value[np.argmax(np.abs(value))]
        raise StoreError(f"{path}: rel_actions holds {worst:g}, outside [-1, 1]")


def _as_dict(value: Any, file: Path) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise StoreError(f"{file} holds {_describe(value)} where a dict is expected")


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"a {type(value).__name__}"

"""Reading LeRobot datasets of version 3: Parquet tables and mp4 videos of several episodes each.

A dataset is a folder such as::

    meta/info.json                            version, fps, features, templates of the paths below
    meta/episodes/chunk-000/file-000.parquet  one row per episode: where its rows and pictures are
    meta/tasks.parquet                        sentences (each episode's row repeats its own)
    data/chunk-000/file-000.parquet           one row per frame
    videos/KEY/chunk-000/file-000.mp4         pictures of one camera

A feature of dtype `video` lies in the mp4 files, from `from_timestamp` on, one picture per 1 / fps
seconds; one of dtype `image` in the tables, as encoded pictures.

Needs `pip install "diwa[lerobot]"`.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diwa.data.parquet_table import ParquetTable, reading
from diwa.data.video_reader import VideoReader, decode_picture
from diwa.errors import StoreError

PICTURES = ("video", "image")
"""dtypes of features that are pictures."""
_EPISODE_COLUMNS = (
    "episode_index",
    "length",
    "data/chunk_index",
    "data/file_index",
    "dataset_from_index",
    "dataset_to_index",
)


def require_extra() -> None:
    """Raise ImportError, with the way out, unless pyarrow and av are installed."""
    for module in ("pyarrow", "av"):
        try:
            importlib.import_module(module)
        except ImportError:
            raise ImportError(
                f"LeRobot datasets are read with pyarrow and av (PyAV), and {module} is missing.\n"
                'Install both with:  pip install "diwa[lerobot]"\n'
                'In a clone of diwa: pip install -e ".[lerobot]"'
            ) from None


@dataclass(frozen=True)
class LeRobotEpisode:
    """Where one episode lies.

    Attributes:
        number: `episode_index`.
        length: frames.
        first: index of its first frame in the whole dataset.
        table: Parquet file of its rows.
        videos: camera key -> (mp4 file, second of the first frame in it).
        sentences: its tasks in words.
    """

    number: int
    length: int
    first: int
    table: Path
    videos: Mapping[str, tuple[Path, float]]
    sentences: tuple[str, ...]


class LeRobotDataset:
    """Read access to a dataset; nothing is read before it is asked for.

    Args:
        path: folder that holds `meta/`.

    Raises:
        ImportError: the extra is not installed.
        StoreError: it is no dataset of version 3, or its metadata contradict themselves.
    """

    def __init__(self, path: str | Path) -> None:
        require_extra()
        self.path = Path(path)
        self.info_file = self.path / "meta" / "info.json"
        info = self._read_info()
        try:
            self.fps = float(info["fps"])
            self.features: dict[str, dict[str, Any]] = dict(info["features"])
            self._templates = {"data": info["data_path"], "video": info.get("video_path")}
            totals = (int(info["total_episodes"]), int(info["total_frames"]))
            if not self.fps > 0:
                raise ValueError(f"fps is {self.fps:g}")
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise StoreError(f"{self.info_file} cannot be used: {reason}") from None
        self.episodes = self._read_episodes()
        found = (len(self.episodes), sum(e.length for e in self.episodes))
        if found != totals:
            raise StoreError(
                f"{self.path / 'meta' / 'episodes'} lists {found[0]} episodes of {found[1]} frames,"
                f" info.json says {totals[0]} of {totals[1]}; the download is incomplete"
            )
        self._table: ParquetTable | None = None

    def _read_info(self) -> dict[str, Any]:
        if not self.path.is_dir():
            raise StoreError(f"{self.path} is not a folder")
        try:
            info = json.loads(self.info_file.read_text(encoding="utf-8"))
            version = str(info["codebase_version"])
        except FileNotFoundError:
            raise StoreError(
                f"{self.info_file} is missing; give the folder of a LeRobot dataset"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise StoreError(f"{self.info_file} is damaged: {reason}") from None
        if not version.startswith("v3."):
            raise StoreError(
                f"{self.info_file}: codebase_version is {version}, and only v3 is read here; "
                "LeRobot's script convert_dataset_v21_to_v30 makes v3 of v2.1"
            )
        return info

    def feature(self, key: str, kinds: Iterable[str] = ()) -> dict[str, Any]:
        """What info.json says of a feature.

        Args:
            key: its name.
            kinds: dtypes it may have; empty for numbers, which is everything but pictures and text.

        Raises:
            StoreError: there is none of this kind; the nearest names are suggested.
        """
        kinds = tuple(kinds)

        def fits(name: str) -> bool:
            dtype = self.features[name].get("dtype")
            return dtype in kinds if kinds else dtype not in (*PICTURES, "string")

        known = [name for name in self.features if fits(name)]
        if key in known:
            return self.features[key]
        close = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        what = "camera" if kinds else "numeric feature"
        kind = f" (it is {self.features[key].get('dtype')})" if key in self.features else ""
        hint = f"perhaps {' or '.join(close)}" if close else "there are none"
        raise StoreError(f"{self.info_file} has no {what} '{key}'{kind}; {hint}")

    def _read_episodes(self) -> list[LeRobotEpisode]:
        folder = self.path / "meta" / "episodes"
        files = sorted(folder.glob("chunk-*/file-*.parquet"))
        if not files:
            raise StoreError(f"{folder} holds no chunk-000/file-000.parquet")
        cameras = [k for k, f in self.features.items() if f.get("dtype") == "video"]
        wanted = list(_EPISODE_COLUMNS)
        for key in cameras:
            wanted += [f"videos/{key}/{n}" for n in ("chunk_index", "file_index", "from_timestamp")]
        episodes = []
        for file in files:
            table = ParquetTable(file)
            for name in wanted:
                table.check(name)
            optional = ["tasks"] if "tasks" in table.names else []
            with reading(file):
                episodes += [self._episode(row, cameras) for row in table.rows(wanted + optional)]
        episodes.sort(key=lambda e: e.number)
        for i, episode in enumerate(episodes):
            if episode.number != i:
                raise StoreError(f"{folder}: episode {i} is missing or listed twice")
        return episodes

    def _episode(self, row: Mapping[str, Any], cameras: Iterable[str]) -> LeRobotEpisode:
        number, length = int(row["episode_index"]), int(row["length"])
        first = int(row["dataset_from_index"])
        if length < 1 or int(row["dataset_to_index"]) - first != length:
            raise ValueError(f"episode {number} has {length} frames, but other limits")
        videos = {}
        for key in cameras:
            at = f"videos/{key}/"
            file = self._file("video", row[at + "chunk_index"], row[at + "file_index"], key)
            videos[key] = file, float(row[at + "from_timestamp"])
        table = self._file("data", row["data/chunk_index"], row["data/file_index"])
        return LeRobotEpisode(number, length, first, table, videos, tuple(row.get("tasks") or ()))

    def _file(self, kind: str, chunk: int, file: int, key: str = "") -> Path:
        """A file by its template in info.json, inside the dataset."""
        template = self._templates[kind]
        try:
            name = Path(template.format(chunk_index=chunk, file_index=file, video_key=key))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.info_file}: {kind}_path is {template!r} ({error})") from None
        if name.is_absolute() or ".." in name.parts:
            raise StoreError(f"{self.info_file}: {kind}_path {template!r} leaves the dataset")
        return self.path / name

    def numbers(self, episode: LeRobotEpisode, key: str) -> NDArray[np.float64]:
        """A numeric feature of an episode, `[length, D]`.

        Raises:
            StoreError: the file or the column is missing or damaged, or holds other rows or NaN.
        """
        begin = self._begin(episode)
        values = self._open(episode).column(key)[begin : begin + episode.length]
        if not np.isfinite(values).all():
            t = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise StoreError(
                f"{episode.table}: {key} holds NaN or a gap in episode {episode.number}, frame {t}"
            )
        return values

    def pictures(
        self, episode: LeRobotEpisode, key: str, reader: VideoReader, start: int = 0
    ) -> Iterator[NDArray[np.uint8]]:
        """Pictures `[h, w, 3]` RGB of one camera, from frame `start` of the episode on.

        Args:
            episode: the episode.
            key: the camera.
            reader: to be used for this camera only, so that following episodes need no seek.
            start: first frame.

        Raises:
            StoreError: a file is missing or truncated, or a picture cannot be decoded.
        """
        embedded = self.features[key]["dtype"] == "image"
        begin = self._begin(episode) if embedded else 0
        for t in range(start, episode.length):
            where = f"{key} of episode {episode.number}, frame {t}"
            if embedded:
                content = self._open(episode).encoded(key, begin + t)
                yield decode_picture(content, f"{episode.table}: {where}")
            else:
                file, second = episode.videos[key]
                yield reader.picture(file, second + t / self.fps, self.fps, where)

    def _open(self, episode: LeRobotEpisode) -> ParquetTable:
        """The table of an episode; the last one stays open, as episodes are read in order."""
        if self._table is None or self._table.file != episode.table:
            self._table = ParquetTable(episode.table)
        return self._table

    def _begin(self, episode: LeRobotEpisode) -> int:
        """Row of an episode's first frame in its table, which is checked to hold the episode."""
        table = self._open(episode)
        index, number = table.column("index"), table.column("episode_index")
        begin = episode.first - int(index[0, 0]) if len(table) else -1
        part = slice(begin, begin + episode.length)
        if (
            begin < 0
            or len(index[part]) != episode.length
            or (index[part, 0] != episode.first + np.arange(episode.length)).any()
            or (number[part, 0] != episode.number).any()
        ):
            raise StoreError(
                f"{episode.table} does not hold frames {episode.first} to "
                f"{episode.first + episode.length - 1} of episode {episode.number} in their order"
            )
        return begin

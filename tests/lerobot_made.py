"""A tiny LeRobot dataset of version 3, written with pyarrow and av as LeRobot lays it out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

FPS = 5
LENGTHS = (5, 8, 6, 7)
SENTENCES = ("open the drawer", "push the switch", "open the drawer", "push the switch")
TABLES = (0, 0, 1, 1)
"""File of each episode's rows..."""
TOP_FILES = (0, 0, 0, 1)
"""...and of its pictures of the camera `top`; those of `wrist` are all in one file."""
STARTS = np.concatenate([[0], np.cumsum(LENGTHS)])
TOP, WRIST = "observation.images.top", "observation.images.wrist"
SIZES = {TOP: (48, 64), WRIST: (32, 32)}


def grey(index: int, camera: str) -> int:
    """Brightness of frame `index` of the dataset; far enough apart to survive the codec."""
    return 8 * index + (20 if camera == WRIST else 0)


def picture(index: int, camera: str) -> np.ndarray:
    """The frame: one grey, so that it is known whatever the size and the codec."""
    return np.full((*SIZES[camera], 3), grey(index, camera), np.uint8)


def episode_at(index: int) -> int:
    """Episode of a frame of the dataset."""
    return int(np.searchsorted(STARTS, index, side="right")) - 1


def numbers() -> dict[str, np.ndarray]:
    """The numeric features of all frames."""
    rng, n = np.random.default_rng(0), sum(LENGTHS)
    done = np.zeros(n, bool)
    done[STARTS[1:] - 2] = True  # solved by the last action that leads anywhere
    return {
        "observation.state": rng.normal(size=(n, 8)).astype(np.float32),
        "action": rng.uniform(-1, 1, (n, 7)).astype(np.float32),
        "next.success": done,
    }


def write_video(path: Path, indices: list[int], camera: str, codec: str = "libx264") -> None:
    """An mp4 of these frames with groups of 8 pictures and B-frames."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.height, stream.width = SIZES[camera]
        stream.pix_fmt, stream.gop_size = "yuv420p", 8
        for index in indices:
            frame = av.VideoFrame.from_ndarray(picture(index, camera), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def png(array: np.ndarray) -> bytes:
    """An encoded picture, as features of dtype `image` hold it."""
    import av

    stream = io.BytesIO()
    with av.open(stream, "w", format="image2pipe") as container:
        out = container.add_stream("png", rate=1)
        out.height, out.width, out.pix_fmt = *array.shape[:2], "rgb24"
        container.mux(out.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(out.encode())
    return stream.getvalue()


def info(dtype: str) -> dict[str, Any]:
    """Content of info.json."""
    features: dict[str, Any] = {
        key: {
            "dtype": dtype,
            "shape": [*SIZES[key], 3],
            "names": ["height", "width", "channels"],
            "info": {"video.fps": FPS, "video.codec": "h264", "video.pix_fmt": "yuv420p"},
        }
        for key in (TOP, WRIST)
    }
    features |= {
        "observation.state": {"dtype": "float32", "shape": [8], "names": None},
        "action": {"dtype": "float32", "shape": [7], "names": None},
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
        "language": {"dtype": "string", "shape": [1], "names": None},
    }
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        kind = "float32" if name == "timestamp" else "int64"
        features[name] = {"dtype": kind, "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "robot_type": "panda",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": 2,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features,
    }


def write_dataset(folder: Path, dtype: str = "video", codec: str = "libx264") -> Path:
    """A dataset of four episodes in two tables and, for the camera `top`, two videos."""
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info(dtype)))
    sentences = list(dict.fromkeys(SENTENCES))
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": sentences})
    parquet.write_table(tasks, folder / "meta" / "tasks.parquet")
    values, episodes = numbers(), [episode_at(i) for i in range(sum(LENGTHS))]
    for number in sorted(set(TABLES)):
        rows = [i for i, e in enumerate(episodes) if TABLES[e] == number]
        frame = [int(i - STARTS[episodes[i]]) for i in rows]
        columns: dict[str, Any] = {
            "observation.state": pa.array(list(values["observation.state"][rows])),
            "action": pa.array(list(values["action"][rows]), pa.list_(pa.float32(), 7)),
            "next.success": pa.array(values["next.success"][rows]),
            "timestamp": pa.array(np.array(frame, np.float32) / np.float32(FPS)),
            "frame_index": frame,
            "episode_index": [episodes[i] for i in rows],
            "index": rows,
            "task_index": [sentences.index(SENTENCES[episodes[i]]) for i in rows],
        }
        if dtype == "image":
            for key in (TOP, WRIST):
                cells = [{"bytes": png(picture(i, key)), "path": f"{i}.png"} for i in rows]
                columns[key] = pa.array(cells)
        path = folder / "data" / "chunk-000" / f"file-{number:03d}.parquet"
        parquet.write_table(pa.table(columns), path, row_group_size=4)
    if dtype == "video":
        write_videos(folder, codec)
    write_episodes(folder, dtype)
    return folder


def write_videos(folder: Path, codec: str) -> None:
    """The cameras' files."""
    for key, files in ((TOP, TOP_FILES), (WRIST, (0,) * len(LENGTHS))):
        for number in sorted(set(files)):
            shown = [i for i in range(sum(LENGTHS)) if files[episode_at(i)] == number]
            path = folder / "videos" / key / "chunk-000" / f"file-{number:03d}.mp4"
            write_video(path, shown, key, codec)


def write_episodes(folder: Path, dtype: str = "video") -> None:
    """`meta/episodes`, the last episode in a second file."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = []
    for e, length in enumerate(LENGTHS):
        row: dict[str, Any] = {
            "episode_index": e,
            "tasks": [SENTENCES[e]],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": TABLES[e],
            "dataset_from_index": int(STARTS[e]),
            "dataset_to_index": int(STARTS[e + 1]),
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": int(e == len(LENGTHS) - 1),
            "stats/action/mean": [0.0] * 7,
        }
        for key, files in ((TOP, TOP_FILES), (WRIST, (0,) * len(LENGTHS))):
            if dtype == "video":
                before = sum(n for k, n in enumerate(LENGTHS[:e]) if files[k] == files[e])
                row[f"videos/{key}/chunk_index"] = 0
                row[f"videos/{key}/file_index"] = files[e]
                row[f"videos/{key}/from_timestamp"] = before / FPS
                row[f"videos/{key}/to_timestamp"] = (before + length) / FPS
        rows.append(row)
    for number, part in enumerate((rows[:-1], rows[-1:])):
        file = folder / "meta" / "episodes" / "chunk-000" / f"file-{number:03d}.parquet"
        parquet.write_table(pa.Table.from_pylist(part), file)

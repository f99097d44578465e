"""Writing a store that does not fit in memory: piece by piece, resumable, atomic."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diwa.checkpoint import write_json
from diwa.data.store import COLUMNS, EpisodeStore, check_column_name
from diwa.errors import StoreError


@dataclass(frozen=True)
class Layout:
    """What a store will hold, known before its first frame.

    Attributes:
        lengths: actions T of every episode, which has T + 1 frames.
        tasks: skill of every episode, empty for play.
        columns: optional columns: name -> (dtype, shape of one row).
        source: anything to be kept in index.json; another source does not resume.
    """

    lengths: Sequence[int]
    tasks: Sequence[str]
    columns: Mapping[str, tuple[str, tuple[int, ...]]]
    source: Mapping[str, Any]

    @property
    def frames(self) -> int:
        """Frames of all episodes."""
        return sum(self.lengths) + len(self.lengths)

    def index(self) -> dict[str, Any]:
        """Content of index.json."""
        columns = {k: {"dtype": d, "shape": list(s)} for k, (d, s) in self.columns.items()}
        plain = asdict(self) | {"columns": columns}
        return json.loads(json.dumps(plain))


class StoreWriter:
    """Fills a folder beside `path` and renames it when every frame is there.

    A reader sees the whole store or none. A killed writer goes on where its last `commit` was when
    it is made again with the same layout.

    Args:
        path: the store to make.
        layout: what it will hold.
        overwrite: replace a store that is there already, when the new one is complete.

    Raises:
        StoreError: `path` exists, or another process is writing the same store.
    """

    def __init__(self, path: str | Path, layout: Layout, overwrite: bool = False) -> None:
        self.path, self.layout = Path(path), layout
        if self.path.exists() and not overwrite:
            raise StoreError(f"{self.path} exists already; delete it or add --overwrite")
        self.partial = self.path.with_name(f".{self.path.name}.converting")
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.partial / "lock", "w")  # noqa: SIM115 (held until the end)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StoreError(f"another process is writing {self.path}") from None
        columns: dict[str, tuple[str, tuple[int, ...]]] = {
            name: ("bool" if name == "success" else "float32", shape)
            for name, shape in COLUMNS.items()
        }
        columns |= {check_column_name(k): v for k, v in layout.columns.items()}
        self.done = self._resume()
        self._arrays = {name: self._open(name, *spec) for name, spec in columns.items()}

    def _resume(self) -> int:
        """Frames that an earlier writer of the same layout committed."""
        try:
            state = json.loads((self.partial / "progress.json").read_text())
            if state["index"] == self.layout.index():
                return int(state["done"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        (self.partial / "progress.json").unlink(missing_ok=True)
        return 0

    def _open(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.memmap:
        file, shape = self.partial / f"{name}.npy", (self.layout.frames, *shape)
        if self.done:
            array = np.lib.format.open_memmap(file, mode="r+")
            if (array.shape, array.dtype) == (shape, np.dtype(dtype)):
                return array
            raise StoreError(f"{file} is damaged; delete {self.partial} and start again")
        array = np.lib.format.open_memmap(file, mode="w+", dtype=np.dtype(dtype), shape=shape)
        with open(file, "r+b") as stream:  # a full disk is an error now, not a crash later
            os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
        return array

    def write(self, row: int, values: Mapping[str, NDArray]) -> None:
        """Put rows `[k, ...]` of every column from frame `row` on; a column left out stays 0."""
        for name, value in values.items():
            self._arrays[name][row : row + len(value)] = value

    def commit(self, done: int) -> None:
        """The first `done` frames are written for good."""
        for array in self._arrays.values():
            array.flush()
        self.done = done
        write_json(self.partial / "progress.json", {"index": self.layout.index(), "done": done})

    def finish(self, extras: Mapping[str, Path] | None = None) -> EpisodeStore:
        """Make the store visible.

        Args:
            extras: name inside the store folder -> file or folder to copy there.

        Raises:
            StoreError: frames are missing.
        """
        if self.done != self.layout.frames:
            raise StoreError(f"{self.done} of {self.layout.frames} frames of {self.path} written")
        for name, source in (extras or {}).items():
            target = self.partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(source, target)
        write_json(self.partial / "index.json", self.layout.index())
        self._arrays.clear()
        (self.partial / "progress.json").unlink(missing_ok=True)
        (self.partial / "lock").unlink()
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(self.partial, self.path)
        self._lock.close()
        return EpisodeStore(self.path)

    def close(self) -> None:
        """Let go of the files; what was committed stays for the next writer."""
        self._arrays.clear()
        self._lock.close()

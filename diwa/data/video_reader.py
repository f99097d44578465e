"""Pictures of a video file by their time, read in order without seeking."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diwa.errors import StoreError

_SEEK_SECONDS = 2.0
"""Pictures that lie this far ahead are looked for from the nearest key frame."""


class VideoReader:
    """Decodes one camera's files, one at a time. Needs `av`."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._container: Any = None
        self._frames: Iterator[Any] = iter(())
        self._frame: Any = None

    def picture(self, file: Path, second: float, fps: float, where: str) -> NDArray[np.uint8]:
        """The picture `[h, w, 3]` RGB shown at a time, within half a frame.

        Args:
            file: the video.
            second: its time in the file.
            fps: pictures per second.
            where: what is asked for, in messages.

        Raises:
            StoreError: the file is missing, truncated, or shows nothing at that time.
        """
        import av

        if not file.exists():
            raise StoreError(f"{file} is missing ({where}); the download is incomplete")
        try:
            self._goto(file, second, fps)
            while self._frame is not None and self._frame.time < second - 0.5 / fps:
                self._frame = next(self._frames, None)
            if self._frame is not None and self._frame.time <= second + 0.5 / fps:
                return self._frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, OSError, ValueError, TypeError) as error:  # TypeError: no time
            self.close()
            raise StoreError(f"{file} is truncated or no video: {where} ({error})") from None
        shown = "ends before" if self._frame is None else "shows nothing at"
        self.close()
        raise StoreError(f"{file} {shown} {second:.3f} s, which is {where}")

    def _goto(self, file: Path, second: float, fps: float) -> None:
        """Open the file where it is not open, and seek where reading on would not do."""
        import av

        if file != self._file:
            self.close()
            self._container = av.open(str(file))
            if not self._container.streams.video:
                raise ValueError("it has no video stream")
            self._container.streams.video[0].thread_type = "AUTO"
            self._file = file
        now = None if self._frame is None else self._frame.time
        if now is not None and -0.5 / fps <= second - now < _SEEK_SECONDS:
            return
        self._seek(second)
        if second and (self._frame is None or self._frame.time > second + 0.5 / fps):
            self._seek(0.0)  # an index that leads too far

    def _seek(self, second: float) -> None:
        """Go to the last key frame before a time."""
        stream = self._container.streams.video[0]
        self._container.seek(int(second / stream.time_base), stream=stream)
        self._frames = self._container.decode(stream)
        self._frame = next(self._frames, None)

    def close(self) -> None:
        """Let go of the file."""
        if self._container is not None:
            self._container.close()
        self._file, self._container, self._frame = None, None, None
        self._frames = iter(())


def decode_picture(content: bytes, where: str) -> NDArray[np.uint8]:
    """An encoded picture (PNG, JPEG) as `[h, w, 3]` uint8 RGB.

    Raises:
        StoreError: it cannot be decoded; the message begins with `where`.
    """
    import av

    try:
        with av.open(io.BytesIO(content)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError, ValueError, IndexError, StopIteration) as error:
        raise StoreError(f"{where} cannot be decoded ({error})") from None

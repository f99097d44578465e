"""One column of a store: a memory-mapped `.npy` file that is read without growing in memory."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RELEASE_BYTES = 16 << 20
"""After this many bytes the pages that were read are handed back to the page cache."""


class Column:
    """A `.npy` file `[n, *shape]`, memory-mapped and read-only.

    `array` is the mapping itself, for slices that are not copied. `read` copies chosen rows and now
    and then gives the pages back, so that an epoch over more data than fits in memory leaves the
    process as large as it was.

    Args:
        file: the `.npy` file.

    Raises:
        OSError, ValueError: missing, shorter than its header says, or it holds Python objects.
    """

    def __init__(self, file: Path) -> None:
        with open(file, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = header(stream)
            offset, size = stream.tell(), os.fstat(stream.fileno()).st_size
            if dtype.hasobject or fortran:
                raise ValueError(f"{dtype} in Fortran order {fortran} cannot be memory-mapped")
            count = int(np.prod(shape))
            if size < offset + count * dtype.itemsize:
                raise ValueError(f"{size} bytes, {offset + count * dtype.itemsize} expected")
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.file = file
        self.array = np.frombuffer(self._map, dtype, count, offset).reshape(shape)
        self._unreleased = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """`(n, *shape)`."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Type of the elements."""
        return self.array.dtype

    def read(self, rows: NDArray[np.int64], out: NDArray | None = None) -> NDArray:
        """Copies of rows `[T, ...]` of row numbers -> `[T, ..., *shape]`.

        Rows that follow each other along the first axis are copied as one piece, as the streams of
        `StreamSampler` ask for them.

        Args:
            rows: row numbers, int64.
            out: contiguous array of the result's shape and dtype to be filled and returned.

        Raises:
            IndexError: a row number outside [0, n).
            ValueError: `out` is of another shape or dtype.
        """
        rows = np.asarray(rows)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self.array)):
            span = f"{rows.min()} to {rows.max()} of {len(self.array)}"
            raise IndexError(f"{self.file}: rows {span}")
        shape = (*rows.shape, *self.array.shape[1:])
        if out is None:
            out = np.empty(shape, self.array.dtype)
        elif (out.shape, out.dtype) != (shape, self.array.dtype) or not out.flags.c_contiguous:
            raise ValueError(f"{self.file}: out is {out.dtype} {out.shape}, {shape} wanted")
        if not rows.size:
            return out
        by_stream = rows.reshape(len(rows), int(np.prod(rows.shape[1:])))
        target = out.reshape(*by_stream.shape, *self.array.shape[1:])
        for stream in range(by_stream.shape[1]):
            wanted = by_stream[:, stream]
            cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
            for first, last in zip([0, *cuts], [*cuts, len(wanted)], strict=True):
                begin = int(wanted[first])
                target[first:last, stream] = self.array[begin : begin + last - first]
        self._unreleased += out.nbytes
        if self._unreleased >= RELEASE_BYTES:
            self.release()
        return out

    def release(self) -> None:
        """Hand the pages that were read back to the page cache; nothing is lost."""
        self._unreleased = 0
        if hasattr(mmap, "MADV_DONTNEED"):  # Linux, BSD, macOS
            self._map.madvise(mmap.MADV_DONTNEED)

"""One Parquet file of rows in order: columns of numbers, and encoded pictures one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diwa.errors import StoreError


class ParquetTable:
    """Read access to a file; columns that were read are kept. Needs `pyarrow`.

    Args:
        file: the Parquet file.

    Raises:
        StoreError: it is missing or damaged.
    """

    def __init__(self, file: Path) -> None:
        from pyarrow.parquet import ParquetFile

        self.file = file
        if not file.exists():
            raise StoreError(f"{file} is missing; the download is incomplete")
        with reading(file):
            self._table = ParquetFile(file)
            self.names: list[str] = self._table.schema_arrow.names
            sizes = [
                self._table.metadata.row_group(i).num_rows
                for i in range(self._table.num_row_groups)
            ]
        self._begins = np.concatenate([[0], np.cumsum(sizes)])
        self._columns: dict[str, NDArray[np.float64]] = {}
        self._encoded: dict[str, tuple[int, Any]] = {}

    def __len__(self) -> int:
        return int(self._begins[-1])

    def check(self, name: str) -> None:
        """Raise StoreError unless there is a column of this name."""
        if name not in self.names:
            raise StoreError(f"{self.file} has no column {name}; it has {', '.join(self.names)}")

    def column(self, name: str) -> NDArray[np.float64]:
        """A column of numbers or of lists of numbers as `[n, D]`; single gaps are NaN.

        Raises:
            StoreError: there is no such column, or it holds something else.
        """
        if name not in self._columns:
            self.check(name)
            with reading(self.file, name):
                self._columns[name] = _matrix(self._table.read(columns=[name]).column(0))
        return self._columns[name]

    def rows(self, names: list[str]) -> list[dict[str, Any]]:
        """Rows as dicts of these columns."""
        with reading(self.file):
            return self._table.read(columns=names).to_pylist()

    def encoded(self, name: str, row: int) -> bytes:
        """The bytes of an embedded picture; one row group of the column is held at a time.

        Raises:
            StoreError: there is none.
        """
        self.check(name)
        begin, column = self._encoded.get(name, (0, ()))
        if not begin <= row < begin + len(column):
            group = int(np.searchsorted(self._begins, row, side="right")) - 1
            with reading(self.file, name):
                column = self._table.read_row_group(group, columns=[name]).column(0)
            begin = int(self._begins[group])
            self._encoded[name] = begin, column
        value = column[row - begin].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise StoreError(f"{self.file}: {name} holds no picture in row {row}")
        return content


class reading:
    """Turns pyarrow's errors inside the block into a StoreError that names file and column."""

    def __init__(self, file: Path, column: str = "") -> None:
        self.where = f"{file}: {column}" if column else str(file)

    def __enter__(self) -> None: ...

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        import pyarrow

        if isinstance(error, pyarrow.ArrowException | OSError | ValueError | TypeError):
            raise StoreError(f"{self.where} is truncated or damaged ({error})") from None


def _matrix(column: Any) -> NDArray[np.float64]:
    import pyarrow as pa

    n = len(column)
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    while isinstance(array.type, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        array = array.flatten()
    flat = array.to_numpy(zero_copy_only=False)
    if flat.dtype.kind not in "fiub":
        raise ValueError(f"{column.type} is no column of numbers")
    if n and (flat.size % n or not flat.size):
        raise ValueError(f"{flat.size} numbers in {n} rows")
    return flat.astype(np.float64).reshape(n, flat.size // n if n else 0)

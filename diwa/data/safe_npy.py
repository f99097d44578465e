"""Reading `.npy` files that hold pickled Python objects, without running anything from them.

CALVIN keeps its language annotations and scene table as NumPy arrays of dicts, that is, as
pickles, and a pickle can run any program. The reader here knows the few names that such files
need and puts harmless stand-ins in their place, so not even NumPy's own unpickling code sees the
file. Any other name is refused before anything happens.
"""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from diwa.errors import StoreError

_NUMBER = re.compile(r"[biufc](1|2|4|8)|[US][0-9]{1,6}")
_MAX_DEPTH = 32
_MAX_ITEMS = 10_000_000  # a small pickle can refer to one list again and again


class _Refused(Exception):
    """The file asks for something that plain data never needs."""


class _Inert:
    """Base of the stand-ins: the BUILD opcode cannot change an attribute of the callables."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise _Refused(f"it sets the state of a {type(self).__name__.lstrip('_')}")


class _Dtype(_Inert):
    """numpy.dtype: only plain numbers, strings and 'O' (a list of further objects)."""

    __slots__ = ("order", "text")

    def __init__(self, text: object, *flags: object) -> None:
        if not isinstance(text, str) or (text != "O8" and not _NUMBER.fullmatch(text)):
            raise _Refused(f"it holds elements of type {text!r}")
        self.text, self.order = text, "|"

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("|", "<", ">", "="):
            raise _Refused("it holds a malformed element type")
        if state[2:5] != (None, None, None):
            raise _Refused("it holds structured elements")
        self.order = state[1]

    @property
    def objects(self) -> bool:
        return self.text == "O8"

    def numpy(self) -> np.dtype:
        return np.dtype(self.text if self.order == "|" else self.order + self.text)


class _Array(_Inert):
    """numpy.ndarray in the making."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("it holds a malformed array")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not _is_shape(shape):
            raise _Refused("it holds a malformed array")
        count = int(np.prod(shape, dtype=object))
        if dtype.objects:
            if not isinstance(data, list) or len(data) != count:
                raise _Refused("it holds a malformed array of objects")
            self.value = (shape, data)
            return
        plain = dtype.numpy()
        if not isinstance(data, bytes) or len(data) != count * plain.itemsize:
            raise _Refused("it holds an array whose size contradicts its shape")
        self.value = np.frombuffer(data, plain).reshape(shape, order="F" if fortran else "C").copy()


def _is_shape(value: object) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


class _Reconstruct(_Inert):
    """numpy.core.multiarray._reconstruct."""

    __slots__ = ()

    def __call__(self, *arguments: object) -> _Array:
        return _Array()


class _Scalar(_Inert):
    """numpy.core.multiarray.scalar."""

    __slots__ = ()

    def __call__(self, dtype: object, data: object = None) -> Any:
        if not isinstance(dtype, _Dtype) or dtype.objects or not isinstance(data, bytes):
            raise _Refused("it holds a malformed number")
        plain = dtype.numpy()
        if len(data) != plain.itemsize:
            raise _Refused("it holds a malformed number")
        return np.frombuffer(data, plain)[0]


class _Encode(_Inert):
    """_codecs.encode, by which Python 2 style pickles write bytes."""

    __slots__ = ()

    def __call__(self, text: object, encoding: object = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise _Refused("it holds malformed bytes")
        return text.encode("latin1")


class _NoBytes(_Inert):
    """builtins.bytes, by which old protocols write b"" (and nothing else)."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


class _Marker(_Inert):
    """numpy.ndarray as an argument of `_reconstruct`; it cannot be called."""

    __slots__ = ()


class _DtypeFactory(_Inert):
    __slots__ = ()

    def __call__(self, *arguments: object) -> _Dtype:
        return _Dtype(*arguments)


_ALLOWED: dict[tuple[str, str], _Inert] = {
    ("numpy", "ndarray"): _Marker(),
    ("numpy", "dtype"): _DtypeFactory(),
    ("_codecs", "encode"): _Encode(),
    ("builtins", "bytes"): _NoBytes(),
    ("__builtin__", "bytes"): _NoBytes(),
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1, numpy 2
    _ALLOWED[_module, "_reconstruct"] = _Reconstruct()
    _ALLOWED[_module, "scalar"] = _Scalar()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"it wants to load {module}.{name}") from None

    def persistent_load(self, pid: object) -> NoReturn:
        raise _Refused("it refers to objects outside the file")


def _plain(value: Any, count: Iterator[int], depth: int = 0) -> Any:
    """Stand-ins -> arrays, all the way down; `count` numbers the items met."""
    if depth > _MAX_DEPTH or next(count) > _MAX_ITEMS:
        raise _Refused("it is nested too deeply")
    if isinstance(value, _Array):
        if isinstance(value.value, tuple):
            shape, items = value.value
            array = np.empty(len(items), dtype=object)
            for i, item in enumerate(items):
                array[i] = _plain(item, count, depth + 1)
            return array.reshape(shape)
        if value.value is None:
            raise _Refused("it holds a malformed array")
        return value.value
    if isinstance(value, dict):
        return {_key(k): _plain(v, count, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, count, depth + 1) for item in value)
    if isinstance(value, (np.generic, str, bytes, int, float)) or value is None:
        return value
    raise _Refused(f"it holds a {type(value).__name__.lstrip('_')}")


def _key(value: Any) -> Any:
    if isinstance(value, (str, int)):
        return value
    raise _Refused(f"it has a key of type {type(value).__name__.lstrip('_')}")


def load_npy(path: str | Path) -> NDArray | Any:
    """Read a `.npy` file; one that holds a single pickled object gives that object.

    Args:
        path: the file; arrays of numbers, or dicts, lists, strings, numbers and arrays in a pickle.

    Raises:
        StoreError: it is missing or damaged, or its pickle asks for anything else; then nothing of
            it has been executed.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
            if not dtype.hasobject:
                return np.load(path, allow_pickle=False)
            array = _plain(_Unpickler(stream, encoding="latin1").load(), itertools.count())
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except _Refused as reason:
        raise StoreError(
            f"{path} is refused: {reason}, which plain data never needs; nothing was executed"
        ) from None
    except Exception as error:  # a pickle can fail in any way
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if not isinstance(array, np.ndarray) or array.shape != shape:
        raise StoreError(f"{path} is damaged (its pickle holds no array of shape {shape})")
    return array.item() if array.shape == () else array

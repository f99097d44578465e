"""Object arrays of CALVIN are read without running what a pickle wants to run."""

import io
import os
import pickle

import numpy as np
import pytest

from diwa.data.safe_npy import load_npy
from diwa.errors import StoreError


def npy_with(payload: bytes, shape: tuple = ()) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|O", "fortran_order": False, "shape": shape}
    )
    return stream.getvalue() + payload


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def wrapped(value) -> np.ndarray:
    array = np.empty((), dtype=object)
    array[()] = value
    return array


EVIL = {
    "system": lambda mark: Runs(os.system, f"touch {mark}"),
    "eval": lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Runs(io.open, str(mark), "w"),
    "deep": lambda mark: {"info": [{"indx": (Runs(os.mkdir, str(mark)),)}]},
    "numpy": lambda mark: Runs(np.save, str(mark), 1),
}


@pytest.mark.parametrize("kind", EVIL)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_wants_to_run_code_is_refused_before_it_does(kind, protocol, tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "scene_info.npy"
    file.write_bytes(npy_with(pickle.dumps(wrapped(EVIL[kind](mark)), protocol)))
    with pytest.raises(
        StoreError, match=r"scene_info.npy is refused: it wants to load .*; nothing was executed"
    ):
        load_npy(file)
    assert list(tmp_path.iterdir()) == [file]


def test_the_danger_is_real(tmp_path):
    """The same file, loaded the usual way, does run: the test above tests something."""
    mark, file = tmp_path / "mark", tmp_path / "scene_info.npy"
    file.write_bytes(npy_with(pickle.dumps(wrapped(EVIL["deep"](mark)), 2)))
    np.load(file, allow_pickle=True)
    assert mark.exists()


def objects_as_numbers() -> bytes:
    """An object array whose type claims to be plain: in NumPy, pointers taken from the file."""
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    dtype = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    return reconstruct + b"(I1\n(I1\nt" + dtype + b"I00\nS'AAAAAAAA'\ntb."


PLAIN_BUT_WRONG = {
    "objects_as_numbers": objects_as_numbers(),
    "build_on_a_global": b"cnumpy\ndtype\n(N}S'__setstate__'\nI1\nstb.",
    "call_the_array_type": b"cnumpy\nndarray\n(I5\ntR.",
    "structured": pickle.dumps(np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]), 2),
    "truncated": pickle.dumps(wrapped({"a": 1}), 2)[:-9],
    "no_array": pickle.dumps({"a": 1}, 2),
    "set": pickle.dumps(wrapped({1, 2}), 4),
    "empty": b"",
}


@pytest.mark.parametrize("kind", PLAIN_BUT_WRONG)
def test_malformed_pickles(kind, tmp_path):
    file = tmp_path / "x.npy"
    file.write_bytes(npy_with(PLAIN_BUT_WRONG[kind], (1,) if "objects" in kind else ()))
    with pytest.raises(StoreError, match="x.npy is (refused|damaged)"):
        load_npy(file)


def test_a_list_of_lists_of_lists_does_not_fill_the_memory(tmp_path):
    level: list = ["x"] * 10
    for _ in range(12):
        level = [level] * 10  # small as a pickle, 10^13 strings when written out
    file = tmp_path / "x.npy"
    file.write_bytes(npy_with(pickle.dumps(wrapped(level), 2)))
    import diwa.data.safe_npy as module

    limit, module._MAX_ITEMS = module._MAX_ITEMS, 10_000
    try:
        with pytest.raises(StoreError, match="nested too deeply"):
            load_npy(file)
    finally:
        module._MAX_ITEMS = limit


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_plain_objects_are_read_as_numpy_reads_them(protocol, tmp_path):
    value = {
        "a": [1, 2.5, "text", None, True, b"bytes"],
        "b": (np.int64(3), np.float32(0.1), np.arange(6, dtype=">i2").reshape(2, 3)),
        "c": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "d": np.array(["x", {"y": np.zeros((0, 2))}], dtype=object),
    }
    file = tmp_path / "x.npy"
    file.write_bytes(npy_with(pickle.dumps(wrapped(value), protocol)))
    got = load_npy(file)
    assert got["a"] == value["a"] and got["b"][:2] == value["b"][:2]
    assert type(got["b"]) is tuple and isinstance(got["b"][0], np.int64)
    for g, w in ((got["b"][2], value["b"][2]), (got["c"], value["c"])):
        np.testing.assert_array_equal(g, w)
        assert g.dtype == w.dtype
    assert got["d"][0] == "x" and got["d"][1]["y"].shape == (0, 2)


# The command

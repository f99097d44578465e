"""CALVIN conversions that are interrupted, and every kind of damage named."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from calvin_made import files, write_split

from diwa import cli
from diwa.data.calvin_convert import (
    calvin_to_store,
    store_to_calvin,
)
from diwa.data.calvin_format import CalvinSplit
from diwa.data.store import EpisodeStore
from diwa.errors import StoreError


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return write_split(tmp_path_factory.mktemp("task") / "training")


@pytest.fixture
def split(template, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(template, tmp_path / "training"))


def test_a_stopped_conversion_goes_on_and_nobody_sees_it_before(split, tmp_path, monkeypatch):
    expected = files(calvin_to_store(split, tmp_path / "all", size=8).path)
    target = tmp_path / "store"

    def stop(done, total):
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calvin_to_store(split, target, size=8, progress=stop)
    assert not target.exists()
    with pytest.raises(StoreError, match="no episode store"):
        EpisodeStore(target)
    read = []
    original = CalvinSplit.frame
    monkeypatch.setattr(
        CalvinSplit,
        "frame",
        lambda self, n, keys=None: (read.append(n), original(self, n, keys))[1],
    )
    store = calvin_to_store(split, target, size=8)
    assert read == [7, *CalvinSplit(split).numbers()[15:]]  # the first is looked at for its keys
    assert files(store.path) == expected
    assert {p.name for p in tmp_path.iterdir()} == {"all", "store", "training"}


def test_a_killed_conversion_goes_on(split, tmp_path):
    """SIGKILL leaves no time for tidying: what counts is what was committed."""
    expected = files(calvin_to_store(split, tmp_path / "all", size=8).path)
    code = f"""
import os, signal
from diwa.data import calvin_convert
calvin_convert._MAX_COMMIT = 4
def kill(done, total):
    if done == 15:
        os.kill(os.getpid(), signal.SIGKILL)
calvin_convert.calvin_to_store({str(split)!r}, {str(tmp_path / "store")!r}, size=8, progress=kill)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert not (tmp_path / "store").exists()
    seen = []
    store = calvin_to_store(
        split, tmp_path / "store", size=8, progress=lambda *done: seen.append(done[0])
    )
    assert seen == list(range(13, 23)) and files(store.path) == expected


def test_another_layout_starts_again(split, tmp_path):
    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calvin_to_store(split, tmp_path / "store", size=8, progress=stop)
    seen = []
    store = calvin_to_store(
        split, tmp_path / "store", size=4, progress=lambda *done: seen.append(done[0])
    )
    assert seen[0] == 1 and store.columns["rgb_static"].shape == (22, 4, 4, 3)


def test_existing_store_is_kept_unless_asked(split, tmp_path):
    store = calvin_to_store(split, tmp_path / "store", size=8)
    with pytest.raises(StoreError, match="exists already"):
        calvin_to_store(split, store.path, size=4)
    assert calvin_to_store(split, store.path, size=4, overwrite=True).columns[
        "rgb_static"
    ].shape == (22, 4, 4, 3)
    with pytest.raises(StoreError, match="exists already"):
        store_to_calvin(store.path, split)


def test_two_writers_of_one_store(split, tmp_path):
    from diwa.data.writer import Layout, StoreWriter

    writer = StoreWriter(tmp_path / "store", Layout([3], [""], {}, {}))
    with pytest.raises(StoreError, match="another process is writing"):
        calvin_to_store(split, tmp_path / "store")
    with pytest.raises(StoreError, match="0 of 4 frames"):
        writer.finish()
    writer.close()
    calvin_to_store(split, tmp_path / "store", size=8)


# Damage


def rewrite(path: Path, **changes) -> None:
    with np.load(path) as archive:
        values = {k: archive[k] for k in archive.files} | changes
    np.savez_compressed(path, **{k: v for k, v in values.items() if v is not None})


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bytes_of_the_picture(path: Path) -> None:
    """The zip's directory stays whole; the compressed picture does not."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("rgb_static.npy").header_offset + 200
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)


FRAME = "episode_0000022.npz"
DAMAGE = {
    "truncated": (cut_in_half, rf"{FRAME} is truncated"),
    "empty": (lambda p: p.write_bytes(b""), rf"{FRAME} is truncated"),
    "text": (lambda p: p.write_text("404 not found"), rf"{FRAME} is truncated or no frame"),
    "corrupt": (flip_bytes_of_the_picture, rf"{FRAME}: rgb_static cannot be decoded"),
    "no_robot": (lambda p: rewrite(p, robot_obs=None), rf"{FRAME} has no robot_obs; it has"),
    "no_camera": (lambda p: rewrite(p, rgb_gripper=None), rf"{FRAME} has no rgb_gripper"),
    "shape": (lambda p: rewrite(p, scene_obs=np.zeros(23)), rf"{FRAME}: scene_obs has shape"),
    "nan": (lambda p: rewrite(p, robot_obs=np.full(15, np.nan)), rf"{FRAME}: robot_obs holds NaN"),
    "action": (
        lambda p: rewrite(p, rel_actions=np.array([0, 0, -1.25, 0, 0, 0, 1])),
        rf"{FRAME}: rel_actions holds -1.25, outside \[-1, 1\]",
    ),
    "float_picture": (
        lambda p: rewrite(p, rgb_static=np.zeros((20, 20, 3))),
        rf"{FRAME}: rgb_static is float64",
    ),
    "other_size": (
        lambda p: rewrite(p, rgb_static=np.zeros((6, 6, 3), np.uint8)),
        rf"{FRAME}: rgb_static: a 6 x 6 picture cannot be shrunk to 8",
    ),
    "object": (
        lambda p: rewrite(p, robot_obs=np.array([{}] * 15, dtype=object)),
        rf"{FRAME}: robot_obs cannot be decoded \(Object arrays cannot be loaded",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_frame_is_named_and_conversion_goes_on_once_it_is_repaired(
    kind, split, template, tmp_path
):
    damage, message = DAMAGE[kind]
    damage(split / FRAME)
    with pytest.raises(StoreError, match=message):
        calvin_to_store(split, tmp_path / "store", size=8)
    assert not (tmp_path / "store").exists()
    shutil.copyfile(template / FRAME, split / FRAME)
    seen = []
    store = calvin_to_store(
        split, tmp_path / "store", size=8, progress=lambda *done: seen.append(done[0])
    )
    assert seen[0] == 13 and store.frames == 22  # frame 22 is the thirteenth


def test_check_lists_every_damaged_frame(split, capsys):
    for name in (FRAME, "episode_0000009.npz"):
        cut_in_half(split / name)
    assert cli.main(["convert", "calvin", str(split), "unused", "--check"]) == 2
    err = capsys.readouterr().err
    assert "2 of 22 frames are damaged" in err and FRAME in err and "episode_0000009.npz" in err


def test_missing_frames_are_named(split, tmp_path):
    for n in (9, 21, 30):
        (split / f"episode_{n:07d}.npz").unlink()
    with pytest.raises(
        StoreError,
        match=r"3 of 22 frames are missing: episode_0000009.npz, episode_0000021.npz, "
        "episode_0000030.npz$",
    ):
        calvin_to_store(split, tmp_path / "store")
    assert list(tmp_path.iterdir()) == [split]


def test_wrong_folders(split, tmp_path):
    with pytest.raises(StoreError, match="is not a folder"):
        CalvinSplit(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"holds no frames; give one of its splits, such as .*ing"):
        CalvinSplit(tmp_path)
    np.save(split / "ep_start_end_ids.npy", np.array([[100, 120]]))
    with pytest.raises(StoreError, match="belongs to another split than the files"):
        calvin_to_store(split, tmp_path / "store")
    with pytest.raises(StoreError, match=r"open_drawer, frames 7 to 15, lies in no episode"):
        CalvinSplit(split).segments  # noqa: B018
    (split / "ep_start_end_ids.npy").unlink()
    with pytest.raises(StoreError, match="ep_start_end_ids.npy is missing"):
        CalvinSplit(split)


@pytest.mark.parametrize(
    "ids, message",
    [
        (np.array([[5, 3]]), "cannot run from frame 5 to 3"),
        (np.array([[0, 5], [5, 9]]), "episodes overlap"),
        (np.array([0, 5]), r"integers \[episodes, 2\], not int64 \(2,\)"),
        (np.zeros((2, 2)), r"not float64"),
        (np.zeros((0, 2), int), r"not int64 \(0, 2\)"),
    ],
)
def test_senseless_episode_tables(ids, message, split):
    np.save(split / "ep_start_end_ids.npy", ids)
    with pytest.raises(StoreError, match=message):
        CalvinSplit(split)


def test_senseless_annotations(split):
    file = split / "lang_annotations" / "auto_lang_ann.npy"
    np.save(file, {"language": {"ann": ["a"], "task": []}, "info": {"indx": []}}, allow_pickle=True)
    with pytest.raises(StoreError, match=r"auto_lang_ann.npy holds no language annotations"):
        CalvinSplit(split).segments  # noqa: B018
    file.unlink()
    with pytest.raises(StoreError, match=r"auto_lang_ann.npy does not exist"):
        CalvinSplit(split).segments  # noqa: B018

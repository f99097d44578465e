"""CALVIN's layout: both ways bit for bit, resumable, and every kind of damage named."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diwa import cli
from diwa.data.calvin_convert import (
    area_weights,
    calvin_to_store,
    demonstrations_to_store,
    resize_area,
    store_to_calvin,
)
from diwa.data.calvin_format import CalvinSplit, Segment, read_statistics, select_segments
from diwa.data.store import NEUTRAL_ACTION, Episode, EpisodeStore, write_store
from diwa.envs.tasks import DRAWER, task_success
from diwa.errors import StoreError

RECORDED = Path(
    os.environ.get("DIWA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
).joinpath("calvin_mini")

EPISODES = [(7, 16), (20, 31)]
STATISTICS = """robot_obs:
  - _target_: os.system
    mean: [0.5, -1.0,
           2.0]
    std: [1e-3, 2, 3]
act_max_bound: [1.5, 2.5]
"""


def write_frame(path: Path, rng: np.random.Generator, drawer: float) -> None:
    scene = rng.normal(size=24)
    scene[DRAWER] = drawer
    np.savez_compressed(
        path,
        actions=rng.normal(size=7),
        rel_actions=np.append(rng.uniform(-1, 1, 6), 1.0),
        robot_obs=rng.normal(size=15),
        scene_obs=scene,
        rgb_static=rng.integers(0, 256, (20, 20, 3), np.uint8),
        rgb_gripper=rng.integers(0, 256, (12, 12, 3), np.uint8),
        depth_static=rng.normal(size=(20, 20)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A split of 22 frames as CALVIN would have written it."""
    folder = tmp_path_factory.mktemp("task") / "training"
    (folder / "lang_annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for first, last in EPISODES:
        for n in range(first, last + 1):
            write_frame(folder / f"episode_{n:07d}.npz", rng, 0.02 * (n - first))
    np.save(folder / "ep_start_end_ids.npy", np.array(EPISODES))
    np.save(folder / "ep_lens.npy", np.array([12, 10]))  # another order, as in the published data
    np.save(folder / "scene_info.npy", {"calvin_scene_D": [0, 40]}, allow_pickle=True)
    (folder / "statistics.yaml").write_text(STATISTICS)
    spans = [(np.int64(7), np.int64(15)), (8, 16), (20, 30), (22, 24)]
    table = {
        "language": {
            "ann": ["pull the drawer", "open it", "slide the drawer open", "shut the drawer"],
            "task": ["open_drawer", "open_drawer", "open_drawer", "close_drawer"],
            "emb": rng.normal(size=(4, 1, 384)).astype(np.float32),
        },
        "info": {"episodes": [], "indx": spans},
    }
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", table, allow_pickle=True)
    return folder


@pytest.fixture
def split(template, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(template, tmp_path / "training"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_same_arrays(one: Path, other: Path) -> None:
    """Same files; frames equal array for array, in order, dtype and bits; the rest byte by byte."""
    left, right = files(one), files(other)
    assert left.keys() == right.keys()
    for name in left:
        if not name.endswith(".npz"):
            assert left[name] == right[name], name
            continue
        with np.load(one / name) as a, np.load(other / name) as b:
            assert a.files == b.files
            for key in a.files:
                assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
                assert a[key].tobytes() == b[key].tobytes(), (name, key)


def test_exact_store_gives_the_split_back_bit_for_bit(template, tmp_path):
    store = calvin_to_store(template, tmp_path / "store", exact=True)
    assert_same_arrays(template, store_to_calvin(store.path, tmp_path / "back"))


@pytest.mark.skipif(not RECORDED.exists(), reason="calvin_mini is not here")
@pytest.mark.parametrize("name", ["training", "validation"])
def test_recorded_calvin_data_gives_itself_back_bit_for_bit(name, tmp_path):
    store = calvin_to_store(RECORDED / name, tmp_path / "store", exact=True)
    assert_same_arrays(RECORDED / name, store_to_calvin(store.path, tmp_path / "back"))


@pytest.mark.skipif(not RECORDED.exists(), reason="calvin_mini is not here")
def test_recorded_annotations_are_solved_by_the_rule_where_the_readme_says():
    found = {}
    for name in ("training", "validation"):
        split = CalvinSplit(RECORDED / name)
        split.verify()
        assert not split.damaged(keys=["robot_obs", "rgb_gripper"])
        for segment in split.segments:
            (demo,) = split.demonstrations(segment.task, cameras=["rgb_static"])
            found[segment.task] = (segment.start, segment.end)
            assert demo.frames["rgb_static"].shape == (len(demo) + 1, 200, 200, 3)
            # Solved between start and end - 1, in the last 16 frames of those; not at the start.
            first = int(np.argmax(demo.success))
            assert demo.success[first:].all() and not demo.success[0]
            assert 0 < first < len(demo) and first >= len(demo) - 16
    assert found == {"open_drawer": (45, 78), "turn_on_led": (84, 121), "move_slider_left": (1, 34)}


def test_store_holds_the_frames_actions_and_small_pictures(template, tmp_path):
    seen = []
    store = calvin_to_store(
        template, tmp_path / "s", size=8, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (22, 22) and list(store.lengths) == [9, 11] and store.tasks == ["", ""]
    assert store.cameras == ["rgb_static", "rgb_gripper"]
    split = CalvinSplit(template)
    for i, (first, last) in enumerate(EPISODES):
        episode = store[i]
        episode.validate()
        for t, n in enumerate(range(first, last + 1)):
            frame = split.frame(n)
            np.testing.assert_array_equal(episode.robot_obs[t], frame["robot_obs"].astype("f4"))
            np.testing.assert_array_equal(episode.scene_obs[t], frame["scene_obs"].astype("f4"))
            for camera in store.cameras:
                small = resize_area(frame[camera], 8)
                np.testing.assert_array_equal(episode.frames[camera][t], small)
            if n < last:
                np.testing.assert_array_equal(episode.action[t], frame["rel_actions"].astype("f4"))
    ends = store.starts + store.lengths
    np.testing.assert_array_equal(store.action[ends], np.tile(NEUTRAL_ACTION, (2, 1)))


def test_area_interpolation_is_the_mean_of_the_covered_pixels():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (12, 12, 3), np.uint8)
    blocks = picture.reshape(4, 3, 4, 3, 3).mean((1, 3))
    assert np.abs(resize_area(picture, 4) - blocks).max() <= 0.5 + 1e-3
    weights = area_weights(5, 2)  # 2.5 source pixels each
    np.testing.assert_allclose(weights, [[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]], atol=1e-7)
    assert resize_area(picture, 12) is picture
    with pytest.raises(ValueError, match="12 x 12 picture cannot be shrunk to 16"):
        resize_area(picture, 16)


def test_a_store_without_a_split_becomes_one_that_reads_back(tmp_path):
    rng = np.random.default_rng(0)
    scene = rng.normal(size=(6, 24)).astype(np.float32)
    scene[:, DRAWER] = np.linspace(0, 0.2, 6)
    made = Episode(
        rng.normal(size=(6, 15)).astype(np.float32),
        scene,
        rng.uniform(-1, 1, (5, 7)).astype(np.float32),
        task_success("open_drawer", scene[0], scene),
        "open_drawer",
        {"rgb_static": rng.integers(0, 256, (6, 8, 8, 3), np.uint8)},
    )
    play = Episode(made.robot_obs, made.scene_obs, made.action, frames=made.frames)
    store = write_store(tmp_path / "store", [play, made])
    split = CalvinSplit(store_to_calvin(store.path, tmp_path / "split", first_frame=100))
    assert split.episodes.tolist() == [[100, 105], [106, 111]]
    assert split.segments == [Segment("open_drawer", "open drawer", 106, 111)]
    assert split.scene_info == {"calvin_scene_D": [100, 111]}
    frame = split.frame(101)  # the absolute action is the pose that was reached
    np.testing.assert_array_equal(frame["actions"][:6], made.robot_obs[2, :6])
    assert frame["actions"][6] == made.action[1, 6]
    np.testing.assert_allclose(
        split.statistics["robot_obs"]["mean"], store.robot_obs.mean(0), atol=1e-6
    )
    (demo,) = split.demonstrations("open_drawer", 1)
    np.testing.assert_array_equal(demo.success, made.success)
    back = calvin_to_store(split.path, tmp_path / "back", size=0)
    for key in ("robot_obs", "scene_obs", "action"):
        np.testing.assert_array_equal(getattr(back, key), getattr(store, key))
    np.testing.assert_array_equal(
        back.columns["rgb_static"].array, store.columns["rgb_static"].array
    )


def test_demonstrations_are_drawn_with_a_seed(template, tmp_path):
    split = CalvinSplit(template)
    spans = {
        seed: [s.start for s in select_segments(split.segments, "open_drawer", 2, seed, template)]
        for seed in range(8)
    }
    assert len({tuple(v) for v in spans.values()}) > 1
    assert all(len(set(v)) == 2 and v == sorted(v) for v in spans.values())
    store = demonstrations_to_store(template, tmp_path / "d", "open_drawer", n=2, seed=3, size=8)
    assert [len(e) for e in store] == [
        s.end - s.start for s in select_segments(split.segments, "open_drawer", 2, 3, template)
    ]
    for episode in store:
        expected = episode.scene_obs[:, DRAWER] - episode.scene_obs[0, DRAWER] > 0.12
        np.testing.assert_array_equal(episode.success, expected)
        assert expected.any() and episode.frames["rgb_gripper"].shape[1:] == (8, 8, 3)
    with pytest.raises(StoreError, match="has 3 segments of open_drawer, 50 wanted"):
        split.demonstrations("open_drawer", 50)
    with pytest.raises(StoreError, match="has 0 segments of turn_on_led"):
        split.demonstrations("turn_on_led")


def test_statistics_are_read_without_yaml_and_run_nothing(template, tmp_path):
    found = CalvinSplit(template).statistics
    np.testing.assert_array_equal(found["robot_obs"]["mean"], [0.5, -1, 2])
    np.testing.assert_array_equal(found["robot_obs"]["std"], [1e-3, 2, 3])
    np.testing.assert_array_equal(found["act_max_bound"]["value"], [1.5, 2.5])
    bad = tmp_path / "statistics.yaml"
    bad.write_text("robot_obs:\n  - mean: [1, two]\n")
    with pytest.raises(StoreError, match=re.escape(str(bad))):
        read_statistics(bad)


# Interrupted conversions


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


# Pickles


def test_command_line(template, tmp_path, capsys):
    store, back = tmp_path / "store", tmp_path / "back"
    assert cli.main(["convert", "calvin", str(template), str(store), "--exact"]) == 0
    assert "22 frames in 2 episodes" in capsys.readouterr().out
    assert cli.main(["convert", "to-calvin", str(store), str(back)]) == 0
    assert_same_arrays(template, back)
    demos = ["convert", "demos", str(template), str(tmp_path / "d"), "--task", "open_drawer"]
    assert cli.main([*demos, "--n", "0", "--size", "0"]) == 0
    assert "3 segments of open_drawer, 3 solved" in capsys.readouterr().out
    assert cli.main(["convert", "calvin", str(template), "x", "--check"]) == 0
    assert "22 frames of 2 episodes are complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["convert"], "to-calvin"),
        (["convert", "--help"], "A CALVIN split, once, into an episode store"),
        (["convert", "calvin", "--help"], "Frames are shrunk to this many pixels"),
        (["convert", "calvni"], "did you mean `diwa convert calvin`?"),
        (["convert", "calvin", "a", "b", "--sise", "3"], "--size"),
        (["convert", "calvin", "nowhere", "b"], "nowhere is not a folder"),
    ],
)
def test_command_line_explains_itself(arguments, expected, capsys):
    with contextlib.suppress(SystemExit):
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert expected in re.sub(r"[\s│]+", " ", out + err)

"""CALVIN's layout: both ways bit for bit, demonstrations, the command line."""

import contextlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from calvin_made import EPISODES, assert_same_arrays, write_split

from diwa import cli
from diwa.data.calvin_convert import (
    area_weights,
    calvin_to_store,
    demonstrations_to_store,
    resize_area,
    store_to_calvin,
)
from diwa.data.calvin_format import CalvinSplit, Segment, read_statistics, select_segments
from diwa.data.store import NEUTRAL_ACTION, Episode, write_store
from diwa.envs.tasks import DRAWER, task_success
from diwa.errors import StoreError

RECORDED = Path(
    os.environ.get("DIWA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
).joinpath("calvin_mini")


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return write_split(tmp_path_factory.mktemp("task") / "training")


@pytest.fixture
def split(template, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(template, tmp_path / "training"))


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

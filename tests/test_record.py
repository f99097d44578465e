"""Play, demonstrations and starts with pictures: what is recorded, interruption, what is shown."""

import itertools

import numpy as np
import pytest

pytest.importorskip("pybullet", reason="recording needs the simulator")

from diwa.data import record
from diwa.data.collect import collect_demos, collect_play, play_lengths
from diwa.data.store import NEUTRAL_ACTION
from diwa.envs.playtable import PlayTable
from diwa.envs.starts import make_starts

SKILLS = ("move_slider_left", "move_slider_right")
COUNT, SEED, SIZE = 700, 5, 16


def recorded(path):
    return record.record_play(path, COUNT, SEED, 1, SKILLS, SIZE)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("record") / "play")


def test_is_the_play_that_is_collected_without_pictures(store):
    plain = collect_play(COUNT, SEED, workers=1, skills=SKILLS)
    assert len(store) == len(plain) == len(play_lengths(COUNT, SEED))
    for a, b in zip(store, plain, strict=True):
        np.testing.assert_array_equal(a.action, b.action)
        np.testing.assert_array_equal(a.robot_obs, b.robot_obs)
        np.testing.assert_array_equal(a.scene_obs, b.scene_obs)
    ends = store.starts + store.lengths
    assert (store.action[ends] == NEUTRAL_ACTION).all()


def test_pictures_belong_to_their_states(store):
    episode = store[0]
    assert store.cameras == ["rgb_static", "rgb_gripper"]
    assert episode.frames["rgb_static"].shape == (len(episode) + 1, SIZE, SIZE, 3)
    env = PlayTable(cameras=True, image_size=SIZE)
    try:
        for t in (0, 150, len(episode)):
            env.set_state(episode.robot_obs[t], episode.scene_obs[t])
            seen = env._observation()
            for camera in store.cameras:
                difference = np.abs(seen[camera].astype(int) - episode.frames[camera][t])
                assert difference.mean() < 4, (camera, t)  # the reset settles within a step
    finally:
        env.close()


def test_a_killed_recording_goes_on_to_the_same_bytes(store, tmp_path, monkeypatch):
    whole = record.play_episodes

    def killed(*args):
        yield next(iter(whole(*args)))
        raise KeyboardInterrupt

    path = tmp_path / "play"
    monkeypatch.setattr(record, "play_episodes", killed)
    with pytest.raises(KeyboardInterrupt):
        recorded(path)
    assert not path.exists()
    firsts = []

    def watched(lengths, seed, workers, skills, spec, first):
        firsts.append(first)
        return whole(lengths, seed, workers, skills, spec, first)

    monkeypatch.setattr(record, "play_episodes", watched)
    again = recorded(path)
    assert firsts == [1]
    for name in ("robot_obs", "scene_obs", "action", "rgb_static", "rgb_gripper"):
        assert (path / f"{name}.npy").read_bytes() == (store.path / f"{name}.npy").read_bytes()
    assert again.transitions == COUNT


def test_demos_and_starts_with_pictures():
    with_pictures = collect_demos(SKILLS[0], 1, seed=0, workers=1, image_size=SIZE)[0]
    plain = collect_demos(SKILLS[0], 1, seed=0, workers=1)[0]
    np.testing.assert_array_equal(with_pictures.action, plain.action)
    with_pictures.validate()
    assert with_pictures.frames["rgb_gripper"].shape[0] == len(plain) + 1 and not plain.frames
    starts, bare = (make_starts(SKILLS[0], 2, 9, image_size=n) for n in (SIZE, 0))
    assert set(starts) - set(bare) == {"rgb_static", "rgb_gripper"}
    env = PlayTable(cameras=True, image_size=SIZE)
    try:
        for k, key in itertools.product(range(2), bare):
            np.testing.assert_array_equal(starts[key][k], bare[key][k])
            seen, _ = env.reset(options={name: bare[name][k] for name in bare})
            np.testing.assert_array_equal(seen["rgb_static"], starts["rgb_static"][k])
    finally:
        env.close()

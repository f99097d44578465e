"""Recording: exact counts, independence of the number of workers, failures in play."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pybullet")
pytest.importorskip("gymnasium")

from diwa.data.collect import collect_demos, collect_play, play_episodes  # noqa: E402
from diwa.envs import SimulatorSpec  # noqa: E402
from diwa.envs.tasks import DRAWER, SWITCH, TASKS, fixture_tasks, task_success  # noqa: E402


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(getattr(a, key), getattr(b, key))
        for a, b in zip(first, second, strict=True)
        for key in ("robot_obs", "scene_obs", "action")
    )


@pytest.fixture(scope="module")
def play():
    return collect_play(2500, seed=4, workers=1)


def test_play_has_the_asked_number_of_valid_transitions(play):
    assert sum(len(episode) for episode in play) == 2500
    assert all(300 <= len(episode) <= 600 for episode in play[:-1])
    for episode in play:
        episode.validate()
        assert episode.task == ""
        assert np.abs(episode.action).max() <= 1
        assert set(np.unique(episode.action[:, 6])) <= {-1.0, 1.0}


def test_play_touches_every_fixture_and_does_not_only_succeed(play):
    """Per window of 60 steps: some solve something, some move nothing for good."""
    moved = np.concatenate([np.abs(np.diff(e.scene_obs[:, :4], axis=0)) > 1e-3 for e in play])
    assert (moved.sum(0) > 5).all()
    windows = [
        any(task_success(t, e.scene_obs[k], e.scene_obs[k : k + 60]).any() for t in TASKS)
        for e in play
        for k in range(0, len(e) - 60, 60)
    ]
    assert 0.2 < np.mean(windows) < 0.9


def test_recording_does_not_depend_on_the_number_of_workers():
    alone = collect_play(700, seed=9, workers=1)
    assert same(alone, collect_play(700, seed=9, workers=2))
    assert not same(alone, collect_play(700, seed=10, workers=1))


def test_focused_play_is_about_its_fixture(play):
    focused = collect_play(2500, seed=4, workers=1, skills=fixture_tasks("turn_on_lightbulb"))

    def share(episodes, joint):
        """Frames in which a joint moves, over all frames."""
        moves = [np.abs(np.diff(e.scene_obs[:, joint])) > 1e-3 for e in episodes]
        return np.concatenate(moves).mean()

    assert share(focused, SWITCH) > 2 * share(play, SWITCH)
    assert share(focused, SWITCH) > 5 * share(focused, DRAWER)


@pytest.mark.parametrize("task", ["turn_on_led", "close_drawer"])
def test_demonstrations_end_shortly_after_success(task):
    calls = []
    demos = collect_demos(task, 3, seed=1, workers=1, progress=lambda *done: calls.append(done))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    for episode in demos:
        episode.validate()
        assert episode.task == task
        first = int(episode.success.argmax())
        assert episode.success[first]
        assert not episode.success[:first].any()
        assert first + 4 >= len(episode) >= first
        expected = task_success(task, episode.scene_obs[0], episode.scene_obs)
        assert (episode.success == expected).all()
    assert same(demos[:2], collect_demos(task, 2, seed=1, workers=1))


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="n_transitions"):
        collect_play(0, seed=0)
    with pytest.raises(ValueError, match="juggle"):
        collect_play(10, seed=0, workers=1, skills=["juggle"])
    with pytest.raises(ValueError, match="juggle"):
        collect_demos("juggle", 1, seed=0, workers=1)
    with pytest.raises(RuntimeError, match="open_drawer"):
        collect_demos("open_drawer", 1, seed=0, workers=1, max_steps=3)


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "record.py"
    script.write_text("from diwa.data.collect import collect_play\ncollect_play(700, 0, 2)\n")
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 1
    assert '`if __name__ == "__main__":`' in ended.stderr.splitlines()[-1]


def test_recording_that_is_given_up_ends_its_processes():
    before = set(multiprocessing.active_children())
    episodes = play_episodes([300] * 4, 0, 2, TASKS, SimulatorSpec())
    next(episodes)
    assert set(multiprocessing.active_children()) - before
    episodes.close()
    assert set(multiprocessing.active_children()) <= before

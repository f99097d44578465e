"""Experts solve their skills, and fail when told to."""

import numpy as np
import pytest

pytest.importorskip("pybullet")
pytest.importorskip("gymnasium")

from diwa.envs.experts import Expert  # noqa: E402
from diwa.envs.playtable import PlayTable  # noqa: E402
from diwa.envs.starts import make_starts  # noqa: E402
from diwa.envs.tasks import TASKS  # noqa: E402


@pytest.fixture(scope="module")
def env():
    env = PlayTable()
    yield env
    env.close()


def run(env, task, start, seed=0, **style):
    """Length of the episode if it was solved, else None; checks every action on the way."""
    env.reset(options={"task": task, **start})
    for count, action in enumerate(Expert(env, task, np.random.default_rng(seed), **style)):
        assert action.shape == (7,)
        assert action.dtype == np.float32
        assert np.abs(action).max() <= 1
        assert action[6] in (-1, 1)
        _, _, solved, truncated, _ = env.step(action)
        if solved:
            return count + 1
        if truncated:
            return None
    return None


def starts_of(task, n, seed=11):
    starts = make_starts(task, n, seed)
    return [{key: value[k] for key, value in starts.items()} for k in range(n)]


@pytest.mark.parametrize("task", TASKS)
def test_solves_random_starts_within_an_episode(env, task):
    """Measured 99 to 100 of 100; one miss in eight is allowed for another build of PyBullet."""
    lengths = []
    for k, start in enumerate(starts_of(task, 8)):
        aim = np.random.default_rng(k).uniform(-0.01, 0.01, 3) * (1.0, 1.0, 0.5)
        lengths.append(run(env, task, start, seed=k, noise=0.1, aim_error=aim))
    solved = [length for length in lengths if length is not None]
    assert len(solved) >= 7
    assert np.mean(solved) <= 60


@pytest.mark.parametrize(
    "task, aim",
    [
        ("turn_on_led", (0.07, 0.0, 0.0)),
        ("open_drawer", (0.0, 0.0, 0.06)),
        ("open_drawer", (0.0, -0.07, 0.0)),
        ("move_slider_left", (0.0, -0.07, 0.0)),
        ("turn_on_lightbulb", (-0.12, 0.0, 0.0)),
    ],
)
def test_a_large_aim_error_misses(env, task, aim):
    results = [run(env, task, start, aim_error=aim) for start in starts_of(task, 3)]
    assert results == [None] * 3


@pytest.mark.parametrize("task", ["open_drawer", "close_drawer", "move_slider_left"])
def test_half_a_stroke_is_not_enough(env, task):
    assert run(env, task, starts_of(task, 1)[0], travel=0.35, noise=0.02) is None


def test_pauses_and_low_speed_take_longer(env):
    start = starts_of("turn_on_led", 1)[0]
    fast = run(env, "turn_on_led", start, noise=0.0)
    slow = run(env, "turn_on_led", start, noise=0.0, speed=0.5)
    hesitant = run(env, "turn_on_led", start, noise=0.0, pause_prob=0.3)
    assert fast < slow
    assert fast < hesitant


def test_same_seed_same_actions(env):
    start = starts_of("open_drawer", 1)[0]

    def actions():
        env.reset(options={"task": "open_drawer", **start})
        found = []
        for action in Expert(env, "open_drawer", np.random.default_rng(4), noise=0.2):
            env.step(action)
            found.append(action)
        return np.array(found)

    assert np.array_equal(actions(), actions())


def test_unknown_task_is_named(env):
    with pytest.raises(ValueError, match="juggle"):
        Expert(env, "juggle", np.random.default_rng(0))

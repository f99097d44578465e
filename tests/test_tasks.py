"""The success rules against CALVIN's own oracle, and at their thresholds."""

import os
from pathlib import Path

import numpy as np
import pytest

from diwa.envs.tasks import BULB, DRAWER, LED, SLIDER, TASKS, fixture_tasks, task_success

DATA = Path(
    os.environ.get("DIWA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
).joinpath("calvin_rollouts.npz")


def scene(**values):
    out = np.zeros(24)
    for name, value in values.items():
        out[{"slider": SLIDER, "drawer": DRAWER, "bulb": BULB, "led": LED}[name]] = value
    return out


@pytest.mark.skipif(not DATA.exists(), reason="calvin_rollouts.npz is not here")
def test_agrees_with_every_recorded_oracle_entry():
    recorded = np.load(DATA)
    names = [str(name) for name in recorded["task_names"]]
    assert set(names) == set(TASKS)
    for episode, begin in enumerate(recorded["start"]):
        rows = slice(begin, begin + recorded["length"][episode])
        for column, task in enumerate(names):
            found = task_success(
                task, recorded["first_scene_obs"][episode], recorded["scene_obs"][rows]
            )
            assert (found == recorded["oracle"][rows, column]).all(), (task, episode)


@pytest.mark.parametrize(
    "task, start, below, above",
    [
        ("open_drawer", scene(drawer=0.05), scene(drawer=0.169), scene(drawer=0.171)),
        ("close_drawer", scene(drawer=0.2), scene(drawer=0.081), scene(drawer=0.079)),
        ("move_slider_left", scene(slider=0.1), scene(slider=0.249), scene(slider=0.251)),
        ("move_slider_right", scene(slider=0.28), scene(slider=0.131), scene(slider=0.129)),
        ("turn_on_lightbulb", scene(), scene(led=1), scene(bulb=1)),
        ("turn_off_lightbulb", scene(bulb=1), scene(bulb=1), scene()),
        ("turn_on_led", scene(), scene(bulb=1), scene(led=1)),
        ("turn_off_led", scene(led=1), scene(led=1), scene(bulb=1)),
    ],
)
def test_threshold_and_direction(task, start, below, above):
    assert not task_success(task, start, below)
    assert task_success(task, start, above)
    assert not task_success(task, above, start)  # the way back is another skill


def test_leading_dimensions_broadcast():
    start = np.zeros((3, 1, 24))
    now = np.zeros((3, 5, 24))
    now[1, 4, DRAWER] = 0.2
    found = task_success("open_drawer", start, now)
    assert found.shape == (3, 5)
    assert found.sum() == 1
    assert found[1, 4]


def test_tasks_of_one_fixture():
    assert fixture_tasks("close_drawer") == ("open_drawer", "close_drawer")
    assert fixture_tasks("turn_on_led") == ("turn_on_led", "turn_off_led")
    assert {name for task in TASKS for name in fixture_tasks(task)} == set(TASKS)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="fly.*open_drawer"):
        task_success("fly", np.zeros(24), np.zeros(24))
    with pytest.raises(ValueError, match="24"):
        task_success("open_drawer", np.zeros(15), np.zeros(24))

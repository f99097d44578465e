"""The embedded simulator: interface, lamps and button, repeatability, closeness to CALVIN."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pybullet")
gymnasium = pytest.importorskip("gymnasium")

from diwa.envs import playtable  # noqa: E402
from diwa.envs.experts import Expert  # noqa: E402
from diwa.envs.panda import POS_SCALE, REST_JOINTS  # noqa: E402
from diwa.envs.playtable import PlayTable, env_steps_taken  # noqa: E402
from diwa.envs.starts import TCP_HIGH, TCP_LOW, make_starts  # noqa: E402
from diwa.envs.tasks import BULB, BUTTON, DRAWER, LED, RULES, SWITCH, TASKS, task_success  # noqa: E402

DATA = Path(
    os.environ.get("DIWA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
).joinpath("calvin_rollouts.npz")
recorded_data = pytest.mark.skipif(not DATA.exists(), reason="calvin_rollouts.npz is not here")


def rest_state(**fixtures):
    """Arm at rest above the table, blocks in their places, the given scene entries set."""
    robot, scene = np.zeros(15), np.zeros(24)
    robot[7:14], robot[14] = REST_JOINTS, -1.0
    for k, place in enumerate([(0.05, -0.12, 0.46), (0.23, -0.12, 0.46), (0.07, 0.095, 0.461)]):
        scene[6 + 6 * k : 9 + 6 * k] = place
        scene[11 + 6 * k] = np.pi / 2
    for index, value in fixtures.items():
        scene[{"drawer": DRAWER, "button": BUTTON, "switch": SWITCH, "led": LED}[index]] = value
    scene[BULB] = scene[SWITCH] > 0.044
    return {"robot_obs": robot, "scene_obs": scene}


@pytest.fixture(scope="module")
def env():
    env = PlayTable()
    yield env
    env.close()


def move_joint(env, name, value):
    """Puts a fixture's joint somewhere, as a hand would, and lets one control step pass."""
    playtable.bullet.resetJointState(
        env._table, env._link[name], value, physicsClientId=env._client
    )
    return env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))[0]["scene_obs"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cameras", [False, True])
def test_gymnasium_check(cameras):
    from gymnasium.utils.env_checker import check_env

    check_env(PlayTable("open_drawer", cameras=cameras, render_mode="rgb_array"))


def test_observation_follows_the_layout(env):
    start = rest_state(drawer=0.1, switch=0.088)
    observation, info = env.reset(options=start)
    robot, scene = observation["robot_obs"], observation["scene_obs"]
    np.testing.assert_allclose(robot[7:14], REST_JOINTS, atol=1e-3)  # one step of settling
    np.testing.assert_allclose(robot[:3], (0.0259, -0.2313, 0.5713), atol=2e-3)  # recorded pose
    np.testing.assert_allclose(scene, start["scene_obs"], atol=2e-3)
    assert robot[14] == -1
    assert not info["success"]


@pytest.mark.parametrize("axis", range(3))
def test_relative_motion_moves_the_tool_along_the_axis(env, axis):
    env.reset(options=rest_state())
    before = env.robot.tcp()
    action = np.array([0, 0, 0, 0, 0, 0, -1.0])
    action[axis] = 1.7  # clipped to 1
    for _ in range(4):
        env.step(action)
    for _ in range(6):
        env.step(action * (np.arange(7) == 6))
    expected = np.zeros(3)
    expected[axis] = 4 * POS_SCALE
    np.testing.assert_allclose(env.robot.tcp() - before, expected, atol=3e-3)


def test_target_winds_up_when_the_tool_is_blocked(env):
    """CALVIN adds motions to a running target, also when the tool stands still."""
    env.reset(options=rest_state())
    down = np.array([0, 0, -1, 0, 0, 0, -1.0])
    for _ in range(20):
        env.step(down)
    assert env.robot.target_pos[2] == pytest.approx(0.5713 - 20 * POS_SCALE, abs=2e-3)
    assert env.robot.tcp()[2] > env.robot.target_pos[2] + 0.1


def test_gripper_opens_at_zero_and_closes_below(env):
    env.reset(options=rest_state())
    for _ in range(8):
        width = env.step(np.zeros(7))[0]["robot_obs"][6]
    assert width > 0.07
    for _ in range(8):
        observation = env.step(np.array([0, 0, 0, 0, 0, 0, -0.01]))[0]
    assert observation["robot_obs"][6] < 0.01
    assert observation["robot_obs"][14] == -1


def test_each_press_of_the_button_flips_the_led_once(env):
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])
    env.reset(options=rest_state())
    for expected in (1, 0):
        press = Expert(env, "turn_on_led", np.random.default_rng(0), noise=0.0)
        before = scene = env.step(still)[0]["scene_obs"]
        while scene[LED] == before[LED]:
            scene = env.step(press.action())[0]["scene_obs"]
        assert scene[BUTTON] > 0.01
        assert scene[LED] == expected
        held = [env.step(still)[0]["scene_obs"] for _ in range(5)]  # still pressed: no second flip
        assert all(h[BUTTON] > 0.01 and h[LED] == expected for h in held)
        for action in itertools.chain(press, [still] * 5):
            scene = env.step(action)[0]["scene_obs"]
        assert scene[BUTTON] < 0.002  # the spring brought it back
        assert scene[LED] == expected


def test_led_state_given_at_reset_needs_one_press(env):
    env.reset(options=rest_state(led=1))
    for action in Expert(env, "turn_off_led", np.random.default_rng(0), noise=0.0):
        scene = env.step(action)[0]["scene_obs"]
    assert scene[LED] == 0


def test_bulb_follows_the_switch(env):
    env.reset(options=rest_state())
    assert [move_joint(env, "switch", v)[BULB] for v in (0.043, 0.046, 0.088, 0.02)] == [0, 1, 1, 0]


def test_fixtures_stay_where_they_are_left(env):
    env.reset(options=rest_state(drawer=0.13, switch=0.05))
    before = env.fixtures()
    for _ in range(20):
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    np.testing.assert_allclose(env.fixtures(), before, atol=1e-3)


def test_reward_and_end_of_episode(env):
    env.reset(options={"task": "open_drawer", **rest_state()})
    env.max_episode_steps = 3
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])
    assert env.step(still)[1:4] == (0.0, False, False)
    env.step(still)
    assert env.step(still)[1:4] == (0.0, False, True)
    env.reset(options={"task": "open_drawer", **rest_state()})
    playtable.bullet.resetJointState(
        env._table, env._link["drawer"], 0.15, physicsClientId=env._client
    )
    _, reward, terminated, truncated, info = env.step(still)
    env.max_episode_steps = 72
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def test_steps_are_counted(env):
    env.reset(options=rest_state())
    before = env_steps_taken()
    env.step(np.zeros(7))
    env.step(np.zeros(7))
    env.reset(options=rest_state())
    assert env_steps_taken() - before == 2


def test_cameras_see_the_lamps():
    env = PlayTable(cameras=True)
    dark = env.reset(options=rest_state())[0]
    lit = env.reset(options=rest_state(led=1, switch=0.088))[0]
    env.close()
    for key in ("rgb_static", "rgb_gripper"):
        assert dark[key].shape == (64, 64, 3)
        assert dark[key].dtype == np.uint8
        assert dark[key].std() > 20
    top = lit["rgb_static"][:8].astype(int)
    green = (top[..., 1] > 200) & (top[..., 0] < 80)
    yellow = (top[..., 0] > 140) & (top[..., 1] > 140) & (top[..., 2] < 60)
    assert green.sum() >= 5
    assert yellow.sum() >= 2
    assert (dark["rgb_static"][:8].std(-1) < 60).all()


PROGRAM = """
import sys
import numpy as np
from diwa.envs.playtable import PlayTable
env = PlayTable("turn_on_led")
rng = np.random.default_rng(0)
env.reset(seed=7)
rows = [np.concatenate(list(env.step(rng.uniform(-1, 1, 7))[0].values())) for _ in range(40)]
sys.stdout.write(np.array(rows).tobytes().hex())
"""


def test_seeded_rollouts_are_identical_in_fresh_processes_and_after_resets(env):
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    fresh = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path},
    ).stdout  # fmt: skip
    expected = np.frombuffer(bytes.fromhex(fresh), np.float32).reshape(40, 39)
    for _ in range(2):  # this environment has lived through other tests
        rng = np.random.default_rng(0)
        env.reset(seed=7, options={"task": "turn_on_led"})
        steps = [env.step(rng.uniform(-1, 1, 7))[0] for _ in range(40)]
        found = np.array([np.concatenate(list(o.values())) for o in steps])
        assert (found == expected).all()


def test_two_instances_do_not_disturb_each_other(env):
    def roll(*others):
        env.reset(options=rest_state())
        for other in others:
            other.reset(seed=1)
        rng = np.random.default_rng(3)
        for _ in range(15):
            observation = env.step(rng.uniform(-1, 1, 7))[0]
            for other in others:
                other.step(rng.bit_generator.state["state"]["state"] % 2 * np.ones(7))
        return observation["robot_obs"]

    alone = roll()
    second = PlayTable()
    together = roll(second)
    second.close()
    assert (alone == together).all()


def test_async_vector_env():
    vector = gymnasium.vector.AsyncVectorEnv([lambda: PlayTable("open_drawer")] * 2)
    observation, _ = vector.reset(seed=5)
    assert observation["robot_obs"].shape == (2, 15)
    assert not np.array_equal(*observation["robot_obs"])  # another seed for each
    vector.step(vector.action_space.sample())
    vector.close()


def test_errors_name_what_is_wrong(env):
    with pytest.raises(ValueError, match="open_drawer"):
        PlayTable("open_window")
    with pytest.raises(ValueError, match="render_mode"):
        PlayTable(render_mode="human")
    with pytest.raises(ValueError, match=r"\(7,\)"):
        env.step(np.zeros(6))
    with pytest.raises(ValueError, match="robot_obs"):
        env.reset(options={"robot_obs": np.zeros(3), "scene_obs": np.zeros(24)})


def test_missing_simulator_names_the_extra():
    code = "import sys; sys.modules['pybullet'] = None\nimport diwa.envs\ndiwa.envs.PlayTable"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert 'pip install "diwa[sim]"' in done.stderr


@pytest.mark.parametrize("task", TASKS)
def test_starts_are_repeatable_and_leave_the_task_to_do(task):
    starts = make_starts(task, 6, seed=2)
    again = make_starts(task, 3, seed=2)
    for key, value in again.items():
        assert (starts[key][:3] == value).all()
    tool = starts["robot_obs"][:, :3]
    assert (tool >= np.array(TCP_LOW) - 0.004).all()
    assert (tool <= np.array(TCP_HIGH) + 0.004).all()
    rule, scene = RULES[task], starts["scene_obs"]
    limit = {"slider": 0.28, "drawer": 0.22}.get(task.split("_")[1], 1.0)
    room = limit - scene[:, rule.index] if rule.sign > 0 else scene[:, rule.index]
    assert (room > rule.change).all()
    assert ((scene[:, SWITCH] > 0.044) == (scene[:, BULB] == 1)).all()


@recorded_data
@pytest.mark.parametrize("task", TASKS)
def test_actions_recorded_in_calvin_solve_the_task_here(env, task):
    """Also at the right time and with the fixture within 2 cm: it is the same table."""
    recorded = np.load(DATA)
    joint = {BULB: SWITCH, LED: BUTTON}.get(RULES[task].index, RULES[task].index)
    for episode in np.flatnonzero(recorded["task"] == task)[:2]:
        begin = recorded["start"][episode]
        rows = slice(begin, begin + recorded["length"][episode])
        start = {key: recorded[f"reset_{key}"][episode] for key in ("robot_obs", "scene_obs")}
        env.reset(options=start)
        scene = np.stack([env.step(a)[0]["scene_obs"] for a in recorded["actions"][rows]])
        solved = task_success(task, recorded["first_scene_obs"][episode], scene)
        assert solved.any()
        assert abs(int(solved.argmax()) - int(recorded["success"][rows].argmax())) <= 3
        assert np.abs(scene[:, joint] - recorded["scene_obs"][rows, joint]).max() < 0.02


@recorded_data
def test_free_motion_follows_calvin(env):
    """Same arm, same controller: the tool stays within half a millimetre over 100 steps."""
    recorded = np.load(DATA)
    for episode in np.flatnonzero(recorded["task"] == "free_motion")[:2]:
        begin = recorded["start"][episode]
        rows = slice(begin, begin + recorded["length"][episode])
        start = {key: recorded[f"reset_{key}"][episode] for key in ("robot_obs", "scene_obs")}
        env.reset(options=start)
        robot = np.stack([env.step(a)[0]["robot_obs"] for a in recorded["actions"][rows]])
        gap = robot[:, :3] - recorded["robot_obs"][rows, :3]
        assert np.abs(gap).max() < 5e-4
        assert np.abs(robot[:, 6] - recorded["robot_obs"][rows, 6]).max() < 1e-3
        assert (robot[:, 14] == recorded["robot_obs"][rows, 14]).all()

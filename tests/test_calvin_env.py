"""CALVIN behind the interface of PlayTable; most of it needs the clone in `CALVIN_ENV_ROOT`."""

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pybullet")
pytest.importorskip("gymnasium")

from diwa import cli  # noqa: E402
from diwa.envs import TASKS, make_env  # noqa: E402
from diwa.envs.calvin import CalvinEnv, calvin_root, egl_works  # noqa: E402
from diwa.envs.experts import Expert  # noqa: E402
from diwa.envs.panda import POS_SCALE, REST_JOINTS  # noqa: E402
from diwa.envs.playtable import PlayTable  # noqa: E402
from diwa.envs.simulator import bullet  # noqa: E402
from diwa.envs.starts import BLOCK_SLOTS, make_starts, sample_starts  # noqa: E402
from diwa.envs.tasks import BULB, BUTTON, LED, SWITCH  # noqa: E402
from diwa.errors import SimulatorError  # noqa: E402

ROOT = os.environ.get("CALVIN_ENV_ROOT")
clone = pytest.mark.skipif(not ROOT, reason="CALVIN_ENV_ROOT names no clone of calvin_env")
STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])


def state(**scene_entries):
    """Arm at rest, blocks in their places, some entries of the scene set."""
    robot, scene = np.zeros(15), np.zeros(24)
    robot[7:14], robot[14] = REST_JOINTS, -1.0
    for k, place in enumerate(BLOCK_SLOTS):
        scene[6 + 6 * k : 9 + 6 * k], scene[11 + 6 * k] = place, np.pi / 2
    for name, value in scene_entries.items():
        scene[{"led": LED, "bulb": BULB, "button": BUTTON, "switch": SWITCH}[name]] = value
    return {"robot_obs": robot, "scene_obs": scene}


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Simulators that other tests have left open would keep CALVIN out of this process."""
    for client in range(64):
        if bullet.isConnected(client):
            bullet.disconnect(client)


@pytest.fixture
def env():
    env = make_env("calvin")
    yield env
    env.close()


def python(code, **environment):
    """Runs code in a process of its own; returns it when finished."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


# ---------------------------------------------------------------------- without a clone


def fake_clone(folder, *parts):
    for part in parts:
        (folder / part).mkdir(parents=True)
    return str(folder)


@pytest.fixture
def no_calvin_loaded():
    """The modules of a clone, put aside; those of a fake one do not stay."""

    def loaded():
        return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "calvin_env"}

    aside = loaded()
    for name in aside:
        del sys.modules[name]
    yield
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(aside)


def test_a_missing_clone_is_three_lines_of_help(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("CALVIN_ENV_ROOT", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SimulatorError, match="needs calvin_env") as caught:
        CalvinEnv()
    lines = str(caught.value).splitlines()
    assert [line[:2] for line in lines[1:]] == ["1.", "2.", "3."]
    assert "get_calvin_env.sh" in lines[1] and "CALVIN_ENV_ROOT" in lines[2]
    assert (Path(__file__).parents[1] / "tools/get_calvin_env.sh").exists()
    arguments = ["--preset", "tiny", "--env", "calvin", "--run-dir", str(tmp_path / "run")]
    assert cli.main(["collect", *arguments, "--collect.workers", "1"]) == cli.USAGE_ERROR
    assert "get_calvin_env.sh" in capsys.readouterr().err


def test_a_wrong_root_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CALVIN_ENV_ROOT", str(tmp_path))
    with pytest.raises(SimulatorError, match=f"{tmp_path} is not a clone"):
        calvin_root()
    fake_clone(tmp_path, "calvin_env/envs", "conf")
    with pytest.raises(SimulatorError, match="no data folder"):
        calvin_root()


def test_root_may_be_the_whole_benchmark(monkeypatch, tmp_path):
    fake_clone(tmp_path / "calvin_env", "calvin_env/envs", "conf", "data")
    monkeypatch.setenv("CALVIN_ENV_ROOT", str(tmp_path))
    assert calvin_root() == (tmp_path / "calvin_env").resolve()


def test_a_missing_dependency_is_named_with_the_extra(monkeypatch, tmp_path, no_calvin_loaded):
    monkeypatch.setenv("CALVIN_ENV_ROOT", fake_clone(tmp_path, "calvin_env/envs", "conf", "data"))
    (tmp_path / "calvin_env/envs/play_table_env.py").write_text("import no_such_module\n")
    with pytest.raises(SimulatorError, match=r'no_such_module.*"diwa\[calvin\]"'):
        CalvinEnv()
    assert str(tmp_path) not in sys.path


# ---------------------------------------------------------------------- with a clone


@clone
@pytest.mark.filterwarnings("ignore")
def test_gymnasium_check():
    from gymnasium.utils.env_checker import check_env

    env = CalvinEnv("open_drawer", cameras=True, image_size=32, render_mode="rgb_array")
    check_env(env, skip_render_check=True)  # it would make a second one in this process
    env.close()


@clone
def test_same_numbers_as_playtable(env):
    """Both start in the given state; the arms are one model, so the tool is at one place."""
    start = state(switch=0.088, bulb=1.0, led=1.0)
    ours, _ = env.reset(options=start)
    links = {name: env.link_position(name) for name in ("slide", "drawer", "switch", "button_base")}
    spaces = env.observation_space, env.action_space
    env.close()
    table = PlayTable()
    theirs, _ = table.reset(options=start)
    for name, position in links.items():
        np.testing.assert_allclose(position, table.link_position(name), atol=2e-3)
    assert spaces == (table.observation_space, table.action_space)
    table.close()
    np.testing.assert_allclose(ours["robot_obs"], theirs["robot_obs"], atol=2e-3)
    np.testing.assert_allclose(ours["scene_obs"], theirs["scene_obs"], atol=5e-3)  # blocks of mesh
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs.items()
    }


@clone
@pytest.mark.parametrize("task", TASKS)
def test_experts_solve_it(env, task):
    """Measured 320 of 320 in all; one miss in four is allowed for another build of PyBullet."""
    starts, solved = sample_starts(env, task, 4, 11), 0
    for k in range(4):
        rng = np.random.default_rng(k)
        env.reset(options={"task": task, **{key: value[k] for key, value in starts.items()}})
        aim = rng.uniform(-0.01, 0.01, 3) * (1.0, 1.0, 0.5)
        for action in Expert(env, task, rng, noise=0.1, aim_error=aim):
            _, reward, over, late, _ = env.step(action)
            if over or late:
                break
        solved += reward > 0
    assert solved >= 3


@clone
def test_actions_may_be_integers_and_the_gripper_any_number(env):
    env.reset(options=state())
    for _ in range(8):
        width = env.step(np.array([0, 0, 0, 0, 0, 0, 1]))[0]["robot_obs"][6]
    assert width > 0.07
    for _ in range(8):
        observation = env.step([0, 0, 0, 0, 0, 0, -0.3])[0]
    assert observation["robot_obs"][6] < 0.01 and observation["robot_obs"][14] == -1


@clone
def test_reset_forgets_the_last_gripper_action(env):
    start = state()
    env.reset(options=start)
    env.step(-STILL)
    assert env.reset(options=start)[0]["robot_obs"][14] == -1
    start["robot_obs"][14] = 1.0
    assert env.reset(options=start)[0]["robot_obs"][14] == 1


@clone
def test_episodes_repeat_exactly(env):
    """Two resets within one process differ by 3e-3 in calvin_env itself."""
    start = {key: value[0] for key, value in sample_starts(env, "open_drawer", 1, 5).items()}

    def episode():
        env.reset(options={"task": "open_drawer", **start})
        seen = []
        for action in Expert(env, "open_drawer", np.random.default_rng(4), noise=0.2):
            seen.append(np.concatenate(list(env.step(action)[0].values())))
        return np.array(seen)

    first = episode()
    assert all(np.array_equal(first, episode()) for _ in range(2))


@clone
def test_the_target_winds_up_and_a_reset_ends_that(env):
    env.reset(options=state())
    height = env.robot.target_pos[2]
    for _ in range(20):
        env.step(np.array([0, 0, -1, 0, 0, 0, -1.0]))
    assert env.robot.target_pos[2] == pytest.approx(height - 20 * POS_SCALE, abs=1e-6)
    assert env.robot.tcp()[2] > env.robot.target_pos[2] + 0.1
    env.reset(options=state())
    np.testing.assert_allclose(env.robot.target_pos, env.robot.tcp(), atol=2e-3)


@clone
def test_each_press_of_the_button_flips_the_led(env):
    """Its plain reset leaves an LED that was on in need of two presses."""
    for before in (1.0, 0.0):
        scene = env.reset(options=state(led=before))[0]["scene_obs"]
        assert scene[LED] == before
        press = Expert(env, "turn_on_led", np.random.default_rng(0), noise=0.0)
        while scene[BUTTON] < 0.01:
            scene = env.step(press.action())[0]["scene_obs"]
        assert scene[LED] == 1 - before


@clone
@pytest.mark.parametrize("last", [0.0, 0.02])
def test_a_button_that_starts_down_has_not_been_pressed(env, last):
    env.reset(options=state(button=last))
    env.step(STILL)
    env.reset(options=state(button=0.02))
    assert env.step(STILL)[0]["scene_obs"][LED] == 0


@clone
def test_a_lamp_between_off_and_on_is_one_of_them(env):
    scene = env.reset(options=state(led=0.93, bulb=0.04))[0]["scene_obs"]
    assert (scene[BULB], scene[LED]) == (0, 1)


@clone
def test_pictures_are_made_only_when_asked_for(env):
    env.reset(options=state())
    assert env._env.cameras == [] and "rgb_static" not in env.step(STILL)[0]
    frame = env.render(96)
    assert frame.shape == (96, 96, 3) and frame.dtype == np.uint8
    assert frame.flags.c_contiguous and frame.std() > 20


@clone
def test_both_cameras_see_the_table():
    env = make_env("calvin", cameras=True, image_size=48)
    first, _ = env.reset(options=state())
    for _ in range(4):
        then = env.step(np.array([1, 0, 0, 0, 0, 0, 1.0]))[0]
    env.close()
    for key in ("rgb_static", "rgb_gripper"):
        assert first[key].shape == (48, 48, 3) and first[key].flags.c_contiguous
        assert (first[key] != then[key]).any()


@clone
def test_one_simulator_per_process(env):
    with pytest.raises(SimulatorError, match="one process for each"):
        CalvinEnv()
    env.close()
    env.close()
    del env
    gc.collect()
    table = PlayTable()
    with pytest.raises(SimulatorError, match="first simulator"):
        CalvinEnv()
    gc.collect()  # a destructor there would disconnect the table
    table.reset(options=state())
    table.close()
    CalvinEnv().close()


@clone
def test_nothing_is_printed():
    code = "from diwa.envs import make_env; e = make_env('calvin'); e.reset(seed=0); e.close()\n"
    done = python(code + "left_to_the_interpreter = make_env('calvin')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@clone
def test_an_archive_without_git_will_do(tmp_path):
    root = calvin_root()
    shutil.copytree(root / "calvin_env", tmp_path / "calvin_env")
    for name in ("conf", "data"):
        (tmp_path / name).symlink_to(root / name)
    done = python("import diwa.envs as d; d.make_env('calvin').reset(seed=0); "
                  "import calvin_env; print(calvin_env.__file__)",
                  CALVIN_ENV_ROOT=str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


@clone
def test_gpu_renderer_only_where_it_starts(monkeypatch):
    if egl_works():
        done = python("from diwa.envs import make_env; e = make_env('calvin', renderer='egl')\n"
                      "e.reset(seed=0); assert e.render(64).std() > 20; e.close()")  # fmt: skip
        assert done.returncode == 0, done.stderr
    monkeypatch.setattr("diwa.envs.calvin.egl_works", lambda: False)
    with pytest.raises(SimulatorError, match="EGL"):
        CalvinEnv(renderer="egl")


@clone
def test_phases_run_in_it(tmp_path):
    """Collection in this process, episodes in two others."""
    from gymnasium.vector import AutoresetMode

    from diwa.data.store import EpisodeStore
    from diwa.envs.queue import queued_envs
    from diwa.phases.collect import collect, load_starts
    from diwa.presets import PRESETS
    from diwa.run import RunFolder

    tiny = PRESETS["tiny"]
    amounts = dataclasses.replace(
        tiny.collect, play_transitions=60, demos=1, train_starts=2, workers=1
    )
    config = dataclasses.replace(tiny, env="calvin", task="turn_on_led", collect=amounts)
    run = RunFolder(tmp_path / "run", config, quiet=True)
    assert collect(config, run)["play_transitions"] == 60
    demo = list(EpisodeStore(run.dir("collect") / "demos"))[0]
    starts = load_starts(run.dir("collect") / "starts.npz")
    envs = queued_envs(
        "turn_on_led", starts, [[0], [1]], 5, AutoresetMode.DISABLED, simulator="calvin"
    )
    try:
        observation, _ = envs.reset()
        np.testing.assert_allclose(observation["scene_obs"], starts["scene_obs"], atol=5e-3)
        envs.step(np.stack([demo.action[0]] * 2))
    finally:
        envs.close()


@clone
def test_starts_are_those_of_a_seed():
    starts, again = (make_starts("close_drawer", n, 2, "calvin") for n in (3, 2))
    for key in starts:
        assert np.array_equal(starts[key][:2], again[key])

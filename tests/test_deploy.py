"""Deployment: what the robot is told, and that it stands still whenever something is wrong."""

import threading
import time

import numpy as np
import pytest
import torch

from diwa.agent import Agent
from diwa.deploy import Controller, DeployConfig, SimulatedRobot, deploy
from diwa.errors import DiwaError
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.world_model import WorldModel
from diwa.presets import PRESETS

FAST = DeployConfig(rate=500.0, max_steps=11, timeout=5.0)


@pytest.fixture(scope="module")
def agent() -> Agent:
    torch.manual_seed(0)
    tiny = PRESETS["tiny"]
    model = WorldModel(tiny.world_model).requires_grad_(False)
    return Agent(model, DiffusionPolicy(model.feature_dim, tiny.policy).requires_grad_(False))


class Arm:
    """A robot that notes what it is told; `trouble(step)` happens while it observes."""

    def __init__(self, trouble=lambda step: None):
        self.actions, self.stops, self.trouble, self.seen = [], [], trouble, 0

    def observe(self):
        rng = np.random.default_rng(self.seen)
        robot, scene = rng.normal(size=15), rng.normal(size=24)
        step, self.seen = self.seen - 1, self.seen + 1  # the first is for warming up
        made = self.trouble(step)
        return {"robot_obs": robot if made is None else made, "scene_obs": scene}

    def act(self, action):
        self.actions.append(np.array(action))

    def stop(self):
        self.stops.append((threading.current_thread().name, len(self.actions)))


class PlainArm(Arm):
    stop = None


def test_the_robot_gets_what_filter_and_policy_say(agent):
    arm = Arm()
    report = deploy(arm, agent, FAST)
    assert report.steps == 11 and report.safe and report.reason == "steps"
    assert arm.stops == [("MainThread", 11)]
    assert set(report.latency_ms) == {"p50", "p95", "p99", "max"}
    assert report.latency_ms["p50"] <= report.latency_ms["max"]

    # The same by hand: the filter sees every frame, the policy plans every fourth.
    model, policy = agent.world_model, agent.policy
    generator = torch.Generator().manual_seed(0)
    state, action = model.rssm.initial(1), torch.tensor([[0, 0, 0, 0, 0, 0, 1.0]])
    other = Arm()
    other.observe()
    for t in range(11):
        seen = {k: torch.tensor(v, dtype=torch.float32)[None] for k, v in other.observe().items()}
        uniform = torch.rand(1, model.rssm.stoch_groups, generator=generator)
        obs = model.observation(**seen)
        state = model.filter(state, obs, action, torch.tensor([float(t == 0)]), uniform)
        if t % 4 == 0:
            chunk = agent.act(state, policy.noise(1, generator))[0]
        action = chunk[None, t % 4]
        np.testing.assert_allclose(arm.actions[t], action[0], rtol=1e-5, atol=1e-6)
        assert abs(arm.actions[t][6]) == 1 and np.abs(arm.actions[t]).max() <= 1


def test_the_rate_is_kept(agent):
    began = time.monotonic()
    report = deploy(Arm(), agent, DeployConfig(rate=20.0, max_steps=5, timeout=10.0))
    assert time.monotonic() - began >= 4 / 20 and report.steps == 5  # the fifth begins at 4 periods


def test_done_ends_the_run(agent):
    arm = Arm()
    report = deploy(arm, agent, FAST, done=lambda observation: arm.seen == 5)
    assert (report.steps, report.reason, report.safe) == (3, "done", True)
    assert len(arm.stops) == 1


@pytest.mark.parametrize(
    "trouble, reason",
    [
        (
            lambda step: np.full(15, np.nan) if step == 3 else None,
            "robot_obs holds NaN or infinity",
        ),
        (lambda step: np.zeros(14) if step == 3 else None, r"robot_obs has shape (14,)"),
        (lambda step: raise_(OSError("camera unplugged")) if step == 3 else None, "unplugged"),
    ],
)
@pytest.mark.parametrize("kind", [Arm, PlainArm])
def test_bad_observations_stop_the_robot(agent, kind, trouble, reason):
    arm = kind(trouble)
    report = deploy(arm, agent, FAST)
    assert not report.safe and report.steps == 3 and reason in report.reason
    check_standing_still(arm, 3)


def raise_(error):
    raise error


def check_standing_still(arm, steps):
    if isinstance(arm, PlainArm):  # no motion, and the gripper stays as it was
        assert len(arm.actions) == steps + 1
        np.testing.assert_array_equal(arm.actions[-1][:6], np.zeros(6))
        assert arm.actions[-1][6] == arm.actions[-2][6]
    else:
        assert len(arm.actions) == steps and len(arm.stops) == 1


def test_a_policy_that_says_nan_stops_the_robot(agent):
    broken = DiffusionPolicy(agent.world_model.feature_dim, PRESETS["tiny"].policy)
    torch.nn.init.constant_(broken.net.out.bias, torch.nan)
    arm = Arm()
    report = deploy(arm, Agent(agent.world_model, broken.requires_grad_(False)), FAST)
    assert not report.safe and "action holds NaN" in report.reason
    assert not arm.actions and len(arm.stops) == 1


@pytest.mark.parametrize("kind", [Arm, PlainArm])
def test_a_camera_that_hangs_does_not_prevent_stopping(agent, kind):
    """The robot is told to stop while `observe` still waits, from the watchdog's thread."""
    released, told = threading.Event(), []

    def hang(step):
        if step == 4:
            released.wait(20)
            told.append(len(arm.actions) if kind is PlainArm else list(arm.stops))

    arm = kind(hang)
    timer = threading.Timer(3.0, released.set)
    timer.start()
    report = deploy(arm, agent, DeployConfig(rate=500.0, max_steps=50, timeout=1.0))
    timer.join()
    assert not report.safe and report.steps == 4 and "longer than 1.0 s" in report.reason
    check_standing_still(arm, 4)
    assert told == ([5] if kind is PlainArm else [[("diwa-watchdog", 4)]])


def test_waiting_for_the_next_step_is_no_time_out(agent):
    report = deploy(Arm(), agent, DeployConfig(rate=0.8, max_steps=2, timeout=0.9, warm_up=3))
    assert report.safe and report.steps == 2


def test_interrupting_stops_the_robot(agent):
    arm = Arm(lambda step: raise_(KeyboardInterrupt()) if step == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        deploy(arm, agent, FAST)
    assert len(arm.actions) == 2 and len(arm.stops) == 1


def test_senseless_settings(agent):
    for bad in (DeployConfig(rate=0.0), DeployConfig(timeout=-1.0), DeployConfig(max_steps=-1)):
        with pytest.raises(DiwaError, match="must be positive"):
            deploy(Arm(), agent, bad)


def test_simulator_as_the_robot(agent):
    pytest.importorskip("pybullet")
    from diwa.envs.playtable import PlayTable

    env = PlayTable(task="turn_on_led")
    try:
        robot = SimulatedRobot(env, seed=0)
        before = np.array(robot.observe()["robot_obs"])
        report = deploy(robot, agent, DeployConfig(rate=60.0, max_steps=12, timeout=10.0))
        assert report.safe and report.steps == 12 and robot.stopped
        assert np.abs(robot.observe()["robot_obs"][:3] - before[:3]).max() > 1e-3
        frozen = robot.observe()
        robot.act(np.ones(7, np.float32))
        assert robot.observe() is frozen
    finally:
        env.close()


def test_controller_starts_afresh(agent):
    controller, arm = Controller(agent, seed=3), Arm()
    seen = [arm.observe() for _ in range(6)]
    first = [controller.act(o) for o in seen]
    controller.generator.manual_seed(3)
    controller.begin()
    np.testing.assert_array_equal([controller.act(o) for o in seen], first)

"""Running a policy on a robot: world-model filter and policy at a fixed rate, stopping safely.

A robot is anything with `observe()` and `act(action)`; `stop()` is used where there is one. The
same loop drives the simulator (`SimulatedRobot`), which is how it is tested.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .agent import Agent
from .data.store import NEUTRAL_ACTION
from .errors import DiwaError
from .nn.encoders import observed


class Robot(Protocol):
    """What `deploy` needs of a robot. A method `stop()` is called from another thread at a
    time-out, so it must not wait for the other two."""

    def observe(self) -> Mapping[str, NDArray]:
        """The present `robot_obs [15]` (CALVIN layout, metres, radians), with `scene_obs [24]` or,
        if the world model sees pictures, uint8 `rgb_static` and `rgb_gripper` `[h, w, 3]`."""
        ...

    def act(self, action: NDArray[np.float32]) -> None:
        """Begin a relative action `[7]` in [-1, 1], gripper -1 or +1; does not wait for its end."""
        ...


@dataclass(frozen=True)
class DeployConfig:
    """How a policy is run."""

    rate: float = 30.0
    """Control steps per second."""
    max_steps: int = 360
    """Steps after which the run ends."""
    timeout: float = 0.5
    """Seconds after which a step that is not over stops the robot."""
    seed: int = 0
    """Of the filter's and the policy's randomness."""
    warm_up: int = 2
    """Steps computed before the first action, so that it does not pay for first-use costs."""


@dataclass
class DeployReport:
    """What happened.

    Attributes:
        steps: actions given.
        reason: why it ended: `"steps"`, `"done"`, or what stopped it.
        safe: it ended as planned, not by a safe stop.
        missed: steps that began later than a tenth of a period after their time.
        latency_ms: percentiles of observation to action: `p50`, `p95`, `p99`, `max`.
        period_ms: the same of the time between actions.
    """

    steps: int = 0
    reason: str = "steps"
    safe: bool = True
    missed: int = 0
    latency_ms: dict[str, float] = field(default_factory=dict)
    period_ms: dict[str, float] = field(default_factory=dict)


class _Stop(Exception):
    """The robot must stand still now."""


class Controller:
    """Filter and policy of one robot: observation in, action out.

    Args:
        agent: world model and policy.
        seed: of its randomness.
    """

    def __init__(self, agent: Agent, seed: int = 0) -> None:
        self.agent = agent
        self.device = next(agent.policy.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)
        self.begin()

    def begin(self) -> None:
        """Forget the past: the next observation is the first of an episode."""
        self.state = self.agent.world_model.rssm.initial(1)
        self.reset = torch.ones(1, device=self.device)
        self.action = torch.from_numpy(NEUTRAL_ACTION.copy()).to(self.device)[None]
        self.time = 0

    @torch.no_grad()
    def act(self, observation: Mapping[str, NDArray]) -> NDArray[np.float32]:
        """Action `[7]` for an observation.

        Raises:
            ValueError: the observation has another shape, or it or the action is not finite.
        """
        model, policy = self.agent.world_model, self.agent.policy
        seen = {}
        for key, value in observed(observation, model.inputs, self.device).items():
            size = {"robot_obs": 15, "scene_obs": 24}.get(key)
            if size is not None and value.shape != (size,):
                shape = tuple(value.shape)
                raise ValueError(f"observation {key} has shape {shape}, expected ({size},)")
            if not torch.isfinite(value).all():
                raise ValueError(f"observation {key} holds NaN or infinity")
            seen[key] = value[None]
        uniform = model.uniform(1, generator=self.generator)
        self.state = model.filter(
            self.state, model.observation(**seen), self.action, self.reset, uniform
        )
        self.reset = torch.zeros_like(self.reset)
        within = self.time % policy.config.chunk
        if within == 0:
            self.chunk = self.agent.act(self.state, policy.noise(1, self.generator))[0]
        action = self.chunk[within]
        if not torch.isfinite(action).all():
            raise ValueError("the policy's action holds NaN or infinity")
        self.action, self.time = action[None], self.time + 1
        return action.cpu().numpy().astype(np.float32)


class _Watchdog:
    """Calls `bark` from its own thread when it has not been petted for `timeout` seconds."""

    def __init__(self, timeout: float, bark: Callable[[], None]) -> None:
        self._timeout, self._bark = timeout, bark
        self._petted = threading.Event()
        self._ended = False
        self.barked = False
        self._thread = threading.Thread(target=self._watch, name="diwa-watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended:
            if self._petted.wait(self._timeout):
                self._petted.clear()
            elif not self._ended:
                self.barked = True
                self._bark()
                return

    def pet(self) -> None:
        """The step is over in time; raises `_Stop` if it was not."""
        if self.barked:
            raise _Stop(f"a step took longer than {self._timeout} s")
        self._petted.set()

    def end(self) -> None:
        self._ended = True
        self._petted.set()
        self._thread.join()


def deploy(
    robot: Robot,
    agent: Agent,
    config: DeployConfig | None = None,
    done: Callable[[Mapping[str, NDArray]], bool] | None = None,
) -> DeployReport:
    """Run a policy on a robot until `max_steps`, `done`, or a safe stop.

    Each step observes, filters, plans where a chunk is used up, and acts, at `rate` per second. The
    robot is stopped when an observation or action is not finite, when a step exceeds `timeout`
    (from a thread of its own, so that a camera that hangs cannot prevent it), when anything raises,
    and at the end. Stopping is `robot.stop()` where there is one, else an action without motion and
    with the gripper as it was.

    Args:
        robot: the robot.
        agent: world model and policy.
        config: rate, limits and seed.
        done: judges each observation; True ends the run.

    Returns:
        Number of steps, why it ended, and latencies.

    Raises:
        DiwaError: a rate, limit or time-out that cannot be.
        KeyboardInterrupt: after the robot was stopped.
    """
    config = config or DeployConfig()
    if not (config.rate > 0 and config.max_steps >= 0 and config.timeout > 0):
        raise DiwaError(f"rate and timeout must be positive, max_steps not negative: {config}")
    controller, report = Controller(agent, config.seed), DeployReport()
    first = robot.observe()
    for _ in range(config.warm_up):
        try:
            controller.act(first)
        except ValueError:
            break  # the loop will meet it again and say so
    controller = Controller(agent, config.seed)
    gripper = [float(NEUTRAL_ACTION[6])]

    def stand_still() -> None:
        stop = getattr(robot, "stop", None)
        if stop is not None:
            stop()
        else:
            robot.act(np.array([0, 0, 0, 0, 0, 0, gripper[0]], np.float32))

    latency: list[float] = []
    times: list[float] = []
    watchdog = _Watchdog(config.timeout, stand_still)
    start = time.monotonic()
    try:
        for step in range(config.max_steps):
            due = start + step / config.rate
            _wait_until(due, watchdog)
            began = time.monotonic()
            report.missed += began - due > 0.1 / config.rate
            observation = robot.observe()
            if done is not None and done(observation):
                report.reason = "done"
                break
            action = controller.act(observation)
            watchdog.pet()
            robot.act(action)
            ended = time.monotonic()
            watchdog.pet()
            gripper[0] = float(action[6])
            latency.append(ended - began)
            times.append(ended)
            report.steps += 1
    except (_Stop, ValueError, OSError, RuntimeError) as error:
        report.safe, report.reason = False, str(error)
    finally:
        watchdog.end()
        if not watchdog.barked:
            stand_still()
    if watchdog.barked and report.safe:
        report.safe, report.reason = False, f"a step took longer than {config.timeout} s"
    report.latency_ms = _percentiles(latency)
    report.period_ms = _percentiles(np.diff(times).tolist())
    return report


def _wait_until(due: float, watchdog: _Watchdog) -> None:
    """Sleep in pieces shorter than the time-out, so that waiting is not taken for hanging."""
    while (left := due - time.monotonic()) > 0:
        time.sleep(min(left, 0.1 * watchdog._timeout))
        watchdog.pet()


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = np.asarray(seconds) * 1e3
    shares = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: round(float(np.percentile(values, q)), 3) for name, q in shares.items()}


class SimulatedRobot:
    """A Gymnasium simulator, such as `PlayTable` or `CalvinEnv`, as a robot.

    Args:
        env: the simulator; its observations hold `robot_obs` and `scene_obs`.
        seed, options: of the reset.
    """

    def __init__(self, env: Any, seed: int | None = None, options: Any = None) -> None:
        self.env, self.stopped, self.success = env, False, False
        self.observation, _ = env.reset(seed=seed, options=options)

    def observe(self) -> Mapping[str, NDArray]:
        """What the last action led to."""
        return self.observation

    def act(self, action: NDArray[np.float32]) -> None:
        """One control step of the simulator, 1/30 s of its time."""
        if not self.stopped:
            self.observation, reward, *_ = self.env.step(action)
            self.success = self.success or reward > 0

    def stop(self) -> None:
        """Stand still from now on."""
        self.stopped = True

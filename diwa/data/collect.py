"""Recording in a simulator: play for the world model, demonstrations for the policy.

Play must contain failures. A policy that is fine-tuned inside the world model finds every place
where the model has only ever seen success, so about half of the attempts here miss, slip, stop half
way or come from the wrong side, and much of the time is spent touching the handles.

Every episode draws from its own seed, so what is recorded does not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diwa.data.store import Episode
from diwa.envs import SimulatorSpec
from diwa.envs.tasks import BULB, DRAWER, LED, SLIDER, TASKS, check_task, task_success
from diwa.errors import SimulatorError

if TYPE_CHECKING:
    from diwa.envs.simulator import Simulator

ProgressFn = Callable[[int, int], None]
"""Called with (done, total): transitions for play, episodes for demonstrations."""

PLAY_LENGTHS = (300, 600)
NOISE_LEVELS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
GOOD_SHARE = 0.40  # of the attempts: small aim error, whole stroke
FREE_LOW, FREE_HIGH = (-0.18, -0.34, 0.50), (0.28, -0.08, 0.68)

_envs: dict[SimulatorSpec, Simulator] = {}  # of this process


class _Recorder:
    """Steps an environment and keeps what it saw; `full` once `limit` actions were taken."""

    def __init__(self, env: Simulator, start: dict[str, NDArray], limit: int) -> None:
        self.env, self.limit = env, limit
        observation, _ = env.reset(options=start)
        self.seen = [observation]
        self.actions: list[NDArray[np.float32]] = []

    @property
    def full(self) -> bool:
        return len(self.actions) >= self.limit

    def step(self, action: NDArray) -> None:
        action = np.asarray(action, np.float32)
        observation = self.env.step(action)[0]
        self.actions.append(action)
        self.seen.append(observation)

    @property
    def scene(self) -> NDArray[np.float32]:
        return self.seen[-1]["scene_obs"]

    def solved(self, task: str) -> bool:
        return bool(task_success(task, self.seen[0]["scene_obs"], self.scene))

    def episode(self, task: str = "") -> Episode:
        columns = {name: np.stack([seen[name] for seen in self.seen]) for name in self.seen[0]}
        robot, scene = columns.pop("robot_obs"), columns.pop("scene_obs")
        success = task_success(task, scene[0], scene) if task else None
        return Episode(robot, scene, np.stack(self.actions), success, task, frames=columns)


def _feasible(scene: NDArray, rng: np.random.Generator) -> list[str]:
    """Skills that can still be done in `scene`, one for each fixture."""

    def either(value: float, low: float, high: float, up: str, down: str) -> str:
        if low < value < high:
            return str(rng.choice([up, down]))
        return up if value <= low else down

    return [
        either(scene[DRAWER], 0.08, 0.14, "open_drawer", "close_drawer"),
        either(scene[SLIDER], 0.12, 0.16, "move_slider_left", "move_slider_right"),
        "turn_off_lightbulb" if scene[BULB] > 0.5 else "turn_on_lightbulb",
        "turn_off_led" if scene[LED] > 0.5 else "turn_on_led",
    ]


def _attempt(recorder: _Recorder, rng: np.random.Generator, skills: Sequence[str]) -> None:
    """One try at one of some skills, well or badly done."""
    from diwa.envs.experts import Expert

    # Now and then a skill that is already done: pushing a closed drawer is play, too.
    done_too = rng.random() < 0.1
    possible = skills if done_too else _feasible(recorder.scene, rng)
    tasks = [task for task in possible if task in skills]
    noise = float(rng.choice(NOISE_LEVELS))
    style: dict[str, Any] = {"noise": noise, "speed": float(rng.uniform(0.6, 1.0))}
    stop = 200
    if rng.random() < GOOD_SHARE:
        style["aim_error"] = rng.uniform(-0.01, 0.01, 3)
    else:
        # Misses on every axis, or on some of them only, so that near misses are seen.
        axes = rng.random(3) < rng.choice([0.4, 1.0])
        style["aim_error"] = rng.uniform(-0.045, 0.045, 3) * axes
        style["travel"] = float(rng.choice([1.0, rng.uniform(0.2, 1.0), rng.uniform(1.0, 1.3)]))
        if rng.random() < 0.4:
            style["tilt"] = rng.normal(0.0, 0.15, 3)
        if rng.random() < 0.3:
            style["pause_prob"] = float(rng.uniform(0.02, 0.1))
        if rng.random() < 0.3:
            stop = int(rng.integers(10, 45))
        style["gripper"] = 1.0 if rng.random() < 0.15 else -1.0
    style["direct"] = bool(rng.random() < 0.4)
    for count, action in enumerate(Expert(recorder.env, str(rng.choice(tasks)), rng, **style)):
        if recorder.full or count >= stop:
            return
        recorder.step(action)


def _move_to(
    recorder: _Recorder, pos: NDArray, rng: np.random.Generator, steps: int, gripper: float
) -> None:
    from diwa.envs.experts import DOWN, Waypoint, follow

    noise = float(rng.choice(NOISE_LEVELS))
    goal = Waypoint(pos, DOWN + rng.normal(0.0, 0.08, 3))
    for _ in range(steps):
        if recorder.full:
            return
        if np.linalg.norm(goal.pos - recorder.env.robot.tcp()) < 0.015:
            return
        recorder.step(follow(recorder.env, goal, 1.0, noise, rng, gripper))


def _free_motion(recorder: _Recorder, rng: np.random.Generator) -> None:
    gripper = 1.0 if rng.random() < 0.3 else -1.0
    _move_to(recorder, rng.uniform(FREE_LOW, FREE_HIGH), rng, 25, gripper)


def _burst(recorder: _Recorder, rng: np.random.Generator, skills: Sequence[str]) -> None:
    """Random motions, each held for a few steps, beside the handle of one of some skills."""
    from diwa.envs.experts import plan

    contact = plan(recorder.env, str(rng.choice(skills)))[1]
    beside = contact[0][0] + rng.uniform(-0.04, 0.04, 3)
    gripper = 1.0 if rng.random() < 0.2 else -1.0
    _move_to(recorder, beside + [0.0, -0.03, 0.06], rng, 35, gripper)
    _move_to(recorder, beside, rng, 12, gripper)
    left = int(rng.integers(15, 45))
    while left > 0:
        hold = min(left, int(rng.integers(1, 9)))
        motion = np.clip(rng.normal(0.0, rng.choice([0.3, 0.7, 1.2]), 6), -1, 1)
        motion[3:] *= 0.4
        for _ in range(hold):
            if recorder.full:
                return
            jitter = np.clip(motion + rng.normal(0.0, 0.05, 6), -1, 1)
            recorder.step(np.append(jitter, gripper))
        left -= hold


def _worker_env(spec: SimulatorSpec) -> Simulator:
    if spec not in _envs:
        _envs[spec] = spec.make(max_episode_steps=10**9)
    return _envs[spec]


def _close_envs() -> None:
    while _envs:
        _envs.popitem()[1].close()


def _play_episode(job: tuple[int, int, int], skills: Sequence[str], spec: SimulatorSpec) -> Episode:
    """One play episode of some skills: (seed, episode number, length)."""
    from diwa.envs.starts import sample_start

    seed, number, length = job
    rng = np.random.default_rng((seed, number, 1))
    env = _worker_env(spec)
    recorder = _Recorder(env, sample_start(env, str(rng.choice(skills)), rng), length)
    while not recorder.full:
        kind = rng.random()
        if kind < 0.72:
            _attempt(recorder, rng, skills)
        elif kind < 0.86:
            _burst(recorder, rng, skills)
        else:
            _free_motion(recorder, rng)
    return recorder.episode()


def _demo(
    job: tuple[str, int, int],
    noise: float,
    jitter: float,
    after: int,
    max_steps: int,
    spec: SimulatorSpec,
) -> Episode:
    """One successful demonstration: (task, seed, episode number). Failed tries are thrown away."""
    from diwa.envs.experts import Expert
    from diwa.envs.starts import sample_start

    task, seed, number = job
    env = _worker_env(spec)
    for attempt in range(20):
        rng = np.random.default_rng((seed, TASKS.index(task), number, attempt))
        recorder = _Recorder(env, sample_start(env, task, rng), max_steps)
        aim = rng.uniform(-jitter, jitter, 3) * (1.0, 1.0, 0.5)
        expert = Expert(env, task, rng, noise=noise, aim_error=aim)
        left = after + 1
        still = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
        while not recorder.full and left > 0:
            solved = recorder.solved(task)
            action = expert.action()
            if action is None and not solved:
                break
            left -= int(solved)
            if left > 0:
                recorder.step(still if action is None else action)
        if recorder.solved(task):
            return recorder.episode(task)
    raise RuntimeError(
        f"no successful {task} demonstration in 20 tries (noise {noise}, jitter {jitter}, "
        f"{max_steps} steps): lower the noise or allow more steps"
    )


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool


def _run(function: Callable, jobs: list, workers: int) -> Iterator[Episode]:
    """Results in the order of `jobs`, from this process (workers <= 1) or a spawned pool."""
    if workers <= 1 or len(jobs) <= 1:
        try:
            yield from map(function, jobs)
        finally:
            _close_envs()  # CALVIN tolerates no second simulator in a process
        return
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _ignore_interrupt) as pool:
        try:
            yield from pool.map(function, jobs)
        except BrokenProcessPool as error:
            raise SimulatorError(
                "a simulator process ended unexpectedly. A script that records with several "
                'workers keeps its code under `if __name__ == "__main__":`; else look for a lack '
                "of memory, or record with one worker, which shows the error"
            ) from error
        except BaseException:  # also Ctrl-C, and a caller that wants no more episodes
            for child in set(multiprocessing.active_children()).difference(others):
                child.terminate()
            raise


def play_lengths(n_transitions: int, seed: int) -> list[int]:
    """Actions of each play episode: 300 to 600, the last one what is left.

    Raises:
        ValueError: `n_transitions` is not positive.
    """
    if n_transitions < 1:
        raise ValueError(f"n_transitions must be positive, got {n_transitions}")
    rng, lengths = np.random.default_rng((seed, 0)), []
    left = n_transitions
    while left > 0:
        lengths.append(min(left, int(rng.integers(*PLAY_LENGTHS, endpoint=True))))
        left -= lengths[-1]
    return lengths


def play_episodes(
    lengths: Sequence[int],
    seed: int,
    workers: int,
    skills: Sequence[str],
    spec: SimulatorSpec,
    first: int = 0,
) -> Iterator[Episode]:
    """Play episodes number `first` and later, one after another as they are recorded.

    Args:
        lengths: of all episodes, from `play_lengths`.
        seed, workers, skills: as in `collect_play`.
        spec: the simulator, and the size of the pictures that are recorded with it.
        first: number of the first episode to record.
    """
    jobs = [(seed, number, length) for number, length in enumerate(lengths)][first:]
    checked = [check_task(skill) for skill in skills]
    record = partial(_play_episode, skills=checked, spec=spec)
    yield from _run(record, jobs, workers)


def collect_play(
    n_transitions: int,
    seed: int,
    workers: int = 2,
    progress: ProgressFn | None = None,
    skills: Sequence[str] = TASKS,
    simulator: str = "playtable",
) -> list[Episode]:
    """Records play: chained attempts, misses, bursts and free motion without resets in between.

    Args:
        n_transitions: actions in total; episodes last 300 to 600, the last one what is left.
        seed: everything follows from it, whatever the number of workers.
        workers: processes (1: none is started).
        progress: called with (transitions done, `n_transitions`).
        skills: what is attempted; all by default. Fewer make a world model of one fixture cheaper.
        simulator: its name.

    Returns:
        Episodes without task and success flags.
    """
    episodes, done = [], 0
    lengths = play_lengths(n_transitions, seed)
    for episode in play_episodes(lengths, seed, workers, skills, SimulatorSpec(simulator)):
        episodes.append(episode)
        done += len(episode.action)
        if progress is not None:
            progress(done, n_transitions)
    return episodes


def collect_demos(
    task: str,
    n: int,
    seed: int,
    workers: int = 2,
    noise: float = 0.1,
    jitter: float = 0.01,
    steps_after: int = 4,
    max_steps: int = 72,
    progress: ProgressFn | None = None,
    simulator: str = "playtable",
    image_size: int = 0,
) -> list[Episode]:
    """Records `n` successful expert episodes from random starts, with success flags per frame.

    Args:
        task: one of `TASKS`.
        n: number of episodes.
        seed: everything follows from it, whatever the number of workers.
        workers: processes (1: none is started).
        noise: standard deviation on the six motion numbers (action units).
        jitter: aim error, uniform within +- this many metres (half of it in height).
        steps_after: actions kept after the first success.
        max_steps: longest episode.
        progress: called with (episodes done, `n`).
        simulator: its name.
        image_size: edge of the pictures of both cameras in pixels; 0 records none.

    Raises:
        RuntimeError: a start could not be solved in 20 tries.
    """
    jobs = [(check_task(task), seed, number) for number in range(n)]
    record = partial(
        _demo,
        noise=noise,
        jitter=jitter,
        after=steps_after,
        max_steps=max_steps,
        spec=SimulatorSpec(simulator, image_size),
    )
    episodes: list[Episode] = []
    for episode in _run(record, jobs, workers):
        episodes.append(episode)
        if progress is not None:
            progress(len(episodes), n)
    return episodes

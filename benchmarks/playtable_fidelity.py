"""How close the embedded play table is to CALVIN: replays actions recorded there, and times itself.

    python benchmarks/playtable_fidelity.py [--data FOLDER] [--out FILE]

Needs the recordings (`calvin_rollouts.npz`); without them it says so and ends. What is compared:
48 expert episodes (six for each skill) by success and by the moved joint, four free motions by the
tool's path. Speeds are given per wall second and per processor second, since machines are shared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from diwa.data.collect import collect_play
from diwa.envs import make_env
from diwa.envs.experts import Expert
from diwa.envs.playtable import PlayTable
from diwa.envs.starts import make_starts, sample_starts
from diwa.envs.tasks import BULB, BUTTON, LED, RULES, SWITCH, TASKS, task_success
from diwa.info import versions

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "playtable_fidelity.json"
MOVED = {BULB: SWITCH, LED: BUTTON}  # a lamp is judged by the joint that works it


def replay(env: PlayTable, rollouts: Any, episode: int) -> tuple[np.ndarray, np.ndarray, slice]:
    """robot_obs `[T, 15]`, scene_obs `[T, 24]` under recorded actions, and the rows of these."""
    begin = int(rollouts["start"][episode])
    rows = slice(begin, begin + int(rollouts["length"][episode]))
    start = {key: rollouts[f"reset_{key}"][episode] for key in ("robot_obs", "scene_obs")}
    env.reset(options=start)
    seen = [env.step(action)[0] for action in rollouts["actions"][rows]]
    return (
        np.stack([o["robot_obs"] for o in seen]),
        np.stack([o["scene_obs"] for o in seen]),
        rows,
    )


def replay_task(env: PlayTable, rollouts: Any, task: str) -> dict[str, Any]:
    """Success and errors over a skill's recorded episodes."""
    joint = MOVED.get(RULES[task].index, RULES[task].index)
    rows_of: dict[str, list[float]] = {"solved": [], "step": [], "joint": [], "tcp": []}
    for episode in np.flatnonzero(rollouts["task"] == task):
        robot, scene, rows = replay(env, rollouts, episode)
        solved = task_success(task, rollouts["first_scene_obs"][episode], scene)
        recorded = int(rollouts["success"][rows].argmax())
        rows_of["solved"].append(float(solved.any()))
        if solved.any():
            rows_of["step"].append(abs(int(solved.argmax()) - recorded))
        rows_of["joint"].extend(np.abs(scene[:, joint] - rollouts["scene_obs"][rows, joint]))
        gap = robot[:, :3] - rollouts["robot_obs"][rows, :3]
        rows_of["tcp"].extend(np.linalg.norm(gap, axis=1))
    return {
        "share_solved": float(np.mean(rows_of["solved"])),
        "n": len(rows_of["solved"]),
        "success_step_error_mean": float(np.mean(rows_of["step"])) if rows_of["step"] else None,
        "joint_error_mean": float(np.mean(rows_of["joint"])),
        "joint_error_max": float(np.max(rows_of["joint"])),
        "tcp_error_mean": float(np.mean(rows_of["tcp"])),
        "tcp_error_max": float(np.max(rows_of["tcp"])),
    }


def free_motion(env: PlayTable, rollouts: Any) -> dict[str, float]:
    """Tool error (m) over the recorded motions that touch nothing."""
    gaps = []
    for episode in np.flatnonzero(rollouts["task"] == "free_motion"):
        robot, _, rows = replay(env, rollouts, episode)
        gaps.append(np.linalg.norm(robot[:, :3] - rollouts["robot_obs"][rows, :3], axis=1))
    errors = np.concatenate(gaps)
    return {"tcp_error_mean": float(errors.mean()), "tcp_error_max": float(errors.max())}


def experts(n: int, simulator: str = "playtable") -> dict[str, Any]:
    """Share and length of the skills solved by the scripted experts from `n` random starts."""
    env, found = make_env(simulator), {}
    for task in TASKS:
        starts, lengths = sample_starts(env, task, n, seed=0), []
        for k in range(n):
            rng = np.random.default_rng(k)
            env.reset(options={"task": task, **{key: value[k] for key, value in starts.items()}})
            aim = rng.uniform(-0.01, 0.01, 3) * (1.0, 1.0, 0.5)
            for count, action in enumerate(Expert(env, task, rng, noise=0.1, aim_error=aim)):
                _, _, solved, late, _ = env.step(action)
                if solved:
                    lengths.append(count + 1)
                if solved or late:
                    break
        found[task] = {
            "share_solved": len(lengths) / n,
            "n": n,
            "steps_mean": float(np.mean(lengths)) if lengths else None,
        }
    env.close()
    return found


def speed(cameras: bool, steps: int) -> dict[str, float]:
    """Control steps per wall and processor second while experts work, one process."""
    env, rng = PlayTable(cameras=cameras, max_episode_steps=10**9), np.random.default_rng(0)
    starts = {task: make_starts(task, 1, seed=0) for task in TASKS}
    done, wall, cpu = 0, 0.0, 0.0
    while done < steps:
        task = str(rng.choice(TASKS))
        env.reset(options={key: value[0] for key, value in starts[task].items()})
        expert = Expert(env, task, rng)
        began, used = time.perf_counter(), time.process_time()
        for action in expert:
            env.step(action)
            done += 1
        wall += time.perf_counter() - began
        cpu += time.process_time() - used
    env.close()
    return {"steps_per_second": done / wall, "steps_per_cpu_second": done / cpu}


def collection(n: int, workers: int) -> dict[str, float]:
    """Play transitions per second, start of the processes included."""
    began = time.perf_counter()
    collect_play(n, seed=0, workers=workers)
    seconds = time.perf_counter() - began
    return {"transitions": n, "workers": workers, "transitions_per_second": n / seconds}


def main() -> None:
    """Runs everything and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = os.environ.get("DIWA_SHARED_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=Path(shared), help="folder of the recordings")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--starts", type=int, default=100, help="expert episodes for each skill")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the state-only timing")
    args = parser.parse_args()
    path = args.data / "calvin_rollouts.npz"
    if not path.exists():
        raise SystemExit(f"no recordings at {path}: name their folder with --data")
    rollouts = dict(np.load(path))
    env = PlayTable(max_episode_steps=10**9)
    result = {
        "meta": {
            "commit": versions()["commit"],
            "date": datetime.date.today().isoformat(),
            "device": versions()["device"],
            "load_average": round(os.getloadavg()[0], 2),
            "versions": versions(),
        },
        "tasks": {task: replay_task(env, rollouts, task) for task in TASKS},
        "free_motion": free_motion(env, rollouts),
        "experts": experts(args.starts),
        "speed": {
            "state": speed(False, args.steps),
            "cameras_64": speed(True, args.steps // 8),
            "play": collection(4 * args.steps, workers=2),
        },
    }
    part = args.out.with_suffix(".tmp")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, args.out)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

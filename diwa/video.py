"""Videos of a run as mp4 (needs imageio, imageio-ffmpeg and the simulator)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio_ffmpeg  # noqa: F401  (imageio names it only when a file is opened)
import numpy as np
import torch
from imageio import v2 as imageio
from numpy.typing import NDArray

from .agent import load_world_model, world_model_folder
from .checkpoint import TEMP_SUFFIX
from .envs import SimulatorSpec
from .envs.starts import BLOCK_SLOTS
from .nn.vision import CAMERAS
from .run import RunFolder

if TYPE_CHECKING:
    from .envs.simulator import Simulator

Frames = list[Any]  # of uint8 [h, w, 3]
Act = Callable[..., NDArray[np.float32]]
FPS, SIZE, BORDER, HOLD = 30, 256, 4, 20
GREY, GREEN = (200, 200, 200), (46, 160, 67)
DREAMS = 3
"""Dreams filmed beside reality."""


def film_all(run: RunFolder, folder: Path) -> None:
    """Film what the run has data for into `folder`."""
    limit = run.config.evaluate.max_episode_steps
    spec = SimulatorSpec(run.config.env, run.config.world_model.picture_size)
    env = spec.make(task=run.config.task, max_episode_steps=limit)
    try:
        if (run.dir("evaluate") / "result.json").exists() and run.config.evaluate.videos:
            write_video(folder / "before_after.mp4", _before_after(run, env))
        source = world_model_folder(run.config, run.path)
        if (source / "dream.npz").exists():
            frames = _dream(run, env)
            if frames:
                write_video(folder / "dream.mp4", frames)
        if (source / "dream_pictures.npz").exists():
            write_video(folder / "dream_pictures.mp4", _dreamed_pictures(source))
    finally:
        env.close()


def write_video(path: Path, frames: Frames) -> None:
    """Write uint8 `[h, w, 3]` frames (h and w even) as an H.264 mp4, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.stem}.{os.getpid()}{TEMP_SUFFIX}{path.suffix}")
    try:
        imageio.mimwrite(temp, frames, fps=FPS, macro_block_size=2)
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def side_by_side(left: Frames, right: Frames) -> Frames:
    """Two films beside each other; the shorter one waits on its last frame."""
    length = max(len(left), len(right))
    both = [frames + [frames[-1]] * (length - len(frames) + HOLD) for frames in (left, right)]
    return [np.concatenate(pair, axis=1) for pair in zip(*both, strict=True)]


def _framed(picture: NDArray[np.uint8], color: tuple[int, int, int]) -> NDArray[np.uint8]:
    out = picture.copy()
    for edge in (np.s_[:BORDER], np.s_[-BORDER:], np.s_[:, :BORDER], np.s_[:, -BORDER:]):
        out[edge] = color
    return out


def film_episode(env: Simulator, act: Act, robot_obs: Any, scene_obs: Any) -> Frames:
    """Film one episode of the simulator.

    Args:
        env: with its task set.
        act: called with tensors `robot_obs [1, 15]`, `scene_obs [1, 24]` and, by name, the pictures
            that `env` observes; returns actions `[1, 7]`.
        robot_obs, scene_obs: start `[15]`, `[24]`.
    """
    obs, _ = env.reset(options={"robot_obs": robot_obs, "scene_obs": scene_obs})
    frames, over, solved = [_framed(env.render(SIZE), GREY)], False, False
    while not over:
        seen = {key: torch.from_numpy(value)[None] for key, value in obs.items()}
        action = act(seen.pop("robot_obs"), seen.pop("scene_obs"), **seen)[0]
        obs, _, solved, truncated, _ = env.step(action)
        over = solved or truncated
        frames.append(_framed(env.render(SIZE), GREEN if solved else GREY))
    return frames


def film_states(env: Simulator, robot_obs: Any, scene_obs: Any) -> Frames:
    """Pictures of the states `robot_obs [T, 15]`, `scene_obs [T, 24]`, as they are."""
    frames = []
    for robot, scene in zip(robot_obs, scene_obs, strict=True):
        env.set_state(robot, scene)
        frames.append(_framed(env.render(SIZE), GREY))
    return frames


def choose_starts(base: Sequence[bool], finetuned: Sequence[bool], n: int) -> list[int]:
    """Numbers of n starts: those where only the fine-tuned policy succeeds, then the first ones."""
    changed = [i for i, (a, b) in enumerate(zip(base, finetuned, strict=True)) if b and not a]
    others = [i for i in range(len(base)) if i not in changed]
    return (changed + others)[:n]


def _before_after(run: RunFolder, env: Simulator) -> Frames:
    from .envs.starts import sample_starts
    from .phases.collect import TEST_STARTS
    from .phases.evaluate import Slots, load_agents

    config, result = run.config, run.result("evaluate")
    starts = sample_starts(env, config.task, config.evaluate.episodes, TEST_STARTS)
    agents = load_agents(config, run)
    outcomes = [result[name]["episodes"] for name in agents]
    frames: Frames = []
    for i in choose_starts(outcomes[0], outcomes[-1], config.evaluate.videos):
        films = []
        for agent in agents.values():
            slots = Slots(agent, 1, config.evaluate.max_episode_steps, config.seed)
            slots.begin(0, i)
            start = (starts["robot_obs"][i], starts["scene_obs"][i])
            films.append(film_episode(env, slots.act, *start))
        frames += side_by_side(films[0], films[-1])
    return frames


def _dreamed_pictures(folder: Path) -> Frames:
    """Open-loop dreams of the cameras: real left, dreamed right; the wrist below the table."""
    with np.load(folder / "dream_pictures.npz", allow_pickle=False) as file:
        columns = [
            np.concatenate([file[f"{kind}_{camera}"] for camera in CAMERAS], axis=2)
            for kind in ("real", "dream")
        ]
    frames: Frames = []
    scale = max(1, SIZE // columns[0].shape[3])
    for window in range(len(columns[0])):
        films = [
            [_framed(f.repeat(scale, 0).repeat(scale, 1), GREY) for f in column[window]]
            for column in columns
        ]
        frames += side_by_side(*films)
    return frames


def _dream(run: RunFolder, env: Simulator) -> Frames:
    from .envs.tasks import RULES
    from .nn.encoders import FIXTURES
    from .plots import most_moving

    folder = world_model_folder(run.config, run.path)
    codec = load_world_model(folder).codec
    with np.load(folder / "dream.npz", allow_pickle=False) as file:
        real, dream, names = file["real"], file["dream"], file["names"].tolist()
    if not len(real):
        return []
    column = names.index(FIXTURES[RULES[run.config.task].index])
    frames: Frames = []
    for window in most_moving(real[..., column], DREAMS):
        films = []
        for values in (real[window], dream[window]):
            state = torch.from_numpy(values).float()
            robot, scene = (t.numpy() for t in codec.decode((state - codec.mean) / codec.std))
            if not codec.observe_blocks:
                for k, slot in enumerate(BLOCK_SLOTS):
                    scene[:, 6 + 6 * k : 9 + 6 * k] = slot
            films.append(film_states(env, robot, scene))
        frames += side_by_side(*films)
    return frames

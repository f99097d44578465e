"""Recording play with pictures straight into a store, which may be larger than memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from diwa.data.collect import ProgressFn, play_episodes, play_lengths
from diwa.data.store import NEUTRAL_ACTION, EpisodeStore
from diwa.data.writer import Layout, StoreWriter
from diwa.envs import SimulatorSpec
from diwa.envs.tasks import TASKS

CAMERAS = ("rgb_static", "rgb_gripper")


def record_play(
    path: Path,
    n_transitions: int,
    seed: int,
    workers: int = 2,
    skills: Sequence[str] = TASKS,
    image_size: int = 64,
    progress: ProgressFn | None = None,
    simulator: str = "playtable",
) -> EpisodeStore:
    """Record play with the pictures of both cameras; goes on where a killed recording was.

    Args:
        path: store to make.
        n_transitions: actions in total.
        seed: everything follows from it, whatever the number of workers and however often the
            recording was interrupted.
        workers: processes (1: none is started).
        skills: what is attempted.
        image_size: edge of the pictures in pixels.
        progress: called with (transitions done, `n_transitions`).
        simulator: its name.

    Raises:
        StoreError: `path` exists, or another process is recording it.
    """
    lengths = play_lengths(n_transitions, seed)
    picture = ("uint8", (image_size, image_size, 3))
    source = {"seed": seed, "skills": list(skills), "simulator": simulator}
    layout = Layout(lengths, [""] * len(lengths), dict.fromkeys(CAMERAS, picture), source)
    with closing(StoreWriter(path, layout)) as writer:
        done, first = 0, 0
        while first < len(lengths) and done < writer.done:
            done, first = done + lengths[first] + 1, first + 1
        spec = SimulatorSpec(simulator, image_size)
        episodes = play_episodes(lengths, seed, workers, skills, spec, first)
        for number, episode in enumerate(episodes, first):
            episode.validate(f"episode {number} for {path}")
            columns = {"robot_obs": episode.robot_obs, "scene_obs": episode.scene_obs}
            action = np.concatenate([episode.action, NEUTRAL_ACTION[None]])
            writer.write(done, {**columns, "action": action, **episode.frames})
            done += len(episode) + 1
            writer.commit(done)
            if progress is not None:
                progress(done - number - 1, n_transitions)
        return writer.finish()

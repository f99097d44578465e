"""Phase 0: play, demonstrations and start observations from a simulator."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from diwa.agent import check_source
from diwa.config import Config
from diwa.data.store import EpisodeStore, write_store
from diwa.envs.tasks import TASKS, fixture_tasks
from diwa.errors import StoreError
from diwa.run import RunFolder
from diwa.skills import SKILL_DEMOS

# Seeds of the three kinds of starts never meet; test starts are the same for every run.
TRAIN_STARTS, VALIDATION_STARTS, TEST_STARTS = 1_000_000, 2_000_000, 3_000_000


def save_starts(path: Path, starts: dict[str, np.ndarray]) -> None:
    """Write start observations `robot_obs [n, 15]`, `scene_obs [n, 24]`, pictures atomically."""
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez(partial, **starts)  # type: ignore[arg-type]
    partial.replace(path)


def load_starts(path: Path) -> dict[str, np.ndarray]:
    """Read start observations written by `save_starts`.

    Raises:
        StoreError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in {"robot_obs", "scene_obs", *file.files}}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise StoreError(f"{path} is missing or damaged ({error}); run `diwa collect`") from None


def collect(config: Config, run: RunFolder) -> dict:
    """Write `collect/play` (unless `from_run` has it), `collect/demos` and `collect/starts.npz`."""
    c = config.collect
    with run.phase("collect", c.play_transitions, "collect/transitions") as phase:
        if phase.result is not None:
            return phase.result
        check_source(config)
        from diwa.data.collect import collect_demos, collect_play
        from diwa.data.record import record_play
        from diwa.envs.starts import make_starts

        def progress(done: int, _total: int) -> None:
            phase.log(done, {"collect/transitions": done})

        seed, pictures = config.seed + c.seed_offset, config.world_model.picture_size
        skills = fixture_tasks(config.task) if c.focus else TASKS
        if config.from_run:
            play = EpisodeStore(Path(config.from_run) / "collect" / "play")
        elif (phase.dir / "play" / "index.json").exists():
            play = EpisodeStore(phase.dir / "play")
        elif pictures:
            play = record_play(
                phase.dir / "play",
                c.play_transitions,
                seed=seed,
                workers=c.workers,
                skills=skills,
                image_size=pictures,
                progress=progress,
                simulator=config.env,
            )
        else:
            episodes = collect_play(
                c.play_transitions,
                seed=seed,
                workers=c.workers,
                progress=progress,
                skills=skills,
                simulator=config.env,
            )
            play = write_store(phase.dir / "play", episodes)
        count = c.demos or SKILL_DEMOS[config.task]
        demos = collect_demos(
            config.task,
            count,
            seed=config.seed,
            workers=c.workers,
            simulator=config.env,
            image_size=pictures,
        )
        store = write_store(phase.dir / "demos", demos)
        starts = make_starts(
            config.task, c.train_starts, TRAIN_STARTS + config.seed, config.env, pictures
        )
        save_starts(phase.dir / "starts.npz", starts)
        return phase.finish(
            {
                "play_transitions": play.transitions,
                "play_episodes": len(play),
                "demos": len(store),
                "demo_transitions": store.transitions,
                "train_starts": c.train_starts,
            }
        )

"""Phase 1: train the world model on play and report its open-loop error."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diwa import parallel
from diwa.agent import (
    load_world_model,
    save_world_model,
    source_folder,
    world_model_folder,
)
from diwa.config import Config
from diwa.data.columns import Column
from diwa.data.sampler import split_episodes, store_rows
from diwa.data.store import Episode, EpisodeStore
from diwa.errors import RunError, StoreError
from diwa.info import device_name
from diwa.nn.rssm import RSSMState
from diwa.nn.vision import CAMERAS
from diwa.phases.open_loop import open_loop_report
from diwa.phases.open_loop_pictures import picture_report
from diwa.phases.world_model_trainer import Trainer
from diwa.run import Phase, RunFolder

LOG_EVERY, CHECKPOINT_EVERY = 25, 250


class Play(NamedTuple):
    """Recorded play, split; `streamed` and `rows` are the pictures as the sampler takes them."""

    train: list[Episode]
    held: list[Episode]
    transitions: int
    streamed: dict[str, Column]
    rows: np.ndarray


def _pictures(store: EpisodeStore, size: int) -> dict[str, Column]:
    """The pictures of a store that a model of this picture size is trained on.

    Raises:
        StoreError: they were not recorded, or in another size.
    """
    if not size:
        return {}
    for camera in CAMERAS:
        found = store.columns[camera].shape[1:] if camera in store.columns else None
        if found != (size, size, 3):
            raise StoreError(
                f"{store.path} holds {found or 'no pictures'} of {camera}, the world model sees "
                f"{(size, size, 3)}; collect play with the same --observation and image size"
            )
    return {camera: store.columns[camera] for camera in CAMERAS}


def _load_play(config: Config, run: RunFolder) -> Play:
    store = EpisodeStore(source_folder(config, run.path) / "collect" / "play")
    episodes = list(store)
    for i, episode in enumerate(episodes):
        episode.validate(f"{store.path}, episode {i}")
    train, held = split_episodes(episodes, config.world_model.holdout)
    if not train or sum(len(episodes[i]) for i in train) < config.world_model.seq_len:
        raise StoreError(f"{store.path} is too small to train a world model; collect more play")
    return Play(
        [episodes[i] for i in train],
        [episodes[i] for i in held],
        store.transitions,
        _pictures(store, config.world_model.picture_size),
        store_rows(store.starts, store.lengths, train),
    )


def _train(trainer: Trainer, phase: Phase) -> None:
    modules = {"model": trainer.model, "optimizer": trainer.optimizer}
    generators = {"uniforms": trainer.generator}
    extra = phase.restore(modules, generators)
    device = trainer.model.codec.mean.device
    if extra:
        h, z = (extra[k][trainer.streams].to(device) for k in ("h", "z"))
        trainer.carried = RSSMState(h, z)
        for group in trainer.optimizer.param_groups:  # loaded on the CPU, a graph would freeze it
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].to(device)
    parallel.broadcast_module(trainer.model)
    total = trainer.config.steps
    trainer.batches.wait_share()  # counts from here
    for step in range(phase.start, total):
        out = trainer.step(step)
        if step % LOG_EVERY == 0 or step == total - 1:
            metrics = trainer.metrics(out)
            phase.log(step, {f"world_model/{k}": v for k, v in metrics.items()})
        if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < total:
            phase.checkpoint(step + 1, modules, generators, trainer.all_streams())


def _conclude(
    phase: Phase, trainer: Trainer, held: list[Episode], seed: int, device: str
) -> dict[str, Any]:
    """Write weights, `dream.npz` and, of a model that sees pictures, `dream_pictures.npz`; returns
    the result of the phase."""
    model = trainer.model.requires_grad_(False).eval()
    report, dream = open_loop_report(model, held, trainer.config, seed)
    np.savez(phase.dir / "dream.npz", **dream)
    pictures, films = picture_report(model, held, trainer.config.open_loop_pictures, seed)
    if films:
        np.savez_compressed(phase.dir / "dream_pictures.npz", **films)
    save_world_model(phase.dir, model)
    return {
        "open_loop": report,
        **({"open_loop_pictures": pictures} if pictures else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": device_name(device),
    }


def train_world_model(config: Config, run: RunFolder) -> dict:
    """Train on the run's play; writes `world_model/` with weights, result and `dream.npz`.

    In the processes of `torchrun`, called by all of them inside `parallel.session`.

    Raises:
        StoreError: no play, or too little of it.
        RunError: the loss is not finite, or the processes cannot divide the batch equally.
    """
    with run.phase("world_model", config.world_model.steps, "world_model/loss") as phase:
        if phase.result is not None:
            return phase.result
        if config.from_run:
            folder = world_model_folder(config, run.path)
            if not (folder / "model.safetensors").exists():
                raise RunError(
                    f"--from-run {config.from_run} holds no world model of its own; name the run "
                    "that trained one"
                )
            model = load_world_model(folder)
            parameters = sum(p.numel() for p in model.parameters())
            return phase.finish({"from_run": config.from_run, "parameters": parameters})
        torch.set_num_threads(config.threads)
        play = _load_play(config, run)
        c, seed, device = config.world_model, config.seed, config.device
        trainer = Trainer(c, play.train, seed, device, play.streamed, play.rows)
        with trainer.batches:
            _train(trainer, phase)
        result: dict[str, Any] = {"play_transitions": play.transitions}
        parallel.on_main(lambda: result.update(_conclude(phase, trainer, play.held, seed, device)))
        return phase.finish(result)

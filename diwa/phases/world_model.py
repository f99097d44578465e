"""Phase 1: train the world model on play and report its open-loop error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
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
from diwa.config import Config, WorldModelConfig
from diwa.data.columns import Column
from diwa.data.prefetch import Prefetcher
from diwa.data.sampler import StreamSampler, split_episodes, store_rows
from diwa.data.store import Episode, EpisodeStore
from diwa.errors import RunError, StoreError
from diwa.graph import GraphedStep
from diwa.info import device_name
from diwa.nn.encoders import to_tensor
from diwa.nn.rssm import RSSMState
from diwa.nn.vision import CAMERAS
from diwa.nn.world_model import WorldModel
from diwa.phases.open_loop import open_loop_report
from diwa.phases.open_loop_pictures import picture_report
from diwa.run import Phase, RunFolder

LOG_EVERY, CHECKPOINT_EVERY = 25, 250


def learning_rate(step: int, config: WorldModelConfig) -> float:
    """Linear warm-up, then cosine decay to `lr_final_fraction` of the peak."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = min(1.0, step / max(1, config.steps))
    low = config.lr_final_fraction
    return config.lr * warm * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def _start_from(model: WorldModel, run_path: Path) -> None:
    """Weights and standardisation of another run's world model.

    Raises:
        RunError: it has another architecture.
        CheckpointError: there is none.
    """
    other = load_world_model(run_path / "world_model")
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    if {k: v.shape for k, v in other.state_dict().items()} != shapes:
        raise RunError(
            f"world_model.init_from {run_path}: its world model has another architecture; "
            "choose the sizes it was trained with (its world_model/config.json)"
        )
    model.load_state_dict(other.state_dict())


class Trainer:
    """World model, optimizer and data of one training; its steps are CUDA graphs where they can be.

    Of several processes each trains its share of the streams of the same batch, with the same
    uniforms, and the gradients are averaged: the step of one process, up to the order of sums. The
    average is taken between two graphs, which therefore hold no communication.

    Raises:
        RunError: the number of processes does not divide the batch size.
    """

    def __init__(
        self,
        config: WorldModelConfig,
        episodes: list[Episode],
        seed: int,
        device: str,
        streamed: Mapping[str, Column] | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.config = config
        self.streams = parallel.share(config.batch_size, "world_model.batch_size")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = WorldModel(config)
        robot = [to_tensor(e.robot_obs) for e in episodes]
        scene = [to_tensor(e.scene_obs) for e in episodes]
        if config.init_from:
            _start_from(self.model, Path(config.init_from))
        else:
            self.model.codec.fit(torch.cat(robot), torch.cat(scene))
        states = [self.model.codec(r, s) for r, s in zip(robot, scene, strict=True)]
        self.model.to(device)
        sampler = StreamSampler(
            {"state": states},
            [e.action for e in episodes],
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=seed,
            reset_prob=config.reset_prob,
            streamed=streamed,
            rows=rows,
            streams=self.streams,
        )
        cuda = torch.device(device).type == "cuda"
        ahead = cuda or bool(streamed)  # reading from disk is worth a thread also on a CPU
        self.batches = Prefetcher(sampler, device, stop=config.steps, threaded=ahead)
        torch.backends.cuda.matmul.allow_tf32 = True  # no effect on a CPU
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=torch.tensor(config.lr, device=device) if cuda else config.lr,
            eps=config.eps,
            weight_decay=config.weight_decay,
            capturable=cuda,
        )
        self.generator = torch.Generator(device).manual_seed(seed)
        self.carried = self.model.rssm.initial(self.streams.stop - self.streams.start)
        self._gradients = GraphedStep(self._backward, device)
        self._update = GraphedStep(self._descend, device)

    def _backward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = self.model.loss(
            {name: inputs[name] for name in ("state", *self.model.cameras)},
            inputs["action"],
            inputs["reset"],
            RSSMState(inputs["h"], inputs["z"]),
            inputs["uniform"],
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        return {
            "loss": loss.total.detach(),
            "reconstruction": loss.reconstruction,
            **({"pictures": loss.parts["pictures"]} if "pictures" in loss.parts else {}),
            "kl": loss.kl,
            "h": loss.state.h,
            "z": loss.state.z,
        }

    def _descend(self, _: dict[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        return {"grad_norm": norm}

    def step(self, step: int) -> dict[str, Tensor]:
        """Gradient step number `step`; returns its scalars, of this process's streams."""
        c = self.config
        rate = learning_rate(step, c)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        batch = self.batches.batch(step)
        uniform = self.model.uniform(c.seq_len, c.batch_size, generator=self.generator)
        state = {"h": self.carried.h, "z": self.carried.z}
        out = self._gradients({**batch, "uniform": uniform[:, self.streams].contiguous(), **state})
        self.carried = RSSMState(out.pop("h").clone(), out.pop("z").clone())
        parallel.all_reduce_gradients(self.model.parameters())
        return out | self._update({})

    def metrics(self, out: dict[str, Tensor]) -> dict[str, float]:
        """Means over the processes of what `step` returned, and of the share of the time since the
        last call that was spent waiting for data."""
        wait = torch.tensor([self.batches.wait_share()])
        values = torch.cat([torch.stack([v.float() for v in out.values()]).cpu(), wait])
        return dict(
            zip([*out, "data_wait"], parallel.all_reduce_mean(values).tolist(), strict=True)
        )

    def all_streams(self) -> dict[str, Tensor]:
        """The carried states of the streams of all processes, which checkpoints hold."""
        return {k: parallel.gather(getattr(self.carried, k)) for k in ("h", "z")}


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

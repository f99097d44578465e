"""The training of a world model, a step at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diwa import parallel
from diwa.agent import load_world_model
from diwa.config import WorldModelConfig
from diwa.data.columns import Column
from diwa.data.prefetch import Prefetcher
from diwa.data.sampler import StreamSampler
from diwa.data.store import Episode
from diwa.errors import RunError
from diwa.graph import GraphedStep
from diwa.nn.encoders import to_tensor
from diwa.nn.rssm import RSSMState
from diwa.nn.world_model import WorldModel

EMBED_FRAMES = 2048
"""Frames read at once where all of them are embedded."""


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

    In the last `frozen_encoder_steps` the CNN rests: every process embeds all frames once and keeps
    the embeddings in the CPU's memory, `E` floats a frame.

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
        self.sampler = StreamSampler(
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
        self.batches = Prefetcher(self.sampler, device, stop=config.steps, threaded=ahead)
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
        self._capture_anew()

    def _capture_anew(self) -> None:
        """Forget captured steps; those of before hold memory, and gradients of the encoder."""
        device = self.model.codec.mean.device
        self._gradients = GraphedStep(self._backward, device)
        self._update = GraphedStep(self._descend, device)

    @torch.no_grad()
    def _freeze_encoder(self) -> None:
        """Embed all frames; from now on batches bring the embeddings and the encoder rests."""
        self.batches.close()  # what it has made ahead holds no embeddings
        self.model.encoder.requires_grad_(False)
        device, rows = self.model.codec.mean.device, self.sampler.rows
        pieces = []
        for i in range(0, len(rows), EMBED_FRAMES):
            obs = {"state": self.sampler.columns["state"][i : i + EMBED_FRAMES].to(device)}
            for camera, column in self.sampler.streamed.items():
                obs[camera] = torch.from_numpy(column.read(rows[i : i + EMBED_FRAMES]))
            pieces.append(self.model.encoder(obs).cpu())
        self.sampler.columns["embed"] = torch.cat(pieces)
        self._capture_anew()

    def _backward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = self.model.loss(
            {n: inputs[n] for n in ("state", *self.model.cameras, "embed") if n in inputs},
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
        rests = bool(self.model.cameras) and step >= c.steps - c.frozen_encoder_steps
        if rests and "embed" not in self.sampler.columns:
            self._freeze_encoder()
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

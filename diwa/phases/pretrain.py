"""Phase 2: pre-train the policy on demonstrations in latent space (method section 3.4)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from diwa.agent import load_world_model, make_policy, save_policy, world_model_folder
from diwa.config import Config, PretrainConfig
from diwa.data.sampler import previous_actions
from diwa.data.store import Episode, EpisodeStore
from diwa.errors import StoreError
from diwa.nn.encoders import observed, to_tensor
from diwa.nn.world_model import WorldModel
from diwa.run import RunFolder

LOG_EVERY, CHECKPOINT_EVERY = 50, 1000


def episode_features(
    model: WorldModel, episode: Episode, samples: int, generator: torch.Generator
) -> Tensor:
    """Posterior features `[T + 1, samples, F]` of an episode, from zero state as at test time."""
    device = model.codec.mean.device
    seen = {"robot_obs": episode.robot_obs, "scene_obs": episode.scene_obs, **episode.frames}
    obs = model.observation(**observed(seen, model.inputs, device))
    frames = len(episode) + 1
    obs = {k: v[:, None].expand(-1, samples, *v.shape[1:]) for k, v in obs.items()}
    action = to_tensor(previous_actions(episode.action), device)[:, None].expand(-1, samples, -1)
    reset = torch.zeros(frames, samples, device=device)
    reset[0] = 1.0
    uniform = model.uniform(frames, samples, generator=generator)
    return model.encode_episode(obs, action, reset, uniform)


def demo_dataset(
    model: WorldModel, demos: list[Episode], chunk: int, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features `[n, F]` and the chunks `[n, L, A]` that followed them, every full chunk once."""
    features, chunks = [], []
    for demo in demos:
        feature = episode_features(model, demo, samples, generator)
        action = to_tensor(demo.action, feature.device).clamp(-1, 1)
        windows = action.unfold(0, chunk, 1).transpose(1, 2)  # [T - L + 1, L, A]
        features.append(feature[: len(windows)].flatten(0, 1))
        chunks.append(windows.repeat_interleave(samples, dim=0))
    return torch.cat(features), torch.cat(chunks)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then cosine to `lr_min`."""
    if step < config.warmup_steps:
        return config.lr_min + (config.lr - config.lr_min) * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


class Pretrainer:
    """Policy, its moving average, optimizer and data."""

    def __init__(self, config: Config, model: WorldModel, demos: list[Episode]) -> None:
        self.config = config.pretrain
        device = model.codec.mean.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.policy = make_policy(model.feature_dim, config.policy).to(device)
        self.average = copy.deepcopy(self.policy).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.features, self.chunks = demo_dataset(
            model, demos, config.policy.chunk, self.config.feature_samples, self.generator
        )

    def step(self, step: int) -> Tensor:
        """One gradient step; returns the loss."""
        g, device = self.generator, self.features.device
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)
        index = torch.randint(
            len(self.features), (self.config.batch_size,), generator=g, device=device
        )
        chunk = self.chunks[index]
        steps = self.policy.config.denoising_steps
        t = torch.randint(steps, (len(index),), generator=g, device=device)
        noise = torch.randn(chunk.shape, generator=g, device=device)
        loss = self.policy.bc_loss(self.features[index], chunk, t, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        decay = min(self.config.ema_decay, step / (step + 10))
        averaged: list[Tensor] = list(self.average.parameters())
        current = [p.detach() for p in self.policy.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - decay)
        return loss.detach()


def pretrain(config: Config, run: RunFolder) -> dict:
    """Behaviour cloning of the task's demonstrations; writes `pretrain/` with the averaged weights.

    Raises:
        StoreError: no demonstrations, or demonstrations of another task or too short.
    """
    with run.phase("pretrain", config.pretrain.steps, "policy/bc_loss") as phase:
        if phase.result is not None:
            return phase.result
        torch.set_num_threads(config.threads)
        model = load_world_model(world_model_folder(config, run.path), config.device)
        store = EpisodeStore(run.dir("collect") / "demos")
        demos = list(store)
        wrong = {d.task for d in demos} - {config.task}
        if wrong or min(len(d) for d in demos) < config.policy.chunk:
            raise StoreError(
                f"{store.path} holds episodes of {sorted(wrong)} or shorter than a chunk; "
                f"collect demonstrations of {config.task}"
            )
        trainer = Pretrainer(config, model, demos)
        modules = {
            "policy": trainer.policy,
            "average": trainer.average,
            "optimizer": trainer.optimizer,
        }
        generators = {"batches": trainer.generator}
        phase.restore(modules, generators)
        total, loss = config.pretrain.steps, torch.zeros(())
        for step in range(phase.start, total):
            loss = trainer.step(step)
            if step % LOG_EVERY == 0 or step == total - 1:
                phase.log(step, {"policy/bc_loss": loss.item()})
            if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < total:
                phase.checkpoint(step + 1, modules, generators)
        save_policy(phase.dir, trainer.average)
        return phase.finish({"samples": len(trainer.features), "bc_loss": loss.item()})

"""Diffusion-policy fine-tuning on Pendulum-v1: cloned from poor demonstrations, improved by PPO
over the denoising steps (DPPO, arXiv 2409.00588), in the environment itself.

From diwa it takes `diwa.nn.DiffusionPolicy` and the functions of `diwa.rl`; nothing of the phases,
world model or command line.

    python examples/diffusion_policy_finetune.py
"""

import argparse
import copy
import time

import gymnasium
import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from diwa.config import PolicyConfig
from diwa.nn import DiffusionPolicy
from diwa.rl.gae import gae
from diwa.rl.ppo import chunk_log_prob, clip_schedule, denoising_discount, ppo_loss

ENVS, CHUNKS, CHUNK = 32, 50, 4  # an episode has 200 steps
FT_STEPS = 5
CONFIG = PolicyConfig(chunk=CHUNK, denoising_steps=10, width=128)


class Pendulums:
    """ENVS pendulums side by side; actions in [-1, 1], observations scaled to about 1."""

    def __init__(self, seed: int) -> None:
        self.env = gymnasium.make_vec("Pendulum-v1", ENVS, vectorization_mode="sync")
        self.seed = seed

    def reset(self) -> Tensor:
        """Observations `[ENVS, 3]` of new episodes."""
        self.seed += ENVS
        return self._scaled(self.env.reset(seed=self.seed)[0])

    def step(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Next observation and summed reward of chunks `[ENVS, CHUNK, 1]`."""
        total = torch.zeros(ENVS)
        for action in chunk.clamp(-1, 1).unbind(1):
            obs, reward, *_ = self.env.step(2 * action.numpy())
            total += torch.as_tensor(reward, dtype=torch.float32)
        return self._scaled(obs), total

    @staticmethod
    def _scaled(obs: np.ndarray) -> Tensor:
        return torch.as_tensor(obs) * torch.tensor([1.0, 1.0, 1 / 8])


def poor_expert(obs: Tensor) -> Tensor:
    """Swings up by energy and forgets to be careful at the top; `[N, 3]` -> actions `[N, 1]`."""
    cos, sin, speed = obs[:, 0], obs[:, 1], 8 * obs[:, 2]
    energy = speed**2 / 6 + 5 * (cos - 1)
    pump = -0.5 * energy * speed.sign()
    hold = -4 * sin - 0.4 * speed
    return torch.where(cos > 0.9, hold, pump).clamp(-1, 1)[:, None]


def demonstrate(envs: Pendulums) -> tuple[Tensor, Tensor]:
    """One noisy episode of every pendulum: observations `[M, 3]`, chunks `[M, CHUNK, 1]`."""
    obs, pairs = envs.reset(), []
    for _ in range(CHUNKS):
        chunk = poor_expert(obs)[:, None].expand(-1, CHUNK, 1)
        chunk = (chunk + 0.3 * torch.randn_like(chunk)).clamp(-1, 1)
        pairs.append((obs, chunk))
        obs, _ = envs.step(chunk)
    return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


def clone(policy: DiffusionPolicy, obs: Tensor, chunk: Tensor, steps: int) -> None:
    """Behaviour cloning."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(obs), (256,))
        step = torch.randint(CONFIG.denoising_steps, (256,))
        loss = policy.bc_loss(obs[rows], chunk[rows], step, torch.randn(256, CHUNK, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def episode(envs: Pendulums, actor: DiffusionPolicy, base: DiffusionPolicy, explore: bool):
    """Lists over CHUNKS of observation, next observation, chain, old log-prob, reward."""
    obs, rows, generator = envs.reset(), [], torch.Generator().manual_seed(envs.seed)
    for _ in range(CHUNKS):
        noise = actor.noise(ENVS, generator)
        out = actor.sample(obs, noise, base=base, ft_steps=FT_STEPS, explore=explore)
        after, reward = envs.step(out.chunk)
        rows.append((obs, after, out.chain, chunk_log_prob(out.log_prob), reward))
        obs = after
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def main(iterations: int = 25, clone_steps: int = 2500, seed: int = 0) -> dict:
    """Clone, fine-tune and report; returns the mean returns before and after."""
    torch.manual_seed(seed)
    envs, start = Pendulums(seed), time.perf_counter()
    base = DiffusionPolicy(cond_dim=3, config=CONFIG, action_dim=1)
    episodes = [demonstrate(envs) for _ in range(3)]
    clone(base, *(torch.cat(part) for part in zip(*episodes, strict=True)), clone_steps)
    base.requires_grad_(False)
    actor = copy.deepcopy(base).requires_grad_(True)
    critic = nn.Sequential(nn.Linear(3, 128), nn.Mish(), nn.Linear(128, 128), nn.Mish())
    critic.append(nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(
        [{"params": actor.parameters(), "lr": 1e-3}, {"params": critic.parameters(), "lr": 2e-3}]
    )
    discount = denoising_discount(FT_STEPS, 0.99)
    clip = clip_schedule(FT_STEPS, coef=0.2, base=0.02, rate=3.0)
    before = episode(envs, actor, base, explore=False)[-1].sum(0).mean().item()
    done = torch.zeros(CHUNKS, ENVS)
    done[-1] = 1.0  # cut by the time limit, not terminated: the value goes on
    for iteration in range(iterations):
        obs, after, chain, old, reward = episode(envs, actor, base, explore=True)
        with torch.no_grad():
            values = critic(obs)[..., 0], critic(after)[..., 0]
            terminated = torch.zeros_like(done)
            advantage, returns = gae(reward / 20, *values, terminated, done, 0.97, 0.95)
        data = [x.flatten(0, 1) for x in (obs, chain, old, advantage, returns)]
        for _ in range(5):
            for rows in torch.randperm(CHUNKS * ENVS).chunk(4):
                o, c, old_, a, r = (x[rows] for x in data)
                new = chunk_log_prob(actor.chain_log_prob(o, c))
                loss = ppo_loss(new, old_, a, discount, clip).policy_loss * (iteration >= 3)
                loss = loss + 0.5 * (critic(o)[:, 0] - r).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        if (iteration + 1) % 5 == 0:
            mean = reward.sum(0).mean().item()
            print(f"iteration {iteration + 1:3}  return while exploring {mean:8.1f}")
    after = episode(envs, actor, base, explore=False)[-1].sum(0).mean().item()
    seconds = time.perf_counter() - start
    print(f"mean return {before:.0f} cloned, {after:.0f} fine-tuned; {seconds:.0f} s")
    return {"before": before, "after": after}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune a diffusion policy on Pendulum-v1.")
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small layers: more threads only wait for each other
    main(arguments.iterations, seed=arguments.seed)

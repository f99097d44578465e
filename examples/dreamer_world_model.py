"""A Dreamer-style world model of Pendulum-v1, learned from random play.

From diwa it takes `diwa.nn.RSSM` and three operators; everything else is plain torch. The model
sees a few frames, then dreams on under the recorded actions; the error of its dream is compared
with that of staying where the last frame was.

    python examples/dreamer_world_model.py
"""

import argparse
import time

import gymnasium
import torch
import torch.nn as nn
from torch import Tensor

import diwa.nn
import diwa.ops

CONTEXT = 5
"""Frames that are seen before a dream."""


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder; observations `[T, B, 3]`, actions `[T, B, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU())
        self.rssm = diwa.nn.RSSM(
            action_dim=1, embed_dim=64, deter_dim=96, stoch_groups=8, stoch_classes=8, hidden_dim=64
        )
        features = self.rssm.feature_dim
        self.decoder = nn.Sequential(nn.Linear(features, 64), nn.ELU(), nn.Linear(64, 3))

    def observe(self, obs: Tensor, action: Tensor):
        """Posterior of every frame; `action[t]` led to `obs[t]`."""
        frames, batch = obs.shape[:2]
        reset = torch.zeros(frames, batch)
        reset[0] = 1
        uniform = torch.rand(frames, batch, self.rssm.stoch_groups)
        embed, start = self.encoder(obs), self.rssm.initial(batch)
        return self.rssm.observe(embed, action, reset, start, uniform)

    def loss(self, obs: Tensor, action: Tensor) -> Tensor:
        """Reconstruction and balanced KL."""
        post = self.observe(obs, action)
        error = (self.decoder(torch.cat([post.h, post.z], -1)) - obs).square().sum(-1)
        kl, _ = diwa.ops.balanced_kl(post.logits, self.rssm.prior_logits(post.h), 0.8)
        return error.mean() + 0.01 * kl.mean()

    @torch.no_grad()
    def dream(self, obs: Tensor, action: Tensor) -> Tensor:
        """Predicted observations after CONTEXT frames, without seeing them."""
        post = self.observe(obs[:CONTEXT], action[:CONTEXT])
        state, out = diwa.nn.RSSMState(post.h[-1], post.z[-1]), []
        for a in action[CONTEXT:]:
            state = self.rssm.imagine(state, a, torch.rand(len(a), self.rssm.stoch_groups))
            out.append(self.decoder(state.feature))
        return torch.stack(out)


def play(episodes: int, frames: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random play: observations `[T, B, 3]` scaled to about 1, actions `[T, B, 1]` in [-1, 1]."""
    env = gymnasium.make("Pendulum-v1")
    env.action_space.seed(seed)
    scale = torch.tensor([1.0, 1.0, 1 / 8])
    observations, actions = [], []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        seen, done, force = [obs], [[0.0]], env.action_space.sample()
        for i in range(frames - 1):
            if i % 4 == 0:  # hold a force for a while, or the pendulum only trembles
                force = env.action_space.sample()
            obs, *_ = env.step(force)
            seen.append(obs)
            done.append(force / 2)
        observations.append(torch.stack([torch.as_tensor(o) for o in seen]) * scale)
        actions.append(torch.tensor([[float(a[0])] for a in done]))
    env.close()
    return torch.stack(observations, 1), torch.stack(actions, 1)


def dream_error(model: WorldModel, obs: Tensor, action: Tensor) -> float:
    """Mean squared error of the dream."""
    return (model.dream(obs, action) - obs[CONTEXT:]).square().mean().item()


def main(steps: int = 600, episodes: int = 200, frames: int = 25, seed: int = 0) -> dict:
    """Learn and report; returns the errors of dream and standstill on unseen play."""
    torch.manual_seed(seed)
    obs, action = play(episodes, frames, seed)
    test_obs, test_action = play(40, frames, seed + 10_000)
    still = (test_obs[CONTEXT - 1] - test_obs[CONTEXT:]).square().mean().item()
    model = WorldModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before, start = dream_error(model, test_obs, test_action), time.perf_counter()
    for step in range(steps):
        rows = torch.randint(obs.shape[1], (16,))
        loss = model.loss(obs[:, rows], action[:, rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        if (step + 1) % max(steps // 5, 1) == 0:
            error = dream_error(model, test_obs, test_action)
            print(f"step {step + 1:5}  loss {loss.item():.4f}  dream error {error:.4f}")
    after = dream_error(model, test_obs, test_action)
    print(f"{frames - CONTEXT} frames ahead, unseen play: dream {before:.4f} before,")
    print(f"{after:.4f} after learning; standstill {still:.4f}", end="; ")
    print(f"{time.perf_counter() - start:.0f} s")
    return {"before": before, "after": after, "still": still}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn a world model of Pendulum-v1.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small layers: more threads only wait for each other
    main(arguments.steps, seed=arguments.seed)

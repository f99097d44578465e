"""Case of one fine-tuning iteration at paper size: 50 dreams x 36 chunks x 4 actions, 10 epochs.

The original form would take minutes, so its two parts are timed, interleaved with diwa's, and
summed: 36 chunk rollouts (chain, world model, reward, and the pass for old log-probabilities) and
10 epochs (grouped log-probabilities, critic, clipped loss, backward, AdamW) over 1800 states. What
the published loop does besides, decoding images and resetting simulators, is not counted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diwa.agent import env_action
from diwa.config import Config
from diwa.envs.dream import ClassifierSuccess
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.heads import RewardClassifier
from diwa.nn.world_model import WorldModel
from diwa.ops import use_backend
from diwa.phases.finetune import Finetuner, Rollout, make_dream
from diwa.presets import PRESETS
from diwa.rl.gae import RewardScaler, gae
from diwa.rl.ppo import chunk_log_prob

from .chain import largest
from .harness import Skip, Sum
from .inputs import Size
from .peers.chain import Original
from .peers.rssm import Original as OriginalRSSM

STARTS = 16


class Iteration:
    """Both forms of an iteration, on the same models.

    Args:
        config: with `finetune.n_chunks` and `update_epochs` of a full iteration.
    """

    def __init__(self, config: Config) -> None:
        self.full = c = config.finetune
        small = dataclasses.replace(c, n_chunks=1, update_epochs=1, bc_coef=0.0, target_kl=1e9)
        self.config = dataclasses.replace(config, finetune=small)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.world_model = WorldModel(config.world_model).requires_grad_(False).eval()
            base = DiffusionPolicy(self.world_model.feature_dim, config.policy)
            head = RewardClassifier(self.world_model.feature_dim, config.reward.width)
        self.base, self.head = base.requires_grad_(False), head.requires_grad_(False)
        g = torch.Generator().manual_seed(1)
        starts = {
            "robot_obs": torch.randn(STARTS, 15, generator=g),
            "scene_obs": torch.randn(STARTS, 24, generator=g),
        }
        success = ClassifierSuccess(self.head, config.reward.threshold)
        dream = make_dream(self.config, self.world_model, success, starts)
        self.tuner = Finetuner(self.config, self.world_model, self.base, dream)
        if getattr(small, "frozen_dtype", "float32") == "bfloat16":
            self.tuner.dream.frozen = self.world_model.rssm.freeze(torch.bfloat16)
        self.published = Published(self)

    def parts(self) -> dict[str, tuple[int, Callable[[], Any], Callable[[], Any]]]:
        """Part -> repetitions in an iteration, diwa's call, the original's."""
        one = self.tuner.rollout()
        whole = Rollout(*(torch.cat([column] * self.full.n_chunks) for column in one))
        return {
            "chunk": (self.full.n_chunks, self.tuner.rollout, self.published.chunk),
            "epoch": (
                self.full.update_epochs,
                lambda: self.tuner.update(whole, train_actor=True),
                lambda: self.published.epoch(whole),
            ),
        }


class Published:
    """The loop in the form of published code, see `benchmarks.peers.chain`."""

    def __init__(self, it: Iteration) -> None:
        c, tuner = it.full, it.tuner
        self.c, self.it = c, it
        self.rssm = OriginalRSSM(it.world_model.rssm)
        self.policy = Original(it.base, copy.deepcopy(it.base), c.ft_denoising_steps)
        self.policy.tuned.requires_grad_(True)
        self.critic = copy.deepcopy(tuner.critic)
        self.actor_step = torch.optim.AdamW(self.policy.tuned.parameters(), lr=c.actor_lr)
        self.critic_step = torch.optim.AdamW(self.critic.parameters(), lr=c.critic_lr)
        self.scaler = RewardScaler(c.n_dreams, c.reward_gamma, c.reward_clip)

    @torch.no_grad()
    def chunk(self) -> tuple[Tensor, Tensor]:
        """One chunk of every dream and its old log-probabilities."""
        dream, length = self.it.tuner.dream, self.it.config.policy.chunk
        h, z = dream.state
        noise = torch.randn(self.it.config.policy.denoising_steps + 1, len(h), length * 7)
        chunk, chain, old = self.policy.rollout(dream.state.feature, noise)
        actions = env_action(chunk.unflatten(1, (length, 7))).transpose(0, 1)
        hs, zs = self.rssm(h, z, actions, None)
        reward = self.it.head(torch.cat([hs[-1], zs[-1]], -1)).argmax(-1)
        return reward, old.clamp(-5, 2).mean(-1)

    def epoch(self, r: Rollout) -> float:
        """One epoch over all states, as one batch."""
        c, kf = self.c, self.c.ft_denoising_steps
        feature, chain = r.feature.flatten(0, 1), r.chain.flatten(0, 1).flatten(2)
        with torch.no_grad():
            value, successor = self.critic(r.feature), self.critic(r.next_feature)
            reward = self.scaler(r.terminated, r.first)
            done = torch.maximum(r.terminated, r.truncated)
            advantage, returns = gae(
                reward, value, successor, r.terminated, done, c.gamma, c.gae_lambda
            )
        new = self.policy.log_prob(feature, chain).clamp(-5, 2).mean(-1)
        advantage = advantage.flatten()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        weight = torch.tensor([c.gamma_denoising ** (kf - i - 1) for i in range(kf)])
        advantage = (advantage[:, None] * weight).flatten()
        ratio = (new - r.log_prob.flatten()).exp()
        clip = self.it.tuner.ppo.clip.repeat(len(feature))
        clipped = torch.minimum(torch.maximum(ratio, 1 - clip), 1 + clip)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
        value_loss = 0.5 * (self.critic(feature) - returns.flatten()).square().mean()
        self.actor_step.zero_grad()
        self.critic_step.zero_grad()
        (loss + c.vf_coef * value_loss).backward()
        self.actor_step.step()
        self.critic_step.step()
        return loss.item()


def paper_config() -> Config:
    """The paper's sizes on this machine."""
    return dataclasses.replace(PRESETS["paper"], device="cpu")


def tiny_config() -> Config:
    """Of the tests: nothing to be timed."""
    c = dataclasses.replace(PRESETS["tiny"].finetune, n_chunks=2, minibatches=1)
    return dataclasses.replace(PRESETS["tiny"], finetune=c)


def case(config: Config) -> str:
    """Case name: dreams x chunks x actions, epochs."""
    c = config.finetune
    return f"{c.n_dreams}x{c.n_chunks}x{config.policy.chunk},epochs={c.update_epochs}"


def flops(size: Size, c: Any) -> float:
    """Of one iteration: chains, prior steps and updates; heads and critic are not counted."""
    states = c.n_dreams * c.n_chunks
    chain = size.policy_flops(size.steps) + 2 * size.cond_flops()
    hidden = 3 * size.policy_flops(1) - 2.0 * size.numbers * size.width
    update = size.ft_steps * hidden + 4.0 * size.feature * size.width
    return states * (chain + size.chunk * size.step_flops() + c.update_epochs * update)


def finetune_iteration(size: Size, config: Config, dtype: str, compile_peers: bool) -> Sum:
    """Both forms of an iteration.

    `mixed`: imagined steps and frozen denoising steps in bfloat16, the tuned ones in float32.

    Raises:
        Skip: this version of diwa fine-tunes in float32 only.

    Nothing is compiled: the loop is Python, and its parts have cases of their own.
    """
    c = config.finetune
    if dtype == "mixed":
        if not hasattr(c, "frozen_dtype"):
            raise Skip("diwa fine-tunes in float32 only")
        c = dataclasses.replace(c, frozen_dtype="bfloat16")
    it = Iteration(dataclasses.replace(config, finetune=c))

    def errors() -> tuple[float, float, float]:
        """Of the old log-probabilities of a rollout, before any update."""
        r = it.tuner.rollout()
        feature, chain = r.feature.flatten(0, 1), r.chain.flatten(0, 1)
        exact = copy.deepcopy(it.tuner.actor).double()
        with torch.no_grad():
            wanted = chunk_log_prob(exact.chain_log_prob(feature.double(), chain.double()))
            eager = it.published.policy.log_prob(feature, chain.flatten(2)).clamp(-5, 2).mean(-1)
        error = largest([r.log_prob.flatten(0, 1)], [wanted])
        eager = largest([eager.view_as(wanted)], [wanted])
        # A log-probability divides by deviations of 0.1, an error of 1e-5 in the chain by as much.
        return error, eager, max(2 * eager, 1e-3)

    parts = {
        part: (repetitions, {"diwa": ours, "original": original, "plain torch": _plain(ours)})
        for part, (repetitions, ours, original) in it.parts().items()
    }
    return Sum("finetune_iteration", size.case(case(config)), dtype, parts, errors, flops(size, c))


def _plain(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same loop and algebra on diwa's reference operators."""

    def run() -> Any:
        with use_backend("reference"):
            return call()

    return run

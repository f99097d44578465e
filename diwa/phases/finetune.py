"""Phase 4: fine-tune the policy by PPO inside the frozen world model (method section 5)."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diwa.agent import (
    Agent,
    env_action,
    load_policy,
    load_world_model,
    save_policy,
    world_model_folder,
)
from diwa.config import Config
from diwa.envs.dream import Dream, SuccessFunction
from diwa.errors import RunError
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.encoders import observed
from diwa.nn.heads import Critic
from diwa.nn.world_model import WorldModel
from diwa.phases.collect import VALIDATION_STARTS, load_starts
from diwa.phases.reward import success_function
from diwa.rl.gae import RewardScaler, gae
from diwa.rl.ppo import chunk_log_prob, clip_schedule, denoising_discount, ppo_loss
from diwa.run import RunFolder

if TYPE_CHECKING:
    from diwa.envs.online import OnlineEnv

CHECKPOINT_EVERY = 5


class Rollout(NamedTuple):
    """One iteration of imagined experience, T chunks of N dreams.

    Attributes:
        feature: `[T, N, F]` acted in; next_feature: successor before any reset.
        chain: `[T, N, Kf + 1, L, A]`.
        log_prob: `[T, N, Kf]` under the sampling policy, from its own noise.
        terminated, truncated, first: float `[T, N]` in {0, 1}.
    """

    feature: Tensor
    next_feature: Tensor
    chain: Tensor
    log_prob: Tensor
    terminated: Tensor
    truncated: Tensor
    first: Tensor


class Finetuner:
    """Actor, critic, reward scale and dreams of one fine-tuning.

    Args:
        config: of the run.
        world_model: frozen.
        base: frozen pre-trained policy.
        dream: the N parallel episodes it learns from.
    """

    def __init__(
        self,
        config: Config,
        world_model: WorldModel,
        base: DiffusionPolicy,
        dream: Dream | OnlineEnv,
    ) -> None:
        self.config = c = config.finetune
        self.device = torch.device(config.device)
        self.world_model, self.base = world_model, base
        self.actor = copy.deepcopy(base).requires_grad_(True)
        # packed again whenever an update has changed the actor
        self.sampler = self.actor.freeze(torch.float32)
        self.frozen_base = base.freeze(torch.float32, getattr(torch, c.frozen_dtype))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.critic = Critic(world_model.feature_dim).to(self.device)
        self.scaler = RewardScaler(c.n_dreams, c.reward_gamma, c.reward_clip).to(self.device)
        self.actor_optimizer = torch.optim.AdamW(
            self.actor.parameters(), lr=c.actor_lr, weight_decay=0.0
        )
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=c.critic_lr, weight_decay=0.0
        )
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.dream = dream
        kf = c.ft_denoising_steps
        self.discount = denoising_discount(kf, c.gamma_denoising, self.device)
        self.clip = clip_schedule(kf, c.clip_coef, c.clip_coef_base, c.clip_coef_rate, self.device)

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _reset(self, mask: Tensor) -> None:
        n, groups = self.config.n_dreams, self.world_model.rssm.stoch_groups
        self.dream.reset(mask, self._rand(n), self._rand(n, groups))

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Imagine `n_chunks` chunks of `n_dreams` episodes under the current actor."""
        c, groups = self.config, self.world_model.rssm.stoch_groups
        length = self.actor.config.chunk
        done = torch.ones(c.n_dreams, dtype=torch.bool, device=self.device)
        steps = []
        for _ in range(c.n_chunks):
            self._reset(done)
            first, feature = done.float(), self.dream.state.feature
            sampled = self.sampler.sample(
                feature,
                self.actor.noise(c.n_dreams, self.generator),
                base=self.frozen_base,
                ft_steps=c.ft_denoising_steps,
                explore=True,
            )
            following, terminated, truncated = self.dream.step(
                env_action(sampled.chunk), self._rand(length, c.n_dreams, groups)
            )
            done = terminated | truncated
            old = chunk_log_prob(sampled.log_prob)
            flags = (terminated.float(), truncated.float(), first)
            steps.append(Rollout(feature, following, sampled.chain, old, *flags))
        return Rollout(*(torch.stack(column) for column in zip(*steps, strict=True)))

    @torch.no_grad()
    def advantages(self, r: Rollout) -> tuple[Tensor, Tensor]:
        """Advantages and returns `[T, N]` with the running reward scale."""
        c = self.config
        reward = self.scaler(r.terminated, r.first)
        done = torch.maximum(r.terminated, r.truncated)
        value, successor = self.critic(r.feature), self.critic(r.next_feature)
        return gae(reward, value, successor, r.terminated, done, c.gamma, c.gae_lambda)

    def _bc_term(self, feature: Tensor) -> Tensor:
        """Negative log-likelihood of the frozen policy's own chains (section 5.7)."""
        feature = feature[: self.config.bc_states]
        noise = self.base.noise(len(feature), self.generator)
        kf = self.config.ft_denoising_steps
        chain = self.frozen_base.sample(feature, noise, ft_steps=kf, explore=True).chain
        return -chunk_log_prob(self.actor.chain_log_prob(feature, chain)).mean()

    def _minibatch(self, batch: tuple[Tensor, ...], train_actor: bool) -> dict[str, Tensor]:
        feature, chain, old, advantage, returns = batch
        c = self.config
        new = chunk_log_prob(self.actor.chain_log_prob(feature, chain))
        terms = ppo_loss(new, old, advantage, self.discount, self.clip)
        value = self.critic(feature)
        value_loss = 0.5 * (value - returns).square().mean()
        loss = terms.policy_loss + c.vf_coef * value_loss
        out = {
            "policy_loss": terms.policy_loss,
            "value_loss": value_loss,
            "approx_kl": terms.approx_kl,
            "clipfrac": terms.clip_fraction,
        }
        if c.bc_coef and train_actor:
            out["bc_loss"] = self._bc_term(feature)
            loss = loss + c.bc_coef * out["bc_loss"]
        self.actor_optimizer.zero_grad(set_to_none=True)
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if train_actor:
            self.actor_optimizer.step()
        self.critic_optimizer.step()
        return {k: v.detach() for k, v in out.items()}

    def update(self, r: Rollout, train_actor: bool) -> dict[str, float]:
        """PPO epochs over one rollout; they stop when an epoch's KL exceeds `target_kl`."""
        c = self.config
        advantage, returns = self.advantages(r)
        data = [r.feature, r.chain, r.log_prob, advantage, returns]
        data = [d.flatten(0, 1) for d in data]
        size, rows = len(data[0]), []
        for _ in range(c.update_epochs):
            order = torch.randperm(size, generator=self.generator, device=self.device)
            epoch = [
                self._minibatch(tuple(d[index] for d in data), train_actor)
                for index in order.chunk(c.minibatches)
            ]
            rows += epoch
            if torch.stack([m["approx_kl"] for m in epoch]).mean().item() > c.target_kl:
                break
        keys = rows[0]
        metrics = {k: torch.stack([row[k] for row in rows]).mean().item() for k in keys}
        residual = advantage.var() / returns.var().clamp(min=1e-8)
        metrics["explained_variance"] = 1 - residual.item()
        return metrics

    def iteration(self, number: int) -> dict[str, float]:
        """Rollout and update number `number` (from 0); returns the metrics to log."""
        r = self.rollout()
        metrics = self.update(r, train_actor=number >= self.config.critic_warmup)
        episodes = (r.terminated + r.truncated).sum().clamp(min=1)
        out = {f"ppo/{k}": v for k, v in metrics.items()}
        out["finetune/imagined_success"] = (r.terminated.sum() / episodes).item()
        return out

    def modules(self) -> dict:
        """Everything a checkpoint must hold."""
        return {
            "actor": self.actor,
            "critic": self.critic,
            "scaler": self.scaler,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
        }

    @torch.no_grad()
    def imagined_success(self, episodes: int) -> float:
        """Success in dreams of the policy as it is evaluated (without exploration noise)."""
        if not isinstance(self.dream, Dream):
            raise TypeError("imagined_success needs a Dream, not the simulator")
        agent = Agent(self.world_model, self.actor, self.base, self.config.ft_denoising_steps)
        return imagined_success(agent, self.dream, episodes, self.generator)


@torch.no_grad()
def imagined_success(
    agent: Agent, dream: Dream, episodes: int, generator: torch.Generator
) -> float:
    """Share of dreamed episodes, at least `episodes`, in which the evaluated policy succeeds."""
    n, device = dream.n, dream.scene_start.device
    length, groups = agent.policy.config.chunk, agent.world_model.rssm.stoch_groups

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    wins = total = 0
    while total < episodes:
        everyone = torch.ones(n, dtype=torch.bool, device=device)
        dream.reset(everyone, rand(n), rand(n, groups))
        solved = torch.zeros(n, dtype=torch.bool, device=device)
        for _ in range(dream.max_episode_steps // length):
            chunk = agent.act(dream.state, agent.policy.noise(n, generator))
            solved |= dream.step(chunk, rand(length, n, groups))[1]
        wins, total = wins + int(solved.sum()), total + n
    return wins / total


def _env_steps() -> int:
    """Simulator steps this process has taken; a simulator that is not imported has taken none."""
    simulator = sys.modules.get("diwa.envs.playtable")
    return simulator.env_steps_taken() if simulator else 0


def make_dream(
    config: Config, model: WorldModel, success: SuccessFunction, starts: dict[str, Tensor]
) -> Dream:
    """The dreams of a fine-tuning, from starts `robot_obs [P, 15]`, `scene_obs [P, 24]` and the
    pictures there if the world model sees them."""
    c = config.finetune
    return Dream(
        model,
        success,
        starts["robot_obs"],
        starts["scene_obs"],
        c.n_dreams,
        c.max_episode_steps,
        c.per_step_reward,
        frames={camera: starts[camera] for camera in model.cameras},
    )


def _build(config: Config, run: RunFolder) -> Finetuner:
    model = load_world_model(world_model_folder(config, run.path), config.device)
    base, _ = load_policy(run.dir("pretrain"), config.device)
    if base.cond_dim != model.feature_dim:
        raise RunError(
            f"{run.dir('pretrain')} holds a policy for features of {base.cond_dim}, "
            f"the world model makes {model.feature_dim}; pre-train again (--overwrite)"
        )
    arrays = load_starts(run.dir("collect") / "starts.npz")
    starts = observed(arrays, ("robot_obs", "scene_obs", *model.cameras), config.device)
    success = success_function(config, run, model)
    return Finetuner(config, model, base, make_dream(config, model, success, starts))


def finetune(config: Config, run: RunFolder) -> dict:
    """Fine-tune in imagination; writes `finetune/` with the actor's weights.

    The phase takes no environment step. With `eval_every` > 0 the policy is also tried in the
    simulator now and then, from validation starts, only to report it beside the dream; nothing is
    selected by it.

    Raises:
        RunError: a loss is not finite, or the training itself stepped a simulator.
    """
    c = config.finetune
    with run.phase("finetune", c.iterations, "finetune/imagined_success") as phase:
        if phase.result is not None:
            return phase.result
        torch.set_num_threads(config.threads)
        from diwa.phases.evaluate import evaluate_agent, task_starts

        before = _env_steps()
        tuner = _build(config, run)
        generators = {"dreams": tuner.generator}
        extra = phase.restore(tuner.modules(), generators)
        start_success = extra.get("imagined_start", None)
        if start_success is None:
            start_success = tuner.imagined_success(c.imagined_eval)
        for i in range(phase.start, c.iterations):
            metrics = tuner.iteration(i)
            if c.eval_every and (i + 1) % c.eval_every == 0 and i + 1 < c.iterations:
                agent = Agent(tuner.world_model, tuner.actor, tuner.base, c.ft_denoising_steps)
                starts = task_starts(config.task, c.eval_episodes, VALIDATION_STARTS)
                wins = evaluate_agent(agent, config, starts)
                metrics["finetune/real_success"] = float(wins.mean())
            phase.log(i, metrics)
            if (i + 1) % CHECKPOINT_EVERY == 0 and i + 1 < c.iterations:
                extra = {"imagined_start": start_success}
                phase.checkpoint(i + 1, tuner.modules(), generators, extra)
        final_success = tuner.imagined_success(c.imagined_eval)
        steps = _env_steps() - before
        if steps:
            raise RunError(f"fine-tuning took {steps} environment steps; it must take none")
        save_policy(phase.dir, tuner.actor.requires_grad_(False), c.ft_denoising_steps)
        return phase.finish(
            {
                "imagined_start": start_success,
                "imagined_final": final_success,
                "finetune_env_steps": steps,
                "imagined_steps": c.iterations * c.n_dreams * c.n_chunks * tuner.actor.config.chunk,
            }
        )

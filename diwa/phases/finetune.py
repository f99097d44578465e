"""Phase 4: fine-tune the policy by PPO inside the frozen world model (method section 5)."""

from __future__ import annotations

import copy
import dataclasses
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diwa import parallel
from diwa.agent import (
    Agent,
    Policy,
    env_action,
    load_policy,
    load_world_model,
    save_policy,
    world_model_folder,
)
from diwa.config import Config
from diwa.envs.dream import Dream, SuccessFunction
from diwa.errors import RunError
from diwa.graph import GraphedStep
from diwa.nn.encoders import observed
from diwa.nn.frozen import frozen_dtype
from diwa.nn.heads import Critic
from diwa.nn.world_model import WorldModel
from diwa.phases.collect import VALIDATION_STARTS, load_starts
from diwa.phases.reward import success_function
from diwa.rl.gae import RewardScaler, gae
from diwa.rl.memory import memory_advice
from diwa.rl.ppo import chunk_log_prob
from diwa.rl.update import PPOUpdate
from diwa.run import Phase, RunFolder

if TYPE_CHECKING:
    from diwa.envs.online import OnlineEnv

CHECKPOINT_EVERY = 5


class Rollout(NamedTuple):
    """One iteration of imagined experience, T chunks of N dreams (those of one process).

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

    On a GPU a rollout, its returns and a step of the update are one CUDA graph each, and an
    iteration reads the device once, for its metrics. Every random number of a rollout is drawn
    before it, in the order of the chunks. Several processes (`diwa.parallel`) draw the same numbers
    and dream their shares of the dreams; an iteration is then that of one process.

    Args:
        config: of the run; `finetune.n_dreams` counts the dreams of all processes.
        world_model: frozen.
        base: frozen pre-trained policy.
        dream: the parallel episodes that this process learns from, its share of `n_dreams`.

    Raises:
        RunError: the number of processes does not divide `n_dreams`.
    """

    def __init__(
        self,
        config: Config,
        world_model: WorldModel,
        base: Policy,
        dream: Dream | OnlineEnv,
    ) -> None:
        kf = min(config.finetune.ft_denoising_steps, base.steps)  # a Gaussian policy has one step
        self.config = c = dataclasses.replace(config.finetune, ft_denoising_steps=kf)
        self.device = torch.device(config.device)
        # World-model training turns it on. Its error is of the size of PPO's clip range.
        torch.backends.cuda.matmul.allow_tf32 = False
        self.world_model, self.base = world_model, base
        self.actor = copy.deepcopy(base).requires_grad_(True)
        self.sampler = self.actor.freeze(torch.float32)
        dtype = frozen_dtype(c.frozen_dtype, self.device)
        self.frozen_base: Any = base.freeze(torch.float32, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.critic = Critic(world_model.feature_dim).to(self.device)
        self.scaler = RewardScaler(c.n_dreams, c.reward_gamma, c.reward_clip).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.dream, self.share = dream, parallel.share(c.n_dreams, "finetune.n_dreams")
        self.ppo = PPOUpdate(c, self.actor, self.critic, self.frozen_base, self.generator)
        self._draws = self._buffers()
        on_host = "" if isinstance(dream, Dream) else "the simulator runs on the host"
        several = "its rewards travel between processes" if parallel.world_size() > 1 else ""
        self._rollout = GraphedStep(self._dream, self.device, name="rollout", refusal=on_host)
        self._returns = GraphedStep(
            self._estimate,
            self.device,
            writes=list(self.scaler.buffers()),
            name="returns",
            refusal=several,
        )

    def _buffers(self) -> dict[str, Tensor]:
        """For the random numbers of a rollout of all dreams, T chunks; see `Dream`."""
        c, policy = self.config, self.actor
        length, groups = policy.config.chunk, self.world_model.rssm.stoch_groups
        shapes = {
            "start": (c.n_dreams,),
            "posterior": (c.n_dreams, groups),
            "noise": (policy.steps + 1, c.n_dreams, length, policy.action_dim),
            "prior": (length, c.n_dreams, groups),
        }
        return {
            name: torch.empty(c.n_chunks, *shape, device=self.device)
            for name, shape in shapes.items()
        }

    def _draw(self) -> dict[str, Tensor]:
        """New random numbers, of them those of this process."""
        for t in range(self.config.n_chunks):
            for name, numbers in self._draws.items():
                if name == "noise":
                    numbers[t].normal_(generator=self.generator)
                else:
                    numbers[t].uniform_(generator=self.generator)
        return {
            name: numbers.narrow(
                2 if name in ("noise", "prior") else 1, self.share.start, self.dream.n
            ).contiguous()
            for name, numbers in self._draws.items()
        }

    def rollout(self) -> Rollout:
        """Imagine `n_chunks` chunks of the episodes of this process under the current actor."""
        return Rollout(**self._rollout(self._draw()))

    @torch.no_grad()
    def _dream(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """A rollout as a function of its random numbers and the weights."""
        self.sampler.refresh()  # a graph must pack the weights that it finds
        if isinstance(self.dream, Dream):
            self.dream.clear()
        done = torch.ones(self.dream.n, dtype=torch.bool, device=self.device)
        steps = []
        for t in range(self.config.n_chunks):
            self.dream.reset(done, draws["start"][t], draws["posterior"][t])
            first, feature = done.float(), self.dream.state.feature
            sampled = self.sampler.sample(
                feature,
                draws["noise"][t],
                base=self.frozen_base,
                ft_steps=self.config.ft_denoising_steps,
                explore=True,
            )
            following, terminated, truncated = self.dream.step(
                env_action(sampled.chunk), draws["prior"][t]
            )
            done = terminated | truncated
            old = chunk_log_prob(sampled.log_prob)
            flags = (terminated.float(), truncated.float(), first)
            steps.append(Rollout(feature, following, sampled.chain, old, *flags))
        columns = (torch.stack(column) for column in zip(*steps, strict=True))
        return Rollout(*columns)._asdict()

    @torch.no_grad()
    def _estimate(self, rollout: dict[str, Tensor]) -> dict[str, Tensor]:
        """Advantages and returns `[T, N]` of all processes' dreams with the running reward scale,
        and what an iteration logs of them."""
        c, r = self.config, Rollout(**rollout)
        value, successor, terminated, truncated, first = (
            parallel.gather(t, 1)
            for t in (
                self.critic(r.feature),
                self.critic(r.next_feature),
                *(r.terminated, r.truncated, r.first),
            )
        )
        reward = self.scaler(terminated, first)
        done = torch.maximum(terminated, truncated)
        advantage, returns = gae(reward, value, successor, terminated, done, c.gamma, c.gae_lambda)
        episodes = (terminated + truncated).sum().clamp(min=1)
        return {
            "advantage": advantage,
            "returns": returns,
            "explained_variance": 1 - advantage.var() / returns.var().clamp(min=1e-8),
            "success": terminated.sum() / episodes,
        }

    def update(self, r: Rollout, train_actor: bool) -> dict[str, float]:
        """PPO epochs over one rollout; they stop when an epoch's KL exceeds `target_kl`.

        Returns:
            The metrics to log, read from the device at once.
        """
        estimates = self._returns(r._asdict())
        data = {
            "feature": parallel.gather(r.feature, 1),
            "chain": parallel.gather(r.chain, 1),
            "log_prob": parallel.gather(r.log_prob, 1),
            "advantage": estimates["advantage"],
            "returns": estimates["returns"],
        }
        means = self.ppo.run({k: t.flatten(0, 1) for k, t in data.items()}, train_actor)
        metrics = {f"ppo/{k}": v for k, v in means.items()}
        metrics["ppo/explained_variance"] = estimates["explained_variance"]
        metrics["finetune/imagined_success"] = estimates["success"]
        values = torch.stack(list(metrics.values())).tolist()
        return dict(zip(metrics, values, strict=True))

    def iteration(self, number: int) -> dict[str, float]:
        """Rollout and update number `number` (from 0); returns the metrics to log."""
        return self.update(self.rollout(), train_actor=number >= self.config.critic_warmup)

    def graphs(self) -> list[GraphedStep]:
        """What is captured on a GPU: rollout, returns, steps of the update."""
        return [self._rollout, self._returns, *self.ppo.graphs]

    def modules(self) -> dict:
        """Everything a checkpoint must hold; the same in all processes."""
        return {
            "actor": self.actor,
            "critic": self.critic,
            "scaler": self.scaler,
            "actor_optimizer": self.ppo.actor_optimizer,
            "critic_optimizer": self.ppo.critic_optimizer,
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
    """Share of dreamed episodes, at least `episodes`, in which the evaluated policy succeeds.

    The episodes are those of all processes, which have equal `dream.n` and equal generators.
    """
    n, device = dream.n * parallel.world_size(), dream.scene_start.device
    mine = parallel.share(n)
    length, groups = agent.policy.config.chunk, agent.world_model.rssm.stoch_groups

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    wins = total = 0
    while total < episodes:
        everyone = torch.ones(dream.n, dtype=torch.bool, device=device)
        dream.reset(everyone, rand(n)[mine], rand(n, groups)[mine])
        solved = torch.zeros_like(everyone)
        for _ in range(dream.max_episode_steps // length):
            chunk = agent.act(dream.state, agent.policy.noise(n, generator)[:, mine])
            solved |= dream.step(chunk, rand(length, n, groups)[:, mine])[1]
        wins, total = wins + int(parallel.gather(solved.float()).sum()), total + n
    return wins / total


def _env_steps() -> int:
    """Simulator steps this process has taken; a simulator that is not imported has taken none."""
    simulator = sys.modules.get("diwa.envs.simulator")
    return simulator.env_steps_taken() if simulator else 0


def make_dream(
    config: Config, model: WorldModel, success: SuccessFunction, starts: dict[str, Tensor]
) -> Dream:
    """The dreams of a fine-tuning, from starts `robot_obs [P, 15]`, `scene_obs [P, 24]` and the
    pictures there if the world model sees them; this process's share of `n_dreams`."""
    c = config.finetune
    share = parallel.share(c.n_dreams, "finetune.n_dreams")
    return Dream(
        model,
        success,
        starts["robot_obs"],
        starts["scene_obs"],
        share.stop - share.start,
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


def _try_in_simulator(tuner: Finetuner, config: Config, metrics: dict[str, float]) -> None:
    """Add the success in the simulator, from validation starts, to what is logged."""
    from diwa.phases.evaluate import evaluate_agent, task_starts

    c = config.finetune
    agent = Agent(tuner.world_model, tuner.actor, tuner.base, tuner.config.ft_denoising_steps)
    starts = task_starts(config.task, c.eval_episodes, VALIDATION_STARTS, config.env)
    metrics["finetune/real_success"] = float(evaluate_agent(agent, config, starts).mean())


def _iterate(tuner: Finetuner, config: Config, phase: Phase) -> dict[str, float]:
    """All iterations; the success in dreams before and after."""
    c, generators = config.finetune, {"dreams": tuner.generator}
    extra = phase.restore(tuner.modules(), generators)
    if "imagined_start" not in extra:
        extra = {"imagined_start": tuner.imagined_success(c.imagined_eval)}
    for i in range(phase.start, c.iterations):
        metrics = tuner.iteration(i)
        if c.eval_every and (i + 1) % c.eval_every == 0 and i + 1 < c.iterations:
            parallel.on_main(partial(_try_in_simulator, tuner, config, metrics))
        phase.log(i, metrics)
        if (i + 1) % CHECKPOINT_EVERY == 0 and i + 1 < c.iterations:
            phase.checkpoint(i + 1, tuner.modules(), generators, extra)
    return {**extra, "imagined_final": tuner.imagined_success(c.imagined_eval)}


def finetune(config: Config, run: RunFolder) -> dict:
    """Fine-tune in imagination; writes `finetune/` with the actor's weights.

    In the processes of `torchrun`, called by all of them inside `parallel.session`.

    The phase takes no environment step. With `eval_every` > 0 the policy is also tried in the
    simulator now and then, from validation starts, only to report it beside the dream; nothing is
    selected by it.

    Raises:
        RunError: a loss is not finite, the training itself stepped a simulator, or the processes
            cannot divide dreams or minibatches equally.
        DeviceMemoryError: the GPU is too small for the dreams; says how many would fit.
    """
    c = config.finetune
    with run.phase("finetune", c.iterations, "finetune/imagined_success") as phase:
        if phase.result is not None:
            return phase.result
        torch.set_num_threads(config.threads)
        before = _env_steps()
        tuner = _build(config, run)
        with memory_advice(c, tuner.actor, tuner.world_model):
            success = _iterate(tuner, config, phase)
        steps = _env_steps() - before
        if steps:
            raise RunError(f"fine-tuning took {steps} environment steps; it must take none")
        actor = tuner.actor.requires_grad_(False)
        kf = tuner.config.ft_denoising_steps
        parallel.on_main(partial(save_policy, phase.dir, actor, kf))
        return phase.finish(
            {
                **success,
                "finetune_env_steps": steps,
                "imagined_steps": c.iterations * c.n_dreams * c.n_chunks * tuner.actor.config.chunk,
            }
        )

"""Phase 5: success in the simulator from fixed held-out starts; the one evaluation function."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diwa.agent import Agent, load_policy, load_world_model, world_model_folder
from diwa.config import Config
from diwa.data.store import NEUTRAL_ACTION
from diwa.nn.encoders import observed
from diwa.nn.rssm import RSSMState
from diwa.phases.collect import TEST_STARTS
from diwa.run import RunFolder
from diwa.stats import wilson_interval

ENVS_PER_WORKER = 4


def task_starts(
    task: str, n: int, seed: int, simulator: str = "playtable"
) -> dict[str, NDArray[np.float32]]:
    """n start observations of a task: `robot_obs [n, 15]`, `scene_obs [n, 24]`."""
    from diwa.envs.starts import make_starts

    return make_starts(task, n, seed, simulator)


class Slots:
    """Filter states, planned chunks and noise of the episodes that run side by side.

    The randomness of an episode depends on its start's number only, so the result does not depend
    on how many environments run at once.
    """

    def __init__(self, agent: Agent, n: int, max_steps: int, seed: int) -> None:
        self.agent, self.seed, self.max_steps = agent, seed, max_steps
        rssm, c = agent.world_model.rssm, agent.policy.config
        self.device = agent.world_model.codec.mean.device
        self.state = rssm.initial(n)
        self.action = torch.zeros(n, 7, device=self.device)
        self.reset = torch.ones(n, device=self.device)
        self.time = np.zeros(n, dtype=int)
        self.chunk = torch.zeros(n, c.chunk, 7, device=self.device)
        chunks = -(-max_steps // c.chunk)
        self.noise = torch.zeros(n, chunks, agent.policy.steps + 1, c.chunk, 7, device=self.device)
        self.uniform = torch.zeros(n, max_steps + 1, rssm.stoch_groups, device=self.device)

    def begin(self, slot: int, start: int) -> None:
        """A new episode from start number `start` in a slot."""
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + start)
        self.noise[slot] = torch.randn(self.noise.shape[1:], generator=g).to(self.device)
        self.uniform[slot] = torch.rand(self.uniform.shape[1:], generator=g).to(self.device)
        self.reset[slot], self.time[slot] = 1.0, 0
        self.action[slot] = torch.from_numpy(NEUTRAL_ACTION)

    def act(self, robot_obs: Tensor, scene_obs: Tensor, **frames: Tensor) -> NDArray[np.float32]:
        """Observe, plan where a chunk has been used up, and return actions `[N, 7]`."""
        model, c = self.agent.world_model, self.agent.policy.config
        rows = torch.arange(len(self.time))
        now = torch.from_numpy(np.minimum(self.time, self.max_steps))
        self.state = model.filter(
            self.state,
            model.observation(robot_obs, scene_obs, **frames),
            self.action,
            self.reset,
            self.uniform[rows, now],
        )
        self.reset.zero_()
        due = np.flatnonzero(self.time % c.chunk == 0)
        if len(due):
            index = torch.from_numpy(due)
            number = torch.from_numpy(
                np.minimum(self.time[due] // c.chunk, self.noise.shape[1] - 1)
            )
            noise = self.noise[index, number].transpose(0, 1)
            state = RSSMState(self.state.h[index], self.state.z[index])
            self.chunk[index] = self.agent.act(state, noise)
        self.action = self.chunk[rows, torch.from_numpy(self.time % c.chunk)].clone()
        self.time += 1
        return self.action.cpu().numpy()


def evaluate_agent(
    agent: Agent, config: Config, starts: dict[str, NDArray], *, seed: int = 0
) -> NDArray[np.bool_]:
    """Run one episode from every start.

    Args:
        agent: the policy with its world-model filter.
        config: task, simulator, episode length and number of worker processes.
        starts: `robot_obs [n, 15]`, `scene_obs [n, 24]`.
        seed: of the policy's and the filter's randomness.

    Returns:
        success `[n]` bool, in the order of the starts.
    """
    from gymnasium.vector import AutoresetMode

    from diwa.envs.queue import queued_envs

    total, limit = len(starts["robot_obs"]), config.evaluate.max_episode_steps
    count = min(config.evaluate.workers * ENVS_PER_WORKER, total)
    shares = [list(range(i, total, count)) for i in range(count)]
    envs = queued_envs(
        config.task,
        starts,
        shares,
        limit,
        AutoresetMode.NEXT_STEP,
        simulator=config.env,
        image_size=agent.world_model.config.picture_size,
    )
    success = np.zeros(total, dtype=bool)
    finished = np.zeros(total, dtype=bool)
    slots = Slots(agent, count, limit, seed)
    names = ("robot_obs", "scene_obs", *agent.world_model.cameras)
    try:
        obs, _ = envs.reset()
        position = np.zeros(count, dtype=int)
        over = np.zeros(count, dtype=bool)
        for i in range(count):
            slots.begin(i, shares[i][0])
        while not finished.all():
            actions = slots.act(**observed(obs, names, slots.device))
            obs, reward, terminated, truncated, _ = envs.step(actions)
            for i in np.flatnonzero(over).tolist():  # this step was the reset of a finished episode
                position[i] = min(position[i] + 1, len(shares[i]) - 1)
                slots.begin(i, shares[i][position[i]])
            ended = (terminated | truncated) & ~over
            for i in np.flatnonzero(ended).tolist():
                start = shares[i][position[i]]
                if not finished[start]:
                    success[start], finished[start] = reward[i] > 0, True
            over = ended
    finally:
        envs.close()
    return success


def summary(success: NDArray[np.bool_]) -> dict[str, Any]:
    """Success rate, number of episodes and Wilson interval."""
    n, wins = len(success), int(success.sum())
    return {"success": wins / n, "n": n, "ci": list(wilson_interval(wins, n))}


def load_agents(config: Config, run: RunFolder) -> dict[str, Agent]:
    """Agents of the run: `base`, and `finetuned` where that phase is done."""
    model = load_world_model(world_model_folder(config, run.path), config.device)
    base, _ = load_policy(run.dir("pretrain"), config.device)
    agents = {"base": Agent(model, base)}
    if (run.dir("finetune") / "result.json").exists():
        tuned, ft_steps = load_policy(run.dir("finetune"), config.device)
        agents["finetuned"] = Agent(model, tuned, base, ft_steps)
    return agents


def evaluate_run(config: Config, run: RunFolder) -> dict:
    """Evaluate base and fine-tuned policy on the same held-out starts; writes `evaluate/`."""
    with run.phase("evaluate", 2, "evaluate/success") as phase:
        if phase.result is not None:
            return phase.result
        torch.set_num_threads(config.threads)
        starts = task_starts(config.task, config.evaluate.episodes, TEST_STARTS, config.env)
        result: dict[str, Any] = {}
        for i, (name, agent) in enumerate(load_agents(config, run).items()):
            wins = evaluate_agent(agent, config, starts, seed=config.seed)
            result[name] = {**summary(wins), "episodes": wins.tolist()}
            phase.log(i, {"evaluate/success": result[name]["success"]})
        return phase.finish(result)

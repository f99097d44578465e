"""Online DPPO baseline: the PPO of phase 4 in the simulator, counting its steps.

Everything but the environment is that of `finetune`: actor, critic, reward scale, losses and the
features of the world model's filter. What it shows is how many physical steps imagination saves.
"""

from __future__ import annotations

import dataclasses

from diwa.agent import Agent, load_policy, load_world_model, save_policy, world_model_folder
from diwa.config import Config
from diwa.envs.online import OnlineEnv
from diwa.phases.collect import VALIDATION_STARTS, load_starts
from diwa.phases.finetune import Finetuner
from diwa.run import Phase, RunFolder


def _train(
    tuner: Finetuner, env: OnlineEnv, config: Config, phase: Phase
) -> list[dict[str, float]]:
    """PPO until the target or the limit of steps; returns the evaluations."""
    from diwa.phases.evaluate import evaluate_agent, task_starts

    c = config.online
    starts = task_starts(config.task, c.eval_episodes, VALIDATION_STARTS, config.env)
    evaluations: list[dict[str, float]] = []
    number = 0
    while True:
        metrics = tuner.iteration(number)
        metrics["online/env_steps"] = env.steps
        metrics["online/training_success"] = metrics.pop("finetune/imagined_success")
        number += 1
        spent = env.steps >= c.max_env_steps
        if spent or (c.eval_every and number % c.eval_every == 0):
            agent = Agent(
                tuner.world_model, tuner.actor, tuner.base, tuner.config.ft_denoising_steps
            )
            success = float(evaluate_agent(agent, config, starts).mean())
            metrics["online/success"] = success
            evaluations.append({"env_steps": env.steps, "success": success})
        phase.log(number - 1, metrics)
        if spent or (evaluations and evaluations[-1]["success"] >= c.target_success):
            return evaluations


def finetune_online(config: Config, run: RunFolder) -> dict:
    """Fine-tune the base policy in the simulator; writes `online/` with the actor's weights.

    Stops at the first evaluation that reaches `online.target_success`, or after
    `online.max_env_steps` steps. An interrupted baseline starts again from the base policy.

    Raises:
        RunError: a loss is not finite, or an earlier phase is missing.
    """
    c = config.online
    per_iteration = c.envs * c.n_chunks * config.policy.chunk
    total = max(1, -(-c.max_env_steps // per_iteration))
    with run.phase("online", total, "online/success") as phase:
        if phase.result is not None:
            return phase.result
        model = load_world_model(world_model_folder(config, run.path), config.device)
        base, _ = load_policy(run.dir("pretrain"), config.device)
        starts = load_starts(run.dir("collect") / "starts.npz")
        limit = config.finetune.max_episode_steps
        env = OnlineEnv(model, config.task, starts, c.envs, limit, config.seed, config.env)
        ppo = dataclasses.replace(config.finetune, n_dreams=c.envs, n_chunks=c.n_chunks)
        try:
            tuner = Finetuner(dataclasses.replace(config, finetune=ppo), model, base, env)
            evaluations = _train(tuner, env, config, phase)
        finally:
            env.close()
        actor = tuner.actor.requires_grad_(False)
        save_policy(phase.dir, actor, tuner.config.ft_denoising_steps)
        reached = evaluations[-1]["success"] >= c.target_success
        return phase.finish(
            {"env_steps": env.steps, "reached": reached, "evaluations": evaluations}
        )
